"""Estimates the time to the end of training from the steps and pauses of this attempt. Until this attempt has measured enough steps, the step duration
of earlier attempts is used."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.results.log_entry import LogEntry

RECENT_STEPS = 1000
MIN_MEASURED_STEPS = 5
"""After this many measured steps, the step duration of earlier attempts is no longer used."""
MAX_STEP_IN_MEDIANS = 5.0
"""The duration of a step is limited to this multiple of the median duration, so that one slow step hardly changes the estimate."""
RECENT_PAUSE_COUNT = 20


class RemainingTime:
    """Estimates the remaining time: number of remaining steps times mean duration of recent steps, plus the expected pauses for evaluations and checkpoints.

    The mean is used, not the median, because the remaining time is a sum of step durations. With rows of different lengths, the median differs from the mean.
    """

    def __init__(self) -> None:
        self.expected_step_seconds: float | None = None
        """Duration of a step in earlier attempts, including pauses; None if it is not known."""
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_step_and_time: tuple[int, float] | None = None
        self._pause_seconds_since_step = 0.0
        self._pauses: dict[str, deque[tuple[int, float]]] = {}

    def record_step(self, step: int, now: float) -> None:
        """Record the end of a step at the monotonic time `now`. The first step is not measured, because it also compiles kernels."""
        if self._last_step_and_time is not None and step == self._last_step_and_time[0] + 1:
            self._step_seconds.append(max(0.0, now - self._last_step_and_time[1] - self._pause_seconds_since_step))
        self._last_step_and_time, self._pause_seconds_since_step = (step, now), 0.0

    def record_pause(self, time_use_part: str, step: int, seconds: float) -> None:
        """Record a pause after a step. `time_use_part`: the part of `TimeUse`, `evaluation` or `saving`."""
        self._pause_seconds_since_step += seconds
        self._pauses.setdefault(time_use_part, deque(maxlen=RECENT_PAUSE_COUNT)).append((step, seconds))

    def estimate(self, step: int, total_steps: int) -> float | None:
        """Return the expected seconds to the end of training, or None if the duration of a step is not known."""
        steps_left = max(0, total_steps - step)
        if self.expected_step_seconds is not None and len(self._step_seconds) < MIN_MEASURED_STEPS:
            return steps_left * self.expected_step_seconds
        if not self._step_seconds:
            return None
        max_step_seconds = MAX_STEP_IN_MEDIANS * statistics.median(self._step_seconds)
        step_seconds = statistics.fmean(min(seconds, max_step_seconds) for seconds in self._step_seconds)
        return steps_left * step_seconds + sum(self._estimate_pause_seconds(list(pauses), step, total_steps) for pauses in self._pauses.values())

    @staticmethod
    def _estimate_pause_seconds(pauses: list[tuple[int, float]], step: int, total_steps: int) -> float:
        """Return the total duration in seconds of the pauses that remain in one part of `TimeUse`.

        The remaining pauses are assumed to have the mean interval (in steps) and the median duration of the recorded pauses.
        """
        pause_steps = [pause_step for pause_step, _ in pauses]
        steps_between_pauses = (pause_steps[-1] - pause_steps[0]) / (len(pause_steps) - 1) if len(pause_steps) > 1 else pause_steps[0]
        if steps_between_pauses <= 0:
            return 0.0
        further_pause_count = max(0, int((total_steps - pause_steps[-1]) / steps_between_pauses + 1e-9))
        return further_pause_count * statistics.median(seconds for _, seconds in pauses)


def estimate_step_seconds(entries: Sequence[LogEntry], saved_facts: RunFacts, current_facts: RunFacts) -> float | None:
    """Return the expected duration in seconds of a step of a resumed run, including pauses; None if the log of the earlier attempts has no durations.

    The duration is scaled with the number of rows that each rank processes in a step. This number changes with the batch size and the number of ranks.
    `saved_facts`: the facts of the checkpoint.
    """
    steps_and_seconds = [(entry.step, entry.training_seconds) for entry in entries if entry.step and entry.training_seconds]
    if not steps_and_seconds:
        return None
    (first_step, first_seconds), (last_step, last_seconds) = steps_and_seconds[0], steps_and_seconds[-1]
    step_seconds = (last_seconds - first_seconds) / (last_step - first_step) if last_step > first_step else last_seconds / last_step
    return step_seconds * (current_facts.effective_batch / current_facts.world_size) / (saved_facts.effective_batch / saved_facts.world_size)
