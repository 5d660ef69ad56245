"""Encodes all rows of a run and stores them in shards, in the order of reading. Only a few numbers for each row stay in memory.

Every row is encoded and stored once, also if a mixture repeats it. The splits then select the stored rows by their positions.
"""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from finetune_api.errors import DataError
from finetune_api.pod import RunConfig
from finetune_api.rules import value_or_default
from finetune_api.spec.enums import BadRows

from finetune_trainer.data.batches import BatchEncoder, EncodedBatch, Outcome, RejectedRow
from finetune_trainer.data.load import DataSummary, RowReader
from finetune_trainer.data.parallel import encode_rows, usable_cpus
from finetune_trainer.data.rows import Example
from finetune_trainer.data.shards import ShardReader, ShardWriter
from finetune_trainer.inputs import Inputs

Numbers = numpy.ndarray[Any, Any]
"""An array of integers."""


@dataclass
class RowFacts:
    """Facts about the rows, in the order of reading: ten bytes for each row."""

    outcomes: array[int] = field(default_factory=lambda: array("b"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    trained: array[int] = field(default_factory=lambda: array("i"))
    marks: array[int] = field(default_factory=lambda: array("b"))
    rejected: dict[int, RejectedRow] = field(default_factory=dict)

    def add(self, batch: EncodedBatch) -> None:
        """Append the facts of the next rows."""
        self.rejected.update({len(self.outcomes) + index: row for index, row in batch.rejected.items()})
        self.outcomes += batch.outcomes
        self.lengths += batch.lengths
        self.trained += batch.trained


@dataclass(frozen=True)
class EncodedSplit:
    """The rows of one split. The arrays have one item for each row of the split, also for rows that are left out."""

    name: str
    outcomes: Numbers
    lengths: Numbers
    trained: Numbers
    positions: Numbers
    """Position of each row in the shards; only valid for rows that are kept."""
    is_marked: bool
    """Whether a row is marked."""
    rejected: list[RejectedRow]

    def __len__(self) -> int:
        return len(self.outcomes)

    def count(self, outcome: Outcome) -> int:
        """Number of rows with this outcome."""
        return int((self.outcomes == outcome).sum())

    @property
    def is_kept(self) -> Numbers:
        """Whether each row is kept."""
        return self.outcomes <= Outcome.CUT


@dataclass(frozen=True)
class EncodedRows:
    """All rows of a run."""

    summary: DataSummary
    splits: list[EncodedSplit]
    """The splits that have rows: train, validation, test."""
    shards: ShardReader


@contextmanager
def encode_sources(
    run: RunConfig, inputs: Inputs, make_encoder: Callable[[DataSummary], BatchEncoder], folder: Path, *,
    is_marked: Callable[[Example], bool], count_rows: Callable[[int], None], rows_without_workers: int | None = None,
) -> Iterator[EncodedRows]:  # fmt: skip
    """Read, encode and store all rows. `folder` holds the shards until the context ends.

    `make_encoder` gets a summary with the formats of the rows. `is_marked`: whether a split with this row is marked. `count_rows` is
    called with the number of rows of each batch. `rows_without_workers`: see `encode_rows`.
    Errors: the errors of `load` and of the encoder; DataError for the first rejected row, unless bad rows are skipped.
    """
    reader, facts = RowReader(run, inputs), RowFacts()
    reader.detect_formats()

    def rows() -> Iterator[tuple[str, Example]]:
        for raw, example in reader.rows():
            facts.marks.append(is_marked(example))
            yield raw.location, example

    processes = run.spec.dataset.num_proc or usable_cpus()
    try:
        with ShardWriter(folder, "rows", is_hashed=False) as writer:
            for batch in encode_rows(rows(), make_encoder(reader.summary), processes=processes, rows_without_workers=rows_without_workers):
                if batch.rejected and not skips_bad_rows(run):
                    raise bad_row_error(next(iter(batch.rejected.values())))
                facts.add(batch)
                count_rows(len(batch.outcomes))
                if batch.kept_rows.num_rows:
                    writer.add(batch.kept_rows)
        splits = [_select(name, numpy.asarray(numbers), facts) for name, numbers in reader.splits().items() if numbers]
        yield EncodedRows(reader.summary, splits, ShardReader(folder, writer.files))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _select(name: str, numbers: Numbers, facts: RowFacts) -> EncodedSplit:
    """The rows of a split by their numbers."""
    outcomes, lengths, trained, marks = map(numpy.asarray, (facts.outcomes, facts.lengths, facts.trained, facts.marks))
    positions = numpy.cumsum(outcomes <= Outcome.CUT) - 1
    rejected = [facts.rejected[number] for number in numbers[outcomes[numbers] == Outcome.REJECTED].tolist()]
    return EncodedSplit(
        name, outcomes[numbers], lengths[numbers], trained[numbers], positions[numbers], bool(marks[numbers].any()), rejected
    )


def skips_bad_rows(run: RunConfig) -> bool:
    """Whether rows that cannot be used are left out. Otherwise the first of them ends the job."""
    return run.spec.dataset.bad_rows is BadRows.SKIP


def bad_row_error(row: RejectedRow) -> DataError:
    """Return the error that ends a job because of a row that can be read, but not rendered or tokenised."""
    return DataError(row.code, f"{row.location}: {row.message}", hint=f"{row.hint}; or `dataset.badRows: skip` to leave such rows out")


def require_few_bad_rows(run: RunConfig, rejected: Sequence[RejectedRow], rows: int, split: str) -> list[str]:
    """Return a sentence about the rejected rows of a split with `rows` rows; an empty list if there are none.

    Errors: DataError with the code of the first rejected row if bad rows are not skipped; TooManyBadRows above the allowed share.
    """
    if not rejected:
        return []
    first = rejected[0]
    if not skips_bad_rows(run):
        raise bad_row_error(first)
    limit = value_or_default(run.spec.dataset, "max_bad_row_ratio")
    if len(rejected) > limit * rows:
        raise DataError(
            "TooManyBadRows", f"{len(rejected)} of {rows} rows cannot be used, more than {limit:.1%}; the first: {first.location}: {first.message}",
            hint=f"{first.hint}; or raise dataset.maxBadRowRatio",
        )  # fmt: skip
    return [f"{split}: {len(rejected)} rows were left out; the first: {first.location}: {first.message}"]
