"""The values that the data stages exchange: raw rows, typed examples, and the error of one row.

This module and `read`, `detect`, `columns`, `formats`, `split`, `checks` and `load` do not import torch or transformers, because
these imports take seconds. So the supervisor can check every row while the ranks still import the libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IGNORED_LABEL = -100
"""The label of a token that is not trained on, in torch and transformers."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a data file. `number`: line number in a JSONL or text file, else record number; both count from 1."""

    file: Path
    number: int
    value: Mapping[str, Any]

    @property
    def location(self) -> str:
        """File and row, as shown in error messages: `train.jsonl, row 17`."""
        return f"{self.file.name}, row {self.number}"


class RowError(Exception):
    """The error of a row that cannot be used: its code, the problem, and the correction."""

    def __init__(self, code: str, message: str, hint: str):
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


@dataclass(frozen=True, slots=True)
class GivenImage:
    """An image as it is written in a row: a path, an address, a data URI, bytes, or an object with one of these."""

    value: Any = None
    """None for a placeholder: the image itself is in the image column of the row."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A found image: the path of its file, or the file's content. Exactly one of the two fields is set."""

    path: Path | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. Tokens of a message with `weight` 0 are not part of the loss. `extra`: further fields, such as tool calls."""

    role: str
    content: str
    weight: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str | GivenImage | ImageFile, ...] = ()
    """Texts and images of a message with images, in order. If a message has images, `content` holds all its texts, joined. If it has no images,
    `parts` is empty."""

    def to_message(self, *, has_content_parts: bool = False) -> dict[str, Any]:
        """Return the message in the form that chat templates expect. `has_content_parts`: whether the template reads the content as a list of parts."""
        if not has_content_parts:
            return {"role": self.role, "content": self.content, **self.extra}
        parts = self.parts or ((self.content,) if self.content else ())
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        return {"role": self.role, "content": content, **self.extra}

    @property
    def images(self) -> list[ImageFile]:
        """The found images of the message."""
        return [part for part in self.parts if isinstance(part, ImageFile)]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation. `role_names`: what to write before user and assistant turns if no chat template is used, as in `Question: ...`."""

    turns: tuple[Turn, ...]
    tools: tuple[Any, ...] = ()
    role_names: tuple[str, str] = ("User", "Assistant")
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the row, for rewards and multiple-choice metrics."""


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
    """One prompt with a better and a worse answer. The prompt and both answers are either all turns or all text."""

    prompt: tuple[Turn, ...] | str
    chosen: tuple[Turn, ...] | str
    rejected: tuple[Turn, ...] | str


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """One prompt with one answer that is labelled good or bad (unpaired preference). `label`: whether the answer is good."""

    prompt: tuple[Turn, ...] | str
    completion: tuple[Turn, ...] | str
    label: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for which the model generates answers. `columns`: the row's other columns, for the rewards."""

    prompt: tuple[Turn, ...] | str
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """An already tokenised row. The label of a token is the token itself, or `IGNORED_LABEL` if the token is not trained on."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


Example = TokenSequence | Conversation | Text | Completion | Preference | LabelledAnswer | Prompt
