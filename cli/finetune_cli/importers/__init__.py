"""Imports of configuration files of other tools.

Each tool has one module with a reader and a table of its options. `run_import.py` does the steps that are the same for all tools:
precedence, defaults, checks, and the report of all errors at once.

To add a tool, write a module with an `Importer` (see `draft.py`) and add it to `registry.py`.
"""
