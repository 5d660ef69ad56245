"""Chooses ticks, formats numbers, and shortens long series for charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

NICE_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)
"""Allowed distances between two ticks. A distance may be multiplied by any power of ten."""
Point = tuple[float, float]


def compute_ticks(low: float, high: float, *, count: int = 6, whole_numbers_only: bool = False) -> list[float]:
    """Return at most `count` round numbers between `low` and `high`, as ticks of an axis. `whole_numbers_only`: whether all ticks must be whole numbers."""
    if not high > low:
        raise ValueError(f"the range from {low} to {high} is empty")
    rough_step = (high - low) / max(1, count - 1)
    power_of_ten = 10.0 ** math.floor(math.log10(rough_step))
    step = next(factor * power_of_ten for factor in NICE_STEPS if factor * power_of_ten >= rough_step * (1 - 1e-9))
    if whole_numbers_only:
        step = max(1.0, math.ceil(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def format_number(value: float) -> str:
    """Return a number with at most four significant digits, for example `0.0312`, `12.5k` or `2e-05`."""
    magnitude = abs(value)
    if value == 0:
        return "0"
    if magnitude < 1e-3:
        return f"{value:.3g}"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if magnitude >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.4g}{unit}"
    return f"{value:.4g}"


def split_into_segments(points: Sequence[tuple[float, float | None]]) -> list[list[Point]]:
    """Split a series at its missing values, so that a missing value becomes a gap in the line."""
    groups = groupby(points, key=lambda point: point[1] is not None and math.isfinite(point[1]))
    return [[(x, float(y)) for x, y in group if y is not None] for is_measured, group in groups if is_measured]


def reduce_points(points: Sequence[Point], limit: int) -> list[Point]:
    """Return about `limit` points or fewer: the first and the last point, and the lowest and highest point of each part. The parts have equal length."""
    if len(points) <= limit:
        return list(points)
    part_count = max(1, (limit - 2) // 2)
    kept_indices = {0, len(points) - 1}
    for part in range(part_count):
        indices = range(part * len(points) // part_count, (part + 1) * len(points) // part_count)
        kept_indices |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept_indices)]
