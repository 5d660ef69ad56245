"""The report of a run: one self-contained HTML page with curves, results, spec, data, costs and origin of the model.

The functions of this package are pure: they get values and return the page. They start no process, use no storage and import no torch,
because the supervisor calls them.
"""
