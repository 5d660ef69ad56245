"""Encodes all rows of a run and stores them in shards, in reading order. Only a few numbers for each row stay in memory.

Every row is encoded and stored once, even if a mixture repeats it. Each split then selects its stored rows by their positions.
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

from finetune_trainer.data.batches import BatchEncoder, EncodedBatch, RejectedRow, RowOutcome
from finetune_trainer.data.load import DataSummary, RowReader
from finetune_trainer.data.parallel import count_usable_cpus, encode_rows
from finetune_trainer.data.rows import Example
from finetune_trainer.data.shards import ShardReader, ShardWriter
from finetune_trainer.inputs import Inputs

IntegerArray = numpy.ndarray[Any, Any]
"""An array of integers."""


@dataclass
class RowFacts:
    """The outcome and the token counts of each row that was read, in ten bytes per row. The arrays have one item for each row, in reading order."""

    outcomes: array[int] = field(default_factory=lambda: array("b"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """Number of tokens."""
    trained_counts: array[int] = field(default_factory=lambda: array("i"))
    """Number of trained tokens of each row."""
    is_joined: array[int] = field(default_factory=lambda: array("b"))
    """For each row, whether prompt and answer are joined without a chat template."""
    rejected: dict[int, RejectedRow] = field(default_factory=dict)
    """The rejected rows by row number."""

    def add(self, batch: EncodedBatch) -> None:
        """Append the facts about the rows of the next batch."""
        self.rejected.update({len(self.outcomes) + index: row for index, row in batch.rejected.items()})
        self.outcomes += batch.outcomes
        self.lengths += batch.lengths
        self.trained_counts += batch.trained_counts


@dataclass(frozen=True)
class EncodedSplit:
    """The encoded rows of one split. The arrays have one item for each row of the split, even for rows that are left out."""

    name: str
    outcomes: IntegerArray
    lengths: IntegerArray
    """Number of tokens of each row."""
    trained_counts: IntegerArray
    """Number of trained tokens of each row."""
    positions: IntegerArray
    """Position of each row in the shards. Positions of rows that are left out are meaningless."""
    has_joined_rows: bool
    """Whether prompt and answer of at least one row are joined without a chat template."""
    rejected: list[RejectedRow]

    def __len__(self) -> int:
        return len(self.outcomes)

    def count(self, outcome: RowOutcome) -> int:
        """Return the number of rows with this outcome."""
        return int((self.outcomes == outcome).sum())

    @property
    def kept_mask(self) -> IntegerArray:
        """For each row, whether it is kept."""
        return self.outcomes <= RowOutcome.CUT


@dataclass(frozen=True)
class EncodedRows:
    """The encoded rows of all splits, and the shards that hold them."""

    summary: DataSummary
    splits: list[EncodedSplit]
    """The splits that have rows: train, validation, test."""
    shards: ShardReader


@contextmanager
def encode_sources(
    run: RunConfig, inputs: Inputs, make_encoder: Callable[[DataSummary], BatchEncoder], folder: Path, *,
    joins_answer: Callable[[Example], bool], count_rows: Callable[[int], None], rows_without_workers: int | None = None,
) -> Iterator[EncodedRows]:  # fmt: skip
    """Read, encode and store all rows. `folder` holds the shards until the context ends.

    `make_encoder` is called with a summary that contains the formats of the rows. `joins_answer`: whether prompt and answer of a row are joined without a
    chat template. `count_rows` is called with the number of rows of each batch. `rows_without_workers`: see `encode_rows`.
    Errors: the errors of `load` and of the encoder; DataError for the first rejected row, unless bad rows are skipped.
    """
    reader, facts = RowReader(run, inputs), RowFacts()
    reader.detect_formats()

    def rows() -> Iterator[tuple[str, Example]]:
        for raw_row, example in reader.rows():
            facts.is_joined.append(joins_answer(example))
            yield raw_row.location, example

    process_count = run.spec.dataset.num_proc or count_usable_cpus()
    try:
        with ShardWriter(folder, "rows", is_hashed=False) as writer:
            for batch in encode_rows(rows(), make_encoder(reader.summary), processes=process_count, rows_without_workers=rows_without_workers):
                if batch.rejected and not skips_bad_rows(run):
                    raise bad_row_error(next(iter(batch.rejected.values())))
                facts.add(batch)
                count_rows(len(batch.outcomes))
                if batch.kept_rows.num_rows:
                    writer.add(batch.kept_rows)
        splits = [_select_split(name, numpy.asarray(row_numbers), facts) for name, row_numbers in reader.splits().items() if row_numbers]
        yield EncodedRows(reader.summary, splits, ShardReader(folder, writer.files))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _select_split(name: str, row_numbers: IntegerArray, facts: RowFacts) -> EncodedSplit:
    """Return the split that consists of the rows `row_numbers`. Rows are numbered from 0 in reading order."""
    outcomes, lengths, trained_counts, is_joined = map(
        numpy.asarray, (facts.outcomes, facts.lengths, facts.trained_counts, facts.is_joined)
    )
    positions_in_shards = numpy.cumsum(outcomes <= RowOutcome.CUT) - 1
    rejected_rows = [facts.rejected[number] for number in row_numbers[outcomes[row_numbers] == RowOutcome.REJECTED].tolist()]
    return EncodedSplit(
        name, outcomes[row_numbers], lengths[row_numbers], trained_counts[row_numbers], positions_in_shards[row_numbers],
        bool(is_joined[row_numbers].any()), rejected_rows,
    )  # fmt: skip


def skips_bad_rows(run: RunConfig) -> bool:
    """Whether bad rows are left out. If they are not left out, the first bad row ends the job."""
    return run.spec.dataset.bad_rows is BadRows.SKIP


def bad_row_error(row: RejectedRow) -> DataError:
    """Return the error that ends a job because a row cannot be rendered or tokenised."""
    return DataError(row.code, f"{row.location}: {row.message}", hint=f"{row.hint}; or `dataset.badRows: skip` to leave such rows out")


def require_few_bad_rows(run: RunConfig, rejected_rows: Sequence[RejectedRow], row_count: int, split: str) -> list[str]:
    """Return a note about the rejected rows of a split with `row_count` rows; an empty list if no row is rejected.

    Errors: DataError with the code of the first rejected row if bad rows are not skipped; TooManyBadRows if their share is above
    `dataset.maxBadRowRatio`.
    """
    if not rejected_rows:
        return []
    first_rejected_row = rejected_rows[0]
    if not skips_bad_rows(run):
        raise bad_row_error(first_rejected_row)
    max_ratio = value_or_default(run.spec.dataset, "max_bad_row_ratio")
    if len(rejected_rows) > max_ratio * row_count:
        raise DataError(
            "TooManyBadRows", f"{len(rejected_rows)} of {row_count} rows cannot be used, more than {max_ratio:.1%}; the first: "
            f"{first_rejected_row.location}: {first_rejected_row.message}",
            hint=f"{first_rejected_row.hint}; or raise dataset.maxBadRowRatio",
        )  # fmt: skip
    return [f"{split}: {len(rejected_rows)} rows were left out; the first: {first_rejected_row.location}: {first_rejected_row.message}"]
