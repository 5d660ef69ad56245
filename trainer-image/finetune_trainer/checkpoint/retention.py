"""Chooses the committed checkpoints to remove. This module does not access storage.

While a run continues, the two newest healthy checkpoints are never removed, even if `keep` is 1. The best checkpoint and the pinned
checkpoints are also kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIN_KEPT_HEALTHY = 2
"""Number of newest healthy checkpoints that are never removed while the run continues."""


@dataclass(frozen=True)
class RetentionCandidate:
    """The facts about a committed checkpoint that decide whether it is kept."""

    step: int
    is_healthy: bool
    eval_loss: float | None = None


def find_best_step(checkpoints: Iterable[RetentionCandidate]) -> int | None:
    """Return the step with the lowest validation loss (the earliest of several equal ones), or None if no checkpoint has a validation loss."""
    losses_and_steps = [(checkpoint.eval_loss, checkpoint.step) for checkpoint in checkpoints if checkpoint.eval_loss is not None]
    return min(losses_and_steps)[1] if losses_and_steps else None


def choose_steps_to_remove(
    checkpoints: Sequence[RetentionCandidate], keep_count: int, *, pinned_steps: Iterable[int] = (), is_run_finished: bool = False
) -> list[int]:
    """Return the steps whose checkpoints must be removed, oldest first. `keep_count` is the number of newest checkpoints to keep; 0 keeps all.

    If `is_run_finished`, the two newest healthy checkpoints are not protected.
    """
    if keep_count == 0:
        return []
    steps = sorted((checkpoint.step for checkpoint in checkpoints), reverse=True)
    kept_steps = set(steps[:keep_count]) | set(pinned_steps)
    if (best_step := find_best_step(checkpoints)) is not None:
        kept_steps.add(best_step)
    if not is_run_finished:
        kept_steps |= set(steps[:1])
        kept_steps |= set(sorted((checkpoint.step for checkpoint in checkpoints if checkpoint.is_healthy), reverse=True)[:MIN_KEPT_HEALTHY])
    return sorted(step for step in steps if step not in kept_steps)
