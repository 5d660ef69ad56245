"""Policies of the operator, one per module. All are pure functions that send no requests to the API server."""
