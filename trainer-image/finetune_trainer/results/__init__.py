"""Computes the contents of the result files that a run writes next to its final model: metrics, test rows and compared answers.

Ranks and the supervisor both call the functions of this package, so these functions import no torch, start no process and access no storage.
"""
