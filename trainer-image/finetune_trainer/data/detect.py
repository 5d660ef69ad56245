"""Stage 2, detect: find the data format from the columns of the first rows."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.errors import DataError
from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import find_column, missing_column_error
from finetune_trainer.data.formats import FORMATS, Format
from finetune_trainer.data.rows import RawRow

SAMPLE_ROWS = 50
"""Number of rows to inspect. Several rows are inspected so that an unusual first row does not decide the format."""


def detect_format(sample: Sequence[RawRow], columns: Columns) -> Format:
    """Return the format that matches the largest number of sampled rows. Errors: DatasetEmpty, FormatUnknown."""
    if not sample:
        raise DataError("DatasetEmpty", "the data set has no rows", hint="give a file with at least one row")
    matches = [
        next((row_format for row_format in FORMATS if row_format.matches(row.value, columns)), None) for row in sample[:SAMPLE_ROWS]
    ]
    detected_formats = [row_format for row_format in matches if row_format is not None]
    if not detected_formats:
        present_columns = ", ".join(f"`{name}`" for name in sample[0].value) or "no columns"
        raise DataError(
            "FormatUnknown", f"{sample[0].file.name}: the columns match no known format; the first row has {present_columns}",
            hint="set dataset.format; if your column names differ from those of the format, set dataset.columns too",
        )  # fmt: skip
    return max(dict.fromkeys(detected_formats), key=detected_formats.count)


def require_columns(sample: Sequence[RawRow], row_format: Format, columns: Columns) -> None:
    """Refuse data if a required column is missing in all sampled rows. The error names the file, because no single row is the cause.

    Errors: ColumnMissing.
    """
    rows = sample[:SAMPLE_ROWS]
    for role in row_format.required_columns(rows, columns) if rows else ():
        if all(find_column(role, row.value.keys(), columns) is None for row in rows):
            error = missing_column_error(role, rows[0].value.keys(), columns)
            raise DataError(error.code, f"{rows[0].file.name}, format {row_format.name}: {error.message}", hint=error.hint)


def is_alpaca_despite_spec(sample: Sequence[RawRow], spec_format: DatasetFormat, columns: Columns) -> bool:
    """Whether the rows are `alpaca` rows although the spec sets the format `qa`.

    The result is True if all rows have the columns of `alpaca`, and no row has a question or answer column that `dataset.columns` names.
    """
    named_columns = [name for name in (columns.question, columns.answer) if name is not None]
    if spec_format is not DatasetFormat.QA or not named_columns or not sample:
        return False
    columns_of_rows = [row.value.keys() for row in sample[:SAMPLE_ROWS]]
    return all({"instruction", "output"} <= row_columns and not row_columns & set(named_columns) for row_columns in columns_of_rows)
