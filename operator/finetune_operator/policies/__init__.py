"""Policies of the operator, one per module. All are pure functions, without requests to the API server."""
