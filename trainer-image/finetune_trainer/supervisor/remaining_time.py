"""Estimates the time to the end of training from the steps and pauses of this attempt and, before they are known, from earlier attempts."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.results.log_entry import LogEntry

RECENT_STEPS = 1000
ENOUGH_STEPS = 5
"""From this number of measured steps on, the duration that earlier attempts suggest is not used."""
LONGEST_STEP = 5.0
"""A step counts at most as this many times the median, so that one slow step hardly changes the estimate."""
RECENT_PAUSES = 20


class RemainingTime:
    """Steps left times the mean of the recent step durations, and the expected pauses: evaluations and checkpoints.

    The mean is used because the remaining time is a sum: with rows of different lengths, the median differs from the mean.
    """

    def __init__(self) -> None:
        self.expected_step_seconds: float | None = None
        """Duration of a step, including pauses, that earlier attempts suggest."""
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_step: tuple[int, float] | None = None
        self._paused_since_step = 0.0
        self._pauses: dict[str, deque[tuple[int, float]]] = {}

    def record_step(self, step: int, now: float) -> None:
        """Record the end of a step at the monotonic time `now`. The first step is not measured, because kernels are compiled in it."""
        if self._last_step is not None and step == self._last_step[0] + 1:
            self._durations.append(max(0.0, now - self._last_step[1] - self._paused_since_step))
        self._last_step, self._paused_since_step = (step, now), 0.0

    def record_pause(self, part: str, step: int, seconds: float) -> None:
        """Record a pause after a step."""
        self._paused_since_step += seconds
        self._pauses.setdefault(part, deque(maxlen=RECENT_PAUSES)).append((step, seconds))

    def estimate(self, step: int, total: int) -> float | None:
        """Return the seconds to the end of training, or None if no duration of a step is known."""
        steps_left = max(0, total - step)
        if self.expected_step_seconds is not None and len(self._durations) < ENOUGH_STEPS:
            return steps_left * self.expected_step_seconds
        if not self._durations:
            return None
        longest = LONGEST_STEP * statistics.median(self._durations)
        step_seconds = statistics.fmean(min(one, longest) for one in self._durations)
        return steps_left * step_seconds + sum(self._seconds_of_pauses(list(pauses), step, total) for pauses in self._pauses.values())

    @staticmethod
    def _seconds_of_pauses(pauses: list[tuple[int, float]], step: int, total: int) -> float:
        """Return the seconds of the expected further pauses of one kind. Their distance in steps is the mean distance of the known ones."""
        steps = [at for at, _ in pauses]
        interval = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else steps[0]
        if interval <= 0:
            return 0.0
        further = max(0, int((total - steps[-1]) / interval + 1e-9))
        return further * statistics.median(seconds for _, seconds in pauses)


def expected_step_seconds(entries: Sequence[LogEntry], saved: RunFacts, current: RunFacts) -> float | None:
    """Return how long a step of a resumed run will take, with its pauses. None if the earlier attempts did not log their seconds of training.

    The ranks share the rows of a step, so the duration changes with the rows of each rank. `saved`: the facts of the checkpoint.
    """
    lines = [(entry.step, entry.training_seconds) for entry in entries if entry.step and entry.training_seconds]
    if not lines:
        return None
    (first_step, first_seconds), (last_step, last_seconds) = lines[0], lines[-1]
    step_seconds = (last_seconds - first_seconds) / (last_step - first_step) if last_step > first_step else last_seconds / last_step
    return step_seconds * (current.effective_batch / current.world_size) / (saved.effective_batch / saved.world_size)
