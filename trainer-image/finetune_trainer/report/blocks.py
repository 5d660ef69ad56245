"""The building blocks of the page. The template has one macro for each kind of block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune_trainer.report.chart import Drawing


@dataclass(frozen=True)
class Cell:
    """A value of a table. `kind`: `text`, `number`, `code` (hashes, names of fields, addresses), `missing`, `good` or `bad`."""

    text: str
    kind: str = "text"


def make_missing_cell(reason: str, label: str = "not measured") -> Cell:
    """Return the cell of a value that is missing. `label`: the first words of the cell's text."""
    return Cell(f"{label}: {reason}", "missing")


@dataclass(frozen=True)
class Table:
    """A table of the page. The first cell of each row names the row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    is_narrow: bool = False
    """Whether the table fits beside another narrow table."""
    is_folded: bool = False
    """Whether the table is closed, so that only its caption is visible until the reader clicks on the caption."""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class ChartGrid:
    """Charts side by side. For a chart without values, only its title and the reason why it has no values are shown."""

    drawings: Sequence[Drawing]
    missing_charts: Sequence[tuple[str, str]]
    """Title and reason of each chart that has no values."""
    kind: str = field(default="charts", init=False)


@dataclass(frozen=True)
class AnsweredPrompt:
    """One prompt, and the answers to it."""

    title: str
    prompt: str
    answers: Sequence[tuple[str, str, str]]
    """Name of the model, text of its answer, and mark: `good` or `bad` if the answer can be judged, else empty."""


@dataclass(frozen=True)
class Answers:
    """Prompts, each with the answers to it side by side."""

    caption: str
    items: Sequence[AnsweredPrompt]
    note: str = ""
    kind: str = field(default="answers", init=False)


@dataclass(frozen=True)
class Sentences:
    """A list of sentences."""

    items: Sequence[str]
    kind: str = field(default="sentences", init=False)


Block = Table | ChartGrid | Answers | Sentences


@dataclass(frozen=True)
class Section:
    """A section of the page, with a link to it in the navigation."""

    id: str
    title: str
    blocks: Sequence[Block]
    introduction: str = ""


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page. `mark`: `good`, `bad` or empty."""

    name: str
    value: str
    detail: str = ""
    mark: str = ""


@dataclass(frozen=True)
class RunOutcome:
    """How the run ended. `mark`: `good`, `bad` or `open`."""

    badge: str
    mark: str
    sentence: str
    hint: str = ""
