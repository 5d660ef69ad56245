"""The value of a metric, or the reason why it could not be computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class NotComputedError(Exception):
    """A score could not be computed. The message gives the reason, and contains no secrets."""


@dataclass(frozen=True)
class MetricValue:
    """One metric of an evaluation: its value, or the reason why it could not be computed.

    If a metric has both a value and a reason, the reason says which rows the value does not cover.
    """

    value: float | None
    reason: str | None = None
    rows: list[float | None] | None = None
    """The score of each row in row order; None for a row without a score. None instead of a list if the metric has no scores of single rows."""
    row_reasons: Mapping[int, str] = field(default_factory=dict)
    """Why a row has no score, by row index from 0."""

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("a metric without a value needs a reason")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a metric's value must be finite, but it is {self.value}")

    @classmethod
    def missing(cls, reason: str) -> MetricValue:
        """Return a metric without a value. `reason`: why the metric could not be computed."""
        return cls(None, reason)

    @property
    def scores(self) -> list[float]:
        """The scores of the rows that have a score, in row order."""
        return [score for score in self.rows or [] if score is not None]


def mean_of_rows(rows: Sequence[float | None], row_reasons: Mapping[int, str], *, reason: str | None = None) -> MetricValue:
    """Return the mean of the scored rows as a metric. `reason`: which rows are not scored. At least one row must have a score."""
    scores = [score for score in rows if score is not None]
    return MetricValue(math.fsum(scores) / len(scores), reason, list(rows), dict(row_reasons))
