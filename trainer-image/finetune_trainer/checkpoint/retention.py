"""Which committed checkpoints to remove. Pure.

While a run goes on, the two newest healthy ones always stay, whatever `keep` says. The best and the pinned ones are kept in
addition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_HEALTHY = 2
"""Healthy checkpoints that are never removed while the run goes on."""


@dataclass(frozen=True)
class Kept:
    """What retention needs to know about a committed checkpoint."""

    step: int
    healthy: bool
    eval_loss: float | None = None


def best_step(checkpoints: Iterable[Kept]) -> int | None:
    """Step with the lowest validation loss (the earlier of equals); None if none was evaluated."""
    evaluated = [(one.eval_loss, one.step) for one in checkpoints if one.eval_loss is not None]
    return min(evaluated)[1] if evaluated else None


def steps_to_remove(
    checkpoints: Sequence[Kept], keep: int, *, pinned: Iterable[int] = (), finished: bool = False
) -> list[int]:
    """Steps to remove, oldest first. `keep` 0 keeps all; `finished` lifts the rule of the two newest healthy ones."""
    if keep == 0:
        return []
    steps = sorted((one.step for one in checkpoints), reverse=True)
    stay = set(steps[:keep]) | set(pinned)
    if (best := best_step(checkpoints)) is not None:
        stay.add(best)
    if not finished:
        stay |= set(steps[:1])
        stay |= set(sorted((one.step for one in checkpoints if one.healthy), reverse=True)[:MIN_HEALTHY])
    return sorted(step for step in steps if step not in stay)
