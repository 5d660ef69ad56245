"""Ticks are round, numbers are short, and long series keep their extremes."""

from __future__ import annotations

import math

import pytest
from finetune_trainer.report.scale import compute_ticks, format_number, reduce_points, split_into_segments
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1.8, 6.2, [2, 3, 4, 5, 6]), (0, 0.0002, [0, 0.00005, 0.0001, 0.00015, 0.0002]),
        (-3, 3, [-2, 0, 2]), (0, 12_400, [0, 2500, 5000, 7500, 10_000]),
    ],
)  # fmt: skip
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, ticks: list[float]) -> None:
    assert compute_ticks(low, high) == pytest.approx(ticks)


def test_ticks_of_steps_are_whole_numbers() -> None:
    assert compute_ticks(1, 4, whole_numbers_only=True) == [1, 2, 3, 4]


def test_an_empty_range_has_no_ticks() -> None:
    with pytest.raises(ValueError, match=r"from 1\.0 to 1\.0 is empty"):
        compute_ticks(1.0, 1.0)


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e9))
def test_ticks_lie_within_every_range(low: float, width: float) -> None:
    high = low + width
    ticks = compute_ticks(low, high)
    assert len(ticks) <= 7 and all(low - width * 1e-6 <= tick <= high + width * 1e-6 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.03125, "0.03125"), (1.23456, "1.235"), (2e-4, "0.0002"), (6.5612e-7, "6.56e-07"), (9999, "9999"), (12_345, "12.35k"),
        (3.2e6, "3.2M"), (7e9, "7G"), (-15_000, "-15k"), (12.5, "12.5"),
    ],
)  # fmt: skip
def test_numbers_have_at_most_four_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text


def test_a_missing_value_splits_the_line() -> None:
    points = [(1.0, 2.0), (2.0, None), (3.0, 4.0), (4.0, 5.0), (5.0, math.nan)]
    assert split_into_segments(points) == [[(1.0, 2.0)], [(3.0, 4.0), (4.0, 5.0)]]
    assert split_into_segments([(1.0, None)]) == []


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=600), st.integers(4, 60))
def test_reduced_points_keep_ends_and_extremes(values: list[float], limit: int) -> None:
    points = [(float(number), value) for number, value in enumerate(values)]
    reduced_points = reduce_points(points, limit)
    assert len(reduced_points) <= max(limit, 4) and reduced_points == sorted(reduced_points) and set(reduced_points) <= set(points)
    assert (reduced_points[0], reduced_points[-1]) == (points[0], points[-1])
    assert {min(y for _, y in reduced_points), max(y for _, y in reduced_points)} == {min(values), max(values)}


def test_short_series_are_kept_whole() -> None:
    points = [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)]
    assert reduce_points(points, 3) == points
