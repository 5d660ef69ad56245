"""The operator's rules for decisions, one subject per module. All are pure functions that send no requests to the API server."""
