"""The results of encoding a batch of rows: an Arrow batch with the rows to store, and the outcome of each row."""

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


class RowOutcome(IntEnum):
    """Whether a row is kept after encoding and, if it is left out, why."""

    KEPT = 0
    CUT = 1
    """The row is kept, but cut to fewer tokens."""
    TOO_LONG = 2
    """The row is left out because it has too many tokens."""
    ANSWERLESS = 3
    """The row is left out because its whole answer was cut off."""
    EQUAL_ANSWERS = 4
    """The row is left out because its two answers are equal."""
    REJECTED = 5
    """The row is left out because it cannot be rendered or trained on."""


class RejectedRow(NamedTuple):
    """A row that cannot be rendered or trained on: its location and the fields of its RowError."""

    location: str
    code: str
    message: str
    hint: str

    @staticmethod
    def of(location: str, error: RowError) -> RejectedRow:
        """Return the rejected row for this location and error."""
        return RejectedRow(location, error.code, error.message, error.hint)


@dataclass(frozen=True)
class EncodedBatch:
    """The rows of one batch after encoding, and the outcome of each row. The arrays have one item for each row."""

    kept_rows: pyarrow.RecordBatch
    """The rows with outcome `KEPT` or `CUT`."""
    outcomes: array[int]
    lengths: array[int]
    """Number of tokens of each row."""
    trained_counts: array[int]
    """For each row, the number of tokens that are trained on; 0 if the objective does not count these tokens."""
    rejected: dict[int, RejectedRow]
    """The rejected rows, by their index in the batch."""


@dataclass
class BatchBuilder:
    """Collects the results of a batch, one row after the other."""

    columns: Columns
    _values: dict[str, list[Any]] = field(default_factory=dict)
    _outcomes: array[int] = field(default_factory=lambda: array("b"))
    _lengths: array[int] = field(default_factory=lambda: array("i"))
    _trained_counts: array[int] = field(default_factory=lambda: array("i"))
    _rejected: dict[int, RejectedRow] = field(default_factory=dict)

    def keep(self, outcome: RowOutcome, length: int, trained_count: int = 0, **values: Any) -> None:
        """Add a row to store. `length`: the row's number of tokens. `values`: the row's value for each column."""
        for name in self.columns:
            self._values.setdefault(name, []).append(values[name])
        self._add(outcome, length, trained_count)

    def leave_out(self, outcome: RowOutcome, length: int = 0) -> None:
        """Record the outcome of a row that is not stored."""
        self._add(outcome, length, 0)

    def reject(self, row: RejectedRow) -> None:
        """Record a row that is not stored because of an error."""
        self._rejected[len(self._outcomes)] = row
        self._add(RowOutcome.REJECTED, 0, 0)

    def build(self) -> EncodedBatch:
        """Return the results of all rows so far."""
        kept_rows = make_batch(self.columns, {name: self._values.get(name, ()) for name in self.columns})
        return EncodedBatch(kept_rows, self._outcomes, self._lengths, self._trained_counts, self._rejected)

    def _add(self, outcome: RowOutcome, length: int, trained_count: int) -> None:
        self._outcomes.append(outcome)
        self._lengths.append(length)
        self._trained_counts.append(trained_count)


class BatchEncoder(Protocol):
    """A callable that encodes a batch of rows. The encoder must be picklable, because worker processes receive a copy of it."""

    def __call__(self, rows: Sequence[tuple[str, Example]]) -> EncodedBatch:
        """Encode the rows (location, example)."""
