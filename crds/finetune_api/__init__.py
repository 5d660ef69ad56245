"""The API of the project: the spec and status of a FineTuneJob, and everything that the programs exchange.

Operator, trainer and CLI share these definitions and do not import each other. This package imports none of them and nothing heavier
than pydantic.
"""
