"""The project's API: the spec and status of a FineTuneJob, and the formats and names that operator, trainer and CLI exchange.

Operator, trainer and CLI share these definitions and do not import each other. This package imports none of these programs, and its
largest dependency is pydantic.
"""
