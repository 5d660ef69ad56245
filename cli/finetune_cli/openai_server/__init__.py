"""An HTTP server with the paths `/v1/files` and `/v1/fine_tuning/jobs` of the OpenAI API.

The server keeps no data of its own. A job is a FineTuneJob in the namespace of the API key, and a file is an object in S3. Each API key belongs to a
ServiceAccount. For a request with this key, the server impersonates the ServiceAccount in Kubernetes. Therefore the rights of the ServiceAccount
limit what a client with this key may do.
"""
