"""Stage 7, pack: put several rows into one sequence with best-fit decreasing bin packing over all rows.

The longest row is placed first. Each row goes into the fullest bin that still has enough space; a bin holds `capacity` tokens.
Position ids restart at 0 in each document of a sequence. This prevents attention between the documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.shards import ColumnType, ShardReader, chunks, make_schema

if TYPE_CHECKING:
    import numpy
    import pyarrow

PACKED_COLUMNS = {"input_ids": ColumnType.TOKENS, "labels": ColumnType.TOKENS, "seq_lengths": ColumnType.TOKENS}
"""Columns of packed sequences. `seq_lengths`: lengths of the documents in the sequence."""


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the row indices of each bin, in a deterministic order. No row may be longer than `capacity`.

    Cost: O(n log n) time for n rows, and O(capacity) additional memory.
    """
    bins_by_space: dict[int, list[int]] = {}
    free_spaces: list[int] = []
    """The keys of `bins_by_space`, sorted."""
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        at = bisect_left(free_spaces, length)
        if at == len(free_spaces):
            bins.append([row])
            remaining_space, target = capacity - length, len(bins) - 1
        else:
            space = free_spaces[at]
            target = bins_by_space[space].pop()
            if not bins_by_space[space]:
                del bins_by_space[space]
                free_spaces.pop(at)
            bins[target].append(row)
            remaining_space = space - length
        if remaining_space > 0:
            if remaining_space not in bins_by_space:
                insort(free_spaces, remaining_space)
            bins_by_space.setdefault(remaining_space, []).append(target)
    return bins


def padding_share(tokens: int, bins: int, capacity: int) -> float:
    """Share of positions without a token among all positions of `bins` sequences of length `capacity`."""
    return 1 - tokens / (bins * capacity) if bins else 0.0


def packed_batches(
    shards: ShardReader, positions: numpy.ndarray[Any, Any], lengths: numpy.ndarray[Any, Any], bins: Sequence[Sequence[int]], ignored_label: int
) -> Iterator[pyarrow.RecordBatch]:
    """Yield the packed sequences in the order of `bins`. `positions`, `lengths`: of each row in the shards.

    The first token of a document gets the label `ignored_label`, because it must not be predicted from the preceding document.
    """
    import numpy
    import pyarrow

    bin_lengths = numpy.array([sum(lengths[row] for row in rows) for rows in bins])
    for start, end in chunks(bin_lengths):
        rows = numpy.array([row for rows in bins[start:end] for row in rows])
        batch = shards.read_batch(positions[rows])
        labels = batch.column("labels").flatten().to_numpy().copy()
        labels[numpy.cumsum(lengths[rows]) - lengths[rows]] = ignored_label
        ends = pyarrow.array(numpy.append(0, numpy.cumsum(bin_lengths[start:end])), pyarrow.int32())
        document_ends = pyarrow.array(numpy.cumsum([0, *map(len, bins[start:end])]), pyarrow.int32())
        columns = [
            pyarrow.ListArray.from_arrays(ends, batch.column("input_ids").flatten()),
            pyarrow.ListArray.from_arrays(ends, pyarrow.array(labels)),
            pyarrow.ListArray.from_arrays(document_ends, pyarrow.array(lengths[rows], pyarrow.int32())),
        ]
        yield pyarrow.record_batch(columns, schema=make_schema(PACKED_COLUMNS))
