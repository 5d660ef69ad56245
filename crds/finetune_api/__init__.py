"""The vocabulary of the house: what users write, what they read, and what the programs say to each other.

Everything with a name on the wire lives here once: the spec and status of a FineTuneJob, labels, environment variables,
exit codes, the run configuration a pod reads, the progress and the last words it gives back. This package knows none of
the programs and imports nothing heavier than pydantic.
"""
