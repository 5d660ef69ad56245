"""Finds a row's column for a role, such as the question.

If `dataset.columns` names a column for the role, no other name is tried. If `dataset.columns` names no column for the role, the role's
default names are tried in order, first with exact case, then ignoring case.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.spec.dataset import Columns

from finetune_trainer.data.rows import RowError


@dataclass(frozen=True)
class ColumnRole:
    """The purpose of a column, such as the question."""

    field: str
    """Field of `dataset.columns` that names the column."""
    names: tuple[str, ...]
    """The default names, which are tried in order if `dataset.columns` does not set the field."""


SYSTEM_COLUMN = ColumnRole("system", ("system", "system_prompt"))
PROMPT_COLUMN = ColumnRole("question", ("prompt", "question", "instruction", "query"))


def find_column(role: ColumnRole, row_columns: Collection[str], columns: Columns) -> str | None:
    """Return the name of the column that has the role, or None if no name in `row_columns` matches."""
    configured_name = getattr(columns, role.field, None)
    if configured_name is not None:
        return configured_name if configured_name in row_columns else None
    for default_name in role.names:
        if default_name in row_columns:
            return default_name
    name_by_lower_case = {name.lower(): name for name in reversed(list(row_columns))}
    return next((name_by_lower_case[default_name] for default_name in role.names if default_name in name_by_lower_case), None)


def column_value(role: ColumnRole, row: Mapping[str, Any], columns: Columns) -> Any:
    """Return the value of the role's column, or None if the column is absent or null."""
    name = find_column(role, row.keys(), columns)
    return row[name] if name is not None else None


def required_value(role: ColumnRole, row: Mapping[str, Any], columns: Columns) -> Any:
    """Return the value of the role's column. Errors: RowError ColumnMissing, DatasetRowInvalid (the value is null)."""
    name = find_column(role, row.keys(), columns)
    if name is None:
        raise missing_column_error(role, row.keys(), columns)
    if row[name] is None:
        raise RowError("DatasetRowInvalid", f"column `{name}` is null", "write a value, or remove the row")
    return row[name]


def missing_column_error(role: ColumnRole, row_columns: Collection[str], columns: Columns) -> RowError:
    """Return the error for a row without a column for the role. `row_columns`: the columns that the row has."""
    configured_name = getattr(columns, role.field, None)
    expected_column = (
        f"column `{configured_name}` (dataset.columns.{role.field})"
        if configured_name
        else f"a column `{'` or `'.join(role.names)}`"
    )
    present_columns = ", ".join(f"`{name}`" for name in row_columns) or "no columns"
    return RowError(
        "ColumnMissing",
        f"{expected_column} is missing; the row has {present_columns}",
        f"name the right column in dataset.columns.{role.field}",
    )


def required_text(role: ColumnRole, row: Mapping[str, Any], columns: Columns) -> str:
    """Return the value of the role's column as text. Numbers and booleans are converted. Errors: RowError ColumnMissing, DatasetRowInvalid."""
    value = required_value(role, row, columns)
    return as_text(value, find_column(role, row.keys(), columns) or role.names[0])


def optional_text(role: ColumnRole, row: Mapping[str, Any], columns: Columns) -> str | None:
    """Return the value of the role's column as text, or None if the column is absent or blank.

    Errors: RowError ColumnMissing (only if `dataset.columns` names the column), DatasetRowInvalid.
    """
    if getattr(columns, role.field, None) is not None and find_column(role, row.keys(), columns) is None:
        raise missing_column_error(role, row.keys(), columns)
    value = column_value(role, row, columns)
    if value is None:
        return None
    text = as_text(value, role.names[0])
    return text if text.strip() else None


def as_text(value: Any, column_name: str) -> str:
    """Convert a string, number or boolean to text. Errors: RowError DatasetRowInvalid for lists and objects."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    raise RowError(
        "DatasetRowInvalid", f"column `{column_name}` must be text, but holds {type(value).__name__}", "write a string"
    )
