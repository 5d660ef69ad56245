"""The values that the data stages exchange: raw rows, typed examples, and the error of one row.

This module and `read`, `detect`, `columns`, `formats`, `split`, `checks` and `load` import neither torch nor transformers, which
take seconds to import. The supervisor has thus checked every row before the ranks have finished their imports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a data file. `number` counts from 1: the line of a JSONL or text file, else the record."""

    file: Path
    number: int
    value: Mapping[str, Any]

    @property
    def location(self) -> str:
        """For messages: `train.jsonl, row 17`."""
        return f"{self.file.name}, row {self.number}"


class RowError(Exception):
    """The error of a row that cannot be used: its code, the problem, and the correction."""

    def __init__(self, code: str, message: str, hint: str):
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. With `weight` 0, its tokens are not part of the loss. `extra` has tool calls and names for chat templates."""

    role: str
    content: str
    weight: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and the names of user and assistant for rendering without a chat template (`Question: ...`)."""

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()
    role_names: tuple[str, str] = ("User", "Assistant")
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the row, for rewards and multiple-choice metrics."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text. Every token is trained on."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and the text that continues it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt with a better and a worse answer: all three are turns, or all three are text."""

    prompt: tuple[Turn, ...] | str
    chosen: tuple[Turn, ...] | str
    rejected: tuple[Turn, ...] | str


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """One prompt with one answer, and whether the answer is good (unpaired preference)."""

    prompt: tuple[Turn, ...] | str
    completion: tuple[Turn, ...] | str
    label: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that the model itself answers, and the row's other columns for the rewards."""

    prompt: tuple[Turn, ...] | str
    columns: Mapping[str, Any]


Example = Conversation | Text | Completion | Preference | LabelledAnswer | Prompt
