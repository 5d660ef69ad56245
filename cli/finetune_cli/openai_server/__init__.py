"""An HTTP server with the paths `/v1/files` and `/v1/fine_tuning/jobs` of the OpenAI API, which stores jobs as FineTuneJobs and files in S3.

The server itself stores nothing. A job is a FineTuneJob in the namespace of the API key, and a file is an object in S3. Each API key stands for
a ServiceAccount. The server sends requests to Kubernetes in the name of this ServiceAccount, whose rights limit what the key may do.
"""
