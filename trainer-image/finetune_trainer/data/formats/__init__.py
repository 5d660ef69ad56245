"""The data formats. Each format is a class of this package and an entry in `FORMATS`."""

from __future__ import annotations

from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.formats.base import Format, ReadOptions
from finetune_trainer.data.formats.conversations import Messages, ShareGpt
from finetune_trainer.data.formats.oasst import Oasst
from finetune_trainer.data.formats.prompts import PairedPreference, PromptCompletion, PromptOnly, UnpairedPreference
from finetune_trainer.data.formats.questions import Alpaca, Instruction, MultipleChoice, QuestionAnswer
from finetune_trainer.data.formats.text import Custom, PlainText
from finetune_trainer.data.formats.tokens import PreTokenized

FORMATS: tuple[Format, ...] = (
    Oasst(),
    PairedPreference(),
    ShareGpt(),
    Messages(),
    UnpairedPreference(),
    MultipleChoice(),
    PromptCompletion(),
    Alpaca(),
    Instruction(),
    QuestionAnswer(),
    PlainText(),
    PromptOnly(),
    PreTokenized(),
    Custom(),
)
"""The formats in the order of detection. Detection uses the first match, so formats with specific columns come first."""


def find_format(name: DatasetFormat) -> Format:
    """Return the format for this value of `dataset.format`."""
    return next(row_format for row_format in FORMATS if row_format.name is name)


__all__ = ["FORMATS", "Format", "ReadOptions", "find_format"]
