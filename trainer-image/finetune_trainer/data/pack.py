"""Stage 7, pack: put several rows into one sequence with best-fit decreasing bin packing over all rows.

The longest row is placed first. Each row goes into the fullest bin that still has enough space; a bin holds `bin_capacity` tokens.
Position ids restart at 0 in each row of a sequence, so that the tokens of a row do not attend to another row. A row in a sequence is called a document.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.shards import ColumnType, ShardReader, batch_ranges, make_schema

if TYPE_CHECKING:
    import numpy
    import pyarrow

PACKED_COLUMNS = {"input_ids": ColumnType.TOKENS, "labels": ColumnType.TOKENS, "seq_lengths": ColumnType.TOKENS}
"""Columns of packed sequences. `seq_lengths` contains the number of tokens of each document in the sequence."""


def pack(row_lengths: Sequence[int], bin_capacity: int) -> list[list[int]]:
    """Return the row indices of each bin, in a deterministic order. No row may be longer than `bin_capacity`.

    Cost: O(n log n) time for n rows, and O(bin_capacity) additional memory.
    """
    bins_by_space: dict[int, list[int]] = {}
    free_spaces: list[int] = []
    """The keys of `bins_by_space`, sorted."""
    bins: list[list[int]] = []
    for row_index in sorted(range(len(row_lengths)), key=lambda row_index: (-row_lengths[row_index], row_index)):
        length = row_lengths[row_index]
        space_index = bisect_left(free_spaces, length)
        if space_index == len(free_spaces):
            bins.append([row_index])
            remaining_space, bin_index = bin_capacity - length, len(bins) - 1
        else:
            space = free_spaces[space_index]
            bin_index = bins_by_space[space].pop()
            if not bins_by_space[space]:
                del bins_by_space[space]
                free_spaces.pop(space_index)
            bins[bin_index].append(row_index)
            remaining_space = space - length
        if remaining_space > 0:
            if remaining_space not in bins_by_space:
                insort(free_spaces, remaining_space)
            bins_by_space.setdefault(remaining_space, []).append(bin_index)
    return bins


def padding_share(token_count: int, bin_count: int, bin_capacity: int) -> float:
    """Return the share of unused positions, from 0 to 1, if `token_count` tokens are packed into `bin_count` bins."""
    return 1 - token_count / (bin_count * bin_capacity) if bin_count else 0.0


def build_packed_batches(
    shards: ShardReader, positions: numpy.ndarray[Any, Any], lengths: numpy.ndarray[Any, Any], bins: Sequence[Sequence[int]], ignored_label: int
) -> Iterator[pyarrow.RecordBatch]:
    """Yield batches of packed sequences in the order of `bins`.

    `positions`, `lengths`: the position of each row in the shards, and its number of tokens. `bins`: the row indices of each sequence.
    The first token of a document gets the label `ignored_label`, because it must not be predicted from the preceding document.
    """
    import numpy
    import pyarrow

    bin_lengths = numpy.array([sum(lengths[row] for row in rows) for rows in bins])
    for start, end in batch_ranges(bin_lengths):
        rows = numpy.array([row for rows in bins[start:end] for row in rows])
        batch = shards.read_batch(positions[rows])
        labels = batch.column("labels").flatten().to_numpy().copy()
        labels[numpy.cumsum(lengths[rows]) - lengths[rows]] = ignored_label
        bin_offsets = pyarrow.array(numpy.append(0, numpy.cumsum(bin_lengths[start:end])), pyarrow.int32())
        document_offsets = pyarrow.array(numpy.cumsum([0, *map(len, bins[start:end])]), pyarrow.int32())
        columns = [
            pyarrow.ListArray.from_arrays(bin_offsets, batch.column("input_ids").flatten()),
            pyarrow.ListArray.from_arrays(bin_offsets, pyarrow.array(labels)),
            pyarrow.ListArray.from_arrays(document_offsets, pyarrow.array(lengths[rows], pyarrow.int32())),
        ]
        yield pyarrow.record_batch(columns, schema=make_schema(PACKED_COLUMNS))
