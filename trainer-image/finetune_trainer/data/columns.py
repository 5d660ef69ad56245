"""Which column holds what: the format's own names, the aliases other tools use, and what `dataset.columns` says.

A name given by the user is the only one tried. Otherwise the first known name that is there wins, exact spelling before
other capitals.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.spec.dataset import Columns
from finetune_api.spec.enums import DatasetFormat

from finetune_trainer.data.rows import RowError


@dataclass(frozen=True)
class Slot:
    """One meaning: the field of `dataset.columns` that names it, and the names tried without that field."""

    field: str
    names: tuple[str, ...]


SYSTEM = Slot("system", ("system", "system_prompt"))
TEXT = Slot("text", ("text", "content"))
MESSAGES = Slot("messages", ("messages", "conversations", "conversation"))
CHOSEN = Slot("chosen", ("chosen",))
REJECTED = Slot("rejected", ("rejected",))
LABEL = Slot("label", ("label",))
PROMPT = Slot("question", ("prompt", "question", "instruction", "query"))
INPUT = Slot("input", ("input", "context"))
PASSAGE = Slot("input", ("context", "passage"))
OPTIONS = Slot("options", ("options", "choices"))

QUESTION = {
    DatasetFormat.MESSAGES: Slot("question", ("question", "prompt")),
    DatasetFormat.INSTRUCTION: Slot("question", ("instruction", "prompt", "question")),
    DatasetFormat.ALPACA: Slot("question", ("instruction",)),
    DatasetFormat.QA: Slot("question", ("question", "query", "q", "prompt")),
    DatasetFormat.MCQ: Slot("question", ("question",)),
    DatasetFormat.PROMPT_COMPLETION: Slot("question", ("prompt", "instruction", "question")),
    DatasetFormat.PREFERENCE: PROMPT,
    DatasetFormat.UNPAIRED_PREFERENCE: PROMPT,
    DatasetFormat.PROMPT_ONLY: PROMPT,
}
ANSWER = {
    DatasetFormat.MESSAGES: Slot("answer", ("answer", "response")),
    DatasetFormat.INSTRUCTION: Slot("answer", ("response", "output", "completion", "answer")),
    DatasetFormat.ALPACA: Slot("answer", ("output", "response", "completion")),
    DatasetFormat.QA: Slot("answer", ("answer", "response", "a", "completion")),
    DatasetFormat.MCQ: Slot("answer", ("answer",)),
    DatasetFormat.PROMPT_COMPLETION: Slot("answer", ("completion", "response", "output", "answer")),
    DatasetFormat.UNPAIRED_PREFERENCE: Slot("answer", ("completion", "response", "answer")),
}


def pairs_instead(names: Collection[str], columns: Columns) -> bool:
    """Whether rows of format messages hold a question and an answer instead, in columns that the user names."""
    named = columns.question is not None or columns.answer is not None
    return named and column(MESSAGES, names, columns) is None


def column(slot: Slot, names: Collection[str], columns: Columns) -> str | None:
    """Name of the column that fills `slot` among `names`, or None."""
    given = getattr(columns, slot.field, None)
    if given is not None:
        return given if given in names else None
    for wanted in slot.names:
        if wanted in names:
            return wanted
    lower = {name.lower(): name for name in reversed(list(names))}
    return next((lower[wanted] for wanted in slot.names if wanted in lower), None)


def value(slot: Slot, row: Mapping[str, Any], columns: Columns) -> Any:
    """Content of that column, or None where it is absent or null."""
    name = column(slot, row.keys(), columns)
    return row[name] if name is not None else None


def required(slot: Slot, row: Mapping[str, Any], columns: Columns) -> Any:
    """The same, but it must be there. Errors: RowError ColumnMissing, which names what is there."""
    name = column(slot, row.keys(), columns)
    if name is None:
        raise missing(slot, row.keys(), columns)
    if row[name] is None:
        raise RowError("DatasetRowInvalid", f"column `{name}` is null", "give it a value, or remove the row")
    return row[name]


def missing(slot: Slot, names: Collection[str], columns: Columns) -> RowError:
    """The error for a slot that no column fills."""
    given = getattr(columns, slot.field, None)
    wanted = f"column `{given}` (dataset.columns.{slot.field})" if given else f"a column `{'` or `'.join(slot.names)}`"
    there = ", ".join(f"`{name}`" for name in names) or "no column at all"
    return RowError(
        "ColumnMissing",
        f"{wanted} is missing; there are {there}",
        f"name the right one in dataset.columns.{slot.field}",
    )


def required_text(slot: Slot, row: Mapping[str, Any], columns: Columns) -> str:
    """A column that must hold text. Numbers and booleans of CSV-like data are written out. Errors: RowError."""
    return as_text(required(slot, row, columns), column(slot, row.keys(), columns) or slot.names[0])


def optional_text(slot: Slot, row: Mapping[str, Any], columns: Columns) -> str | None:
    """A column that may hold text; blank counts as absent. Errors: RowError if it holds something else, or a named one is missing."""
    if getattr(columns, slot.field, None) is not None and column(slot, row.keys(), columns) is None:
        raise missing(slot, row.keys(), columns)
    found = value(slot, row, columns)
    if found is None:
        return None
    text = as_text(found, slot.names[0])
    return text if text.strip() else None


def as_text(found: Any, name: str) -> str:
    """Text of a scalar value. Errors: RowError for lists and objects."""
    if isinstance(found, str):
        return found
    if isinstance(found, bool | int | float):
        return str(found)
    raise RowError(
        "DatasetRowInvalid", f"column `{name}` holds {type(found).__name__} where text is expected", "write a string"
    )
