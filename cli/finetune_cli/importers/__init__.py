"""Importers: they turn configuration files of other tools into FineTuneJobs.

Each tool has one module with a reader and a table of its options. `run_import.py` does the steps that are the same for all tools:
precedence, defaults, checks, and the report of all mistakes at once. In an importer, "the tool" means the tool whose configuration it reads.

To add a tool, write a module with `IMPORTER = Importer(...)` (see `draft.py`) and add its name to `IMPORTER_NAMES`.
"""

IMPORTER_NAMES = ("env", "toml", "yaml", "hydra", "guide", "openai", "axolotl", "llamafactory", "trl", "unsloth", "together", "torchtune", "kubeflow")
"""The values of `--from`, in the order of help texts and messages. For each name, `registry.py` imports the module with the same name."""
