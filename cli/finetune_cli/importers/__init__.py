"""Imports of configuration files of other tools.

Each tool has one module with a reader and a table of its options. What all tools share is in `run_import.py`: precedence, defaults,
checks, and the report of all errors at once. To add a tool, write a module with an `Importer` (see `draft.py`) and register it.
"""
