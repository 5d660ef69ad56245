"""The project's API: the spec and status of a FineTuneJob, and the formats and names that operator, trainer and CLI exchange.

Operator, trainer and CLI import this package, but do not import each other. This package imports neither operator, trainer nor CLI.
The only large dependency of this package is pydantic.
"""
