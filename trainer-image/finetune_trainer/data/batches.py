"""The results of encoding a batch of rows: the rows to store as an Arrow batch, and what became of each row."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from finetune_trainer.data.rows import Example, RowError
from finetune_trainer.data.shards import Columns, make_batch

if TYPE_CHECKING:
    import pyarrow


class Outcome(IntEnum):
    """What became of a row."""

    KEPT = 0
    CUT = 1
    """Kept, with fewer tokens."""
    TOO_LONG = 2
    """Left out because it has too many tokens."""
    ANSWERLESS = 3
    """Left out because its whole answer was cut off."""
    SAME = 4
    """Left out because its two answers are equal."""
    REJECTED = 5
    """Left out because it cannot be rendered or trained on."""


class RejectedRow(NamedTuple):
    """A row that cannot be rendered or trained on: its location and the fields of its RowError."""

    location: str
    code: str
    message: str
    hint: str

    @staticmethod
    def of(location: str, error: RowError) -> RejectedRow:
        """The row at the location, with its error."""
        return RejectedRow(location, error.code, error.message, error.hint)


@dataclass(frozen=True)
class EncodedBatch:
    """The results for a batch of rows. The arrays have one item for each row."""

    kept_rows: pyarrow.RecordBatch
    """The rows with outcome `KEPT` or `CUT`."""
    outcomes: array[int]
    lengths: array[int]
    """Tokens of each row."""
    trained: array[int]
    """Tokens with a label of each row; 0 if the objective does not count them."""
    rejected: dict[int, RejectedRow]
    """The rejected rows, by their index in the batch."""


@dataclass
class BatchBuilder:
    """Collects the results of one batch."""

    columns: Columns
    _values: dict[str, list[Any]] = field(default_factory=dict)
    _outcomes: array[int] = field(default_factory=lambda: array("b"))
    _lengths: array[int] = field(default_factory=lambda: array("i"))
    _trained: array[int] = field(default_factory=lambda: array("i"))
    _rejected: dict[int, RejectedRow] = field(default_factory=dict)

    def keep(self, outcome: Outcome, length: int, trained: int = 0, **values: Any) -> None:
        """Store a row with these values of its columns."""
        for name in self.columns:
            self._values.setdefault(name, []).append(values[name])
        self._add(outcome, length, trained)

    def leave_out(self, outcome: Outcome, length: int = 0) -> None:
        """Count a row that is not stored."""
        self._add(outcome, length, 0)

    def reject(self, row: RejectedRow) -> None:
        """Leave out a row because of an error."""
        self._rejected[len(self._outcomes)] = row
        self._add(Outcome.REJECTED, 0, 0)

    def build(self) -> EncodedBatch:
        """The results of all rows so far."""
        kept_rows = make_batch(self.columns, {name: self._values.get(name, ()) for name in self.columns})
        return EncodedBatch(kept_rows, self._outcomes, self._lengths, self._trained, self._rejected)

    def _add(self, outcome: Outcome, length: int, trained: int) -> None:
        self._outcomes.append(outcome)
        self._lengths.append(length)
        self._trained.append(trained)


class BatchEncoder(Protocol):
    """A function that a worker process applies to a batch of rows. It is pickled, together with its data."""

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> EncodedBatch:
        """Encode the rows (location, example)."""
