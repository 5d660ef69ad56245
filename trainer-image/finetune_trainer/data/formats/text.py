"""Formats whose rows are one text: `plainText` and `custom`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import ColumnRole, as_text, required_text
from finetune_trainer.data.formats.base import Format, ReadOptions, require_text
from finetune_trainer.data.rows import RowError, Text

TEXT_COLUMN = ColumnRole("text", ("text", "content"))


class PlainText(Format):
    """One column of text."""

    name = DatasetFormat.PLAIN_TEXT
    required = (TEXT_COLUMN,)

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Text:
        return Text(require_text(required_text(TEXT_COLUMN, row, options.columns), "text"))


class Custom(Format):
    """Text that `dataset.template` renders from columns. `{column}` stands for the column's value; `{{` and `}}` are literal braces."""

    name = DatasetFormat.CUSTOM

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        return False  # this format is used only if dataset.format names it

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> Text:
        def replace_match(match: re.Match[str]) -> str:
            matched_text = match.group(0)
            if matched_text in ("{{", "}}"):
                return matched_text[0]
            name = match.group(1)
            if name not in row:
                present_columns = ", ".join(f"`{column}`" for column in row)
                raise RowError(
                    "ColumnMissing",
                    f"dataset.template names column `{name}`, but the row has {present_columns}",
                    "name a column of the row",
                )
            return as_text(row[name], name) if row[name] is not None else ""

        text = re.sub(r"\{\{|\}\}|\{([^{}]+)\}", replace_match, options.template or "")
        return Text(require_text(text, "rendered template"))
