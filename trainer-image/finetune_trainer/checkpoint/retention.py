"""Chooses the committed checkpoints to remove, without side effects.

While a run continues, the two newest healthy checkpoints are never removed, even if `keep` is 1. The best checkpoint and the pinned
checkpoints are also kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_HEALTHY = 2
"""Number of newest healthy checkpoints that are never removed while the run continues."""


@dataclass(frozen=True)
class RetentionCandidate:
    """The facts about a committed checkpoint that decide whether it is kept."""

    step: int
    healthy: bool
    eval_loss: float | None = None


def best_step(checkpoints: Iterable[RetentionCandidate]) -> int | None:
    """Return the step with the lowest validation loss (if several are equal, the earliest), or None if no checkpoint has a loss."""
    evaluated = [(kept.eval_loss, kept.step) for kept in checkpoints if kept.eval_loss is not None]
    return min(evaluated)[1] if evaluated else None


def steps_to_remove(
    checkpoints: Sequence[RetentionCandidate], keep_count: int, *, pinned_steps: Iterable[int] = (), is_run_finished: bool = False
) -> list[int]:
    """Return the steps to remove, oldest first. `keep_count` 0 keeps all.

    If `is_run_finished`, the two newest healthy checkpoints may also be removed.
    """
    if keep_count == 0:
        return []
    steps = sorted((one.step for one in checkpoints), reverse=True)
    kept_steps = set(steps[:keep_count]) | set(pinned_steps)
    if (best := best_step(checkpoints)) is not None:
        kept_steps.add(best)
    if not is_run_finished:
        kept_steps |= set(steps[:1])
        kept_steps |= set(sorted((one.step for one in checkpoints if one.healthy), reverse=True)[:MIN_HEALTHY])
    return sorted(step for step in steps if step not in kept_steps)
