"""From data files to token sequences, in stages: read, detect, normalise, check, split (without torch); then render, tokenise, pack.

Each stage takes and returns typed values and counts what it changed. An error names the file and the row, what was found, and what
to write instead.
"""

from finetune_trainer.data.load import DataSummary, LoadedData, check_files, load, trains_on_answers_only

__all__ = ["DataSummary", "LoadedData", "check_files", "load", "trains_on_answers_only"]
