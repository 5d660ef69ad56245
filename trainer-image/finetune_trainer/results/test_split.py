"""Writes `test_split.jsonl`: the raw rows of the test set, so that another program can evaluate a model on the same rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from finetune_trainer.data.rows import RawRow
from finetune_trainer.results.json_values import replace_non_finite_numbers


def jsonl_lines(rows: Iterable[RawRow]) -> Iterator[str]:
    """Yield the lines of `test_split.jsonl`: each row with the columns and values of its source, before any template is applied.

    Numbers that are not finite become null. Values of Parquet files that JSON cannot represent, such as dates, become text.
    """
    for row in rows:
        yield json.dumps(replace_non_finite_numbers(dict(row.value)), ensure_ascii=False, allow_nan=False, default=_to_text) + "\n"


def _to_text(value: Any) -> str:
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)
