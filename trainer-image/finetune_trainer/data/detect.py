"""Stage 2, detect: find the data format by the columns of the first rows."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.errors import DataError
from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import find_column, missing_column
from finetune_trainer.data.formats import FORMATS, Format
from finetune_trainer.data.rows import RawRow

SAMPLE_ROWS = 50
"""Number of rows to inspect. With several rows, an unusual first row does not decide the format."""


def detect_format(sample: Sequence[RawRow], columns: Columns) -> Format:
    """Return the format that matches most of the sampled rows. Errors: DatasetEmpty, FormatUnknown."""
    if not sample:
        raise DataError("DatasetEmpty", "the data set has no rows", hint="give a file with at least one row")
    matches = [
        next((form for form in FORMATS if form.matches(row.value, columns)), None) for row in sample[:SAMPLE_ROWS]
    ]
    detected = [form for form in matches if form is not None]
    if not detected:
        present = ", ".join(f"`{name}`" for name in sample[0].value) or "no columns"
        raise DataError(
            "FormatUnknown", f"{sample[0].file.name}: the columns match no known format; the first row has {present}",
            hint="set dataset.format; if your column names differ from those of the format, set dataset.columns too",
        )  # fmt: skip
    return max(dict.fromkeys(detected), key=detected.count)


def require_columns(sample: Sequence[RawRow], form: Format, columns: Columns) -> None:
    """Refuse data if a required column is missing in all sampled rows. The error names the file instead of a row.

    Errors: ColumnMissing.
    """
    rows = sample[:SAMPLE_ROWS]
    for role in form.required_columns(rows, columns) if rows else ():
        if all(find_column(role, row.value.keys(), columns) is None for row in rows):
            error = missing_column(role, rows[0].value.keys(), columns)
            raise DataError(error.code, f"{rows[0].file.name}, format {form.name}: {error.message}", hint=error.hint)


def is_alpaca_instead(sample: Sequence[RawRow], spec_format: DatasetFormat, columns: Columns) -> bool:
    """Whether the spec sets format `qa` and names columns, but all rows have the columns of `alpaca` and none of the named columns."""
    named_columns = [name for name in (columns.question, columns.answer) if name is not None]
    if spec_format is not DatasetFormat.QA or not named_columns or not sample:
        return False
    rows = [row.value.keys() for row in sample[:SAMPLE_ROWS]]
    return all({"instruction", "output"} <= row and not row & set(named_columns) for row in rows)
