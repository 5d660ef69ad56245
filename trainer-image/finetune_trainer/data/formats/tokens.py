"""The format `preTokenized`: rows of token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.columns import ColumnRole, required_value
from finetune_trainer.data.formats.base import Format, ReadOptions
from finetune_trainer.data.rows import IGNORED_LABEL, RowError, TokenSequence

TOKENS_COLUMN = ColumnRole("tokens", ("input_ids",))
LABELS_COLUMN = "labels"
MASK_COLUMNS = ("completion_mask", "assistant_masks")
"""Columns that contain 1 for each trained token, else 0. The first of these columns that exists in the row is used."""
ATTENTION_COLUMN = "attention_mask"


class PreTokenized(Format):
    """Token ids in `input_ids`. `labels`, `completion_mask` or `assistant_masks` mark the trained tokens; without them, all tokens are trained on."""

    name = DatasetFormat.PRE_TOKENIZED
    required = (TOKENS_COLUMN,)

    def matches(self, row: Mapping[str, Any], columns: Columns) -> bool:
        return False  # token ids are right for one tokenizer only, so the spec must say that the rows are token ids

    def read(self, row: Mapping[str, Any], options: ReadOptions) -> TokenSequence:
        ids = _as_integers(required_value(TOKENS_COLUMN, row, options.columns), "input_ids")
        if not ids or min(ids) < 0:
            raise RowError("DatasetRowInvalid", "`input_ids` is empty or has a negative number", "write the ids of the row's tokens")
        if any(flag != 1 for flag in _read_integer_column(row, ATTENTION_COLUMN, len(ids)) or ()):
            raise RowError(
                "DatasetRowInvalid", f"`{ATTENTION_COLUMN}` is not 1 for every token, so the row is padded",
                "write the tokens without padding; the trainer pads or packs the rows itself",
            )  # fmt: skip
        labels = _read_integer_column(row, LABELS_COLUMN, len(ids))
        if labels is None:
            masks = (_read_integer_column(row, name, len(ids)) for name in MASK_COLUMNS)
            mask = next((candidate_mask for candidate_mask in masks if candidate_mask is not None), [1] * len(ids))
            if not set(mask) <= {0, 1}:
                raise RowError("DatasetRowInvalid", f"`{'` or `'.join(MASK_COLUMNS)}` has other numbers than 0 and 1", "write 1 for each trained token, else 0")
            return TokenSequence(ids, tuple(token if flag else IGNORED_LABEL for token, flag in zip(ids, mask, strict=True)))
        for position, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (token, IGNORED_LABEL):
                raise RowError(
                    "DatasetRowInvalid", f"the label at position {position} is {label}, but the token there is {token}",
                    f"write the token itself as its label, or {IGNORED_LABEL}; do not shift the labels, the model does it",
                )  # fmt: skip
        return TokenSequence(ids, labels)


def _read_integer_column(row: Mapping[str, Any], name: str, token_count: int) -> tuple[int, ...] | None:
    """Return the integers of a column, one for each token; None if the row has no such column. Errors: RowError DatasetRowInvalid."""
    if row.get(name) is None:
        return None
    values = _as_integers(row[name], name)
    if len(values) != token_count:
        raise RowError("DatasetRowInvalid", f"`{name}` has {len(values)} numbers, but `input_ids` has {token_count}", "write one number for each token")
    return values


def _as_integers(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise RowError("DatasetRowInvalid", f"column `{name}` is not a list of integers", "write one integer for each token")
    return tuple(map(int, value))
