"""Configuration files of other tools become FineTuneJobs.

One reader and one table a tool (`<tool>.py`); everything they share - precedence, defaults, checks, errors all at once -
is in `engine.py`. A further tool is one more module with the five parts of `material.Importer`.
"""
