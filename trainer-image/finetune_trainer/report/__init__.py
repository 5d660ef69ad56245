"""Writes the report of a run: one self-contained HTML page with curves, results, spec, data, costs and origin of the model.

The supervisor calls the functions of this package, so these functions import no torch, start no process and access no storage.
"""
