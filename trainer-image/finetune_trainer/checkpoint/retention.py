"""Which checkpoints may go. Pure: from what is committed to what is removed.

While a run goes on, the newest two healthy ones always stay, whatever `keep` says; the best and the pinned come on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SAFE = 2
"""Healthy checkpoints that are never removed while the run goes on."""


@dataclass(frozen=True)
class Kept:
    """A committed checkpoint, as far as retention cares."""

    step: int
    healthy: bool
    eval_loss: float | None = None


def best_of(checkpoints: Iterable[Kept]) -> int | None:
    """Step with the lowest validation loss (the earlier of equals), or None without any."""
    judged = [(one.eval_loss, one.step) for one in checkpoints if one.eval_loss is not None]
    return min(judged)[1] if judged else None


def removable(
    checkpoints: Sequence[Kept], keep: int, *, pinned: Iterable[int] = (), finished: bool = False
) -> list[int]:
    """Steps that may be removed, oldest first. `keep` 0 keeps all; `finished` lifts the rule of the newest two."""
    if keep == 0:
        return []
    steps = sorted((one.step for one in checkpoints), reverse=True)
    stay = set(steps[:keep]) | set(pinned)
    if (best := best_of(checkpoints)) is not None:
        stay.add(best)
    if not finished:
        stay |= set(steps[:1])
        stay |= set(sorted((one.step for one in checkpoints if one.healthy), reverse=True)[:SAFE])
    return sorted(step for step in steps if step not in stay)
