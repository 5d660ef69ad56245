"""Stage 7, pack: put several rows into one sequence with best-fit decreasing bin packing over all rows.

The longest row is placed first. Each row goes into the fullest bin that still has enough space; a bin holds `capacity` tokens.
Position ids restart at 0 in each document of a sequence. This prevents attention between the documents.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


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


def padding_share(lengths: Sequence[int], bins: int, capacity: int) -> float:
    """Return the share of positions without a token in `bins` sequences of length `capacity`."""
    return 1 - sum(lengths) / (bins * capacity) if bins else 0.0
