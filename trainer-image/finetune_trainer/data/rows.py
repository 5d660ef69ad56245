"""What travels through the data room: raw rows in, typed examples out, and the one error a row can have.

Nothing here, nor in `read`, `detect`, `normalise`, `oasst`, `split` and `checks`, imports torch or transformers: the
supervisor checks every row before a rank has finished importing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as it stood in a file. `number` counts from 1: the line of a JSONL or text file, else the record."""

    file: Path
    number: int
    value: Mapping[str, Any]

    @property
    def place(self) -> str:
        """`train.jsonl, row 17`."""
        return f"{self.file.name}, row {self.number}"


class RowError(Exception):
    """A row that cannot be used: a code word, what was found, and what to write instead."""

    def __init__(self, code: str, found: str, write: str):
        super().__init__(found)
        self.code, self.found, self.write = code, found, write


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `weight` 0 keeps it out of the loss. `extra` holds tool calls and names, as templates want them."""

    role: str
    content: str
    weight: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """As a chat template reads it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, with the words that stand before question and answer where no chat template is used."""

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()
    words: tuple[str, str] = ("User", "Assistant")
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the row: rewards and multiple-choice metrics read them."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token is learned."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what follows it, joined as they are."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Preference:
    """One prompt, a better and a worse answer. Turns all three, or text all three."""

    prompt: tuple[Turn, ...] | str
    chosen: tuple[Turn, ...] | str
    rejected: tuple[Turn, ...] | str


@dataclass(frozen=True, slots=True)
class Judged:
    """One prompt, one answer, and whether it was wanted (unpaired preference)."""

    prompt: tuple[Turn, ...] | str
    completion: tuple[Turn, ...] | str
    label: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt to be answered by the model itself, and the row's other columns for the rewards."""

    prompt: tuple[Turn, ...] | str
    columns: Mapping[str, Any]


Example = Conversation | Text | Completion | Preference | Judged | Prompt
