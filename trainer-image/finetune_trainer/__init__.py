"""The package that runs on the GPU nodes: the supervisor (PID 1 of a trainer pod) and the ranks."""
