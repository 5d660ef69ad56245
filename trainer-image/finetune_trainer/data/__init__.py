"""Turns data files into token sequences, in stages: read, detect, normalise, check, split, render, tokenise, pack.

The stages up to split do not import torch. Each stage takes and returns typed values, and counts the rows that it changes or
drops. An error names the file, the row, the problem, and the correction.
"""

from finetune_trainer.data.load import DataSummary, LoadedData, check_files, load, trains_on_answers_only

__all__ = ["DataSummary", "LoadedData", "check_files", "load", "trains_on_answers_only"]
