"""Stage 2, detect: recognise the data format from the columns of the first rows."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.errors import DataError
from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import find_column, missing_column
from finetune_trainer.data.formats import FORMATS, Format
from finetune_trainer.data.rows import RawRow

SAMPLE_ROWS = 50
"""Rows that are inspected: one unusual first row must not decide the format."""


def detect(sample: Sequence[RawRow], columns: Columns) -> Format:
    """The format that matches most of the sampled rows. Errors: DatasetEmpty, FormatUnknown."""
    if not sample:
        raise DataError("DatasetEmpty", "the data set has no rows", hint="give a file with at least one row")
    matches = [next((one for one in FORMATS if one.matches(row.value, columns)), None) for row in sample[:SAMPLE_ROWS]]
    known = [one for one in matches if one is not None]
    if not known:
        present = ", ".join(f"`{name}`" for name in sample[0].value) or "no columns"
        raise DataError(
            "FormatUnknown", f"{sample[0].file.name}: the columns match no known format; the first row has {present}",
            hint="set dataset.format, and dataset.columns where the names differ from the format's own",
        )  # fmt: skip
    return max(dict.fromkeys(known), key=known.count)


def require_columns(sample: Sequence[RawRow], form: Format, columns: Columns) -> None:
    """Refuse data in which no sampled row has a required column: one error for the file, not one per row.

    Errors: ColumnMissing.
    """
    rows = sample[:SAMPLE_ROWS]
    for role in form.required_columns(rows, columns) if rows else ():
        if all(find_column(role, row.value.keys(), columns) is None for row in rows):
            error = missing_column(role, rows[0].value.keys(), columns)
            raise DataError(error.code, f"{rows[0].file.name}, format {form.name}: {error.message}", hint=error.hint)


def is_alpaca_instead(sample: Sequence[RawRow], given: DatasetFormat, columns: Columns) -> bool:
    """Whether the format is `qa` with named columns, and all rows have alpaca's columns instead of the named ones."""
    named = [name for name in (columns.question, columns.answer) if name is not None]
    if given is not DatasetFormat.QA or not named or not sample:
        return False
    rows = [row.value.keys() for row in sample[:SAMPLE_ROWS]]
    return all({"instruction", "output"} <= row and not row & set(named) for row in rows)
