"""Stage 7, pack: best-fit decreasing, over all rows at once.

Rows are put into bins of `capacity` tokens: longest first, each into the fullest bin that still has room. Documents stay
apart in attention by their positions, which begin at 0 again in each (`lengths` says where).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the rows in each bin, in a fixed order. A row longer than `capacity` must not be given.

    Cost: O(n log n) for n rows, plus O(capacity) memory.
    """
    room: dict[int, list[int]] = {}
    rooms: list[int] = []
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        length = lengths[row]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            bins.append([row])
            left, target = capacity - length, len(bins) - 1
        else:
            space = rooms[place]
            target = room[space].pop()
            if not room[space]:
                del room[space]
                rooms.pop(place)
            bins[target].append(row)
            left = space - length
        if left > 0:
            if left not in room:
                insort(rooms, left)
            room.setdefault(left, []).append(target)
    return bins


def padding_share(lengths: Sequence[int], bins: int, capacity: int) -> float:
    """Fraction of all places in `bins` full-length sequences that hold no token."""
    return 1 - sum(lengths) / (bins * capacity) if bins else 0.0
