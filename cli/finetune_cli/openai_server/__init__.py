"""An HTTP server with the paths of the OpenAI fine-tuning API: `/v1/files` and `/v1/fine_tuning/jobs`, implemented with FineTuneJobs and S3.

The server has no state of its own. Jobs are FineTuneJobs in the namespace of the API key, and files are objects in S3. Kubernetes decides what a
key may do: each key stands for a ServiceAccount, and the server sends its requests in the name of that ServiceAccount.
"""
