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
"""The formats in the order of detection. The first match is used, so formats with specific columns come first."""


def format_named(name: DatasetFormat) -> Format:
    """Return the format with this value of `dataset.format`."""
    return next(form for form in FORMATS if form.name is name)


__all__ = ["FORMATS", "Format", "ReadOptions", "format_named"]
