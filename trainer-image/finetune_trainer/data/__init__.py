"""The data room: read, detect, normalise, split (no torch), then template, tokenise, pack.

Each stage takes typed values and gives typed values with counts; each failure names file, row, what was found and what to write.
"""

from finetune_trainer.data.load import DataSummary, Loaded, check_files, load, response_only

__all__ = ["DataSummary", "Loaded", "check_files", "load", "response_only"]
