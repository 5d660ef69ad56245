"""Stage 2, detect: recognise the shape of the rows from the columns of the first ones, or say what is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_api.errors import DataError
from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data import columns as names
from finetune_trainer.data.rows import Raw, RowError

SAMPLE = 50
"""Rows looked at: a format is that of the sample, never of row 1 alone."""


def detect(sample: Sequence[Raw], columns: Columns) -> DatasetFormat:
    """The format whose columns are there in most of the sampled rows. Errors: DatasetEmpty, FormatUnknown."""
    if not sample:
        raise DataError("DatasetEmpty", "the data set has no rows", hint="give a file with at least one row")
    found = [_format(row.value, columns) for row in sample[:SAMPLE]]
    known = [one for one in found if one is not None]
    if not known:
        there = ", ".join(f"`{name}`" for name in sample[0].value) or "no column at all"
        raise DataError(
            "FormatUnknown", f"{sample[0].file.name}: the columns fit no known format; there are {there}",
            hint="set dataset.format, and dataset.columns where the names differ from the format's own",
        )  # fmt: skip
    return max(dict.fromkeys(known), key=known.count)


def require_columns(sample: Sequence[Raw], kind: DatasetFormat, columns: Columns) -> None:
    """Refuse a format whose columns no sampled row has: that is one mistake, not one per row. Errors: ColumnMissing."""
    slots = needed(kind)
    if kind is DatasetFormat.MESSAGES and all(
        names.pairs_instead(row.value.keys(), columns) for row in sample[:SAMPLE]
    ):
        slots = (names.QUESTION[kind], names.ANSWER[kind])
    for slot in slots:
        if sample and all(names.column(slot, row.value.keys(), columns) is None for row in sample[:SAMPLE]):
            error: RowError = names.missing(slot, sample[0].value.keys(), columns)
            raise DataError(error.code, f"{sample[0].file.name}, format {kind}: {error.found}", hint=error.write)


def alpaca_instead(sample: Sequence[Raw], kind: DatasetFormat, columns: Columns) -> bool:
    """Whether rows said to hold questions and answers in named columns have none of those, but alpaca's columns, throughout."""
    named = [name for name in (columns.question, columns.answer) if name is not None]
    if kind is not DatasetFormat.QA or not named or not sample:
        return False
    rows = [row.value.keys() for row in sample[:SAMPLE]]
    return all({"instruction", "output"} <= row and not row & set(named) for row in rows)


def needed(kind: DatasetFormat) -> tuple[names.Slot, ...]:
    """Slots that every row of a format has to fill."""
    match kind:
        case DatasetFormat.PLAIN_TEXT:
            return (names.TEXT,)
        case DatasetFormat.MESSAGES | DatasetFormat.SHAREGPT:
            return (names.MESSAGES,)
        case DatasetFormat.PREFERENCE:
            return (names.CHOSEN, names.REJECTED)
        case DatasetFormat.UNPAIRED_PREFERENCE:
            return (names.QUESTION[kind], names.ANSWER[kind], names.LABEL)
        case DatasetFormat.PROMPT_ONLY:
            return (names.QUESTION[kind],)
        case DatasetFormat.MCQ:
            return (names.QUESTION[kind], names.ANSWER[kind], names.OPTIONS)
        case DatasetFormat.OASST | DatasetFormat.CUSTOM:
            return ()
        case _:
            return (names.QUESTION[kind], names.ANSWER[kind])


def _format(row: Any, columns: Columns) -> DatasetFormat | None:
    """Format of one row: the most telling columns first."""

    def has(*slots: names.Slot) -> bool:
        return all(names.column(slot, row.keys(), columns) is not None for slot in slots)

    if "message_id" in row and "parent_id" in row:
        return DatasetFormat.OASST
    if isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]:
        return DatasetFormat.OASST
    if has(names.CHOSEN, names.REJECTED):
        return DatasetFormat.PREFERENCE
    if has(names.MESSAGES):
        turns = names.value(names.MESSAGES, row, columns)
        first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
        return DatasetFormat.SHAREGPT if "from" in first or "value" in first else DatasetFormat.MESSAGES
    if has(*needed(DatasetFormat.UNPAIRED_PREFERENCE)):
        return DatasetFormat.UNPAIRED_PREFERENCE
    if has(*needed(DatasetFormat.MCQ)):
        return DatasetFormat.MCQ
    if columns.question is None and columns.answer is None:
        if {"prompt", "completion"} <= row.keys():
            return DatasetFormat.PROMPT_COMPLETION
        if {"instruction", "output"} <= row.keys():
            return DatasetFormat.ALPACA
        if "instruction" in row and has(names.ANSWER[DatasetFormat.INSTRUCTION]):
            return DatasetFormat.INSTRUCTION
    if has(*needed(DatasetFormat.QA)):
        return DatasetFormat.QA
    if has(names.TEXT):
        return DatasetFormat.PLAIN_TEXT
    return DatasetFormat.PROMPT_ONLY if has(names.PROMPT) else None
