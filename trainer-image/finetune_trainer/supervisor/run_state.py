"""The state of one pod's run, updated from the messages of its ranks and from the uploader.

`/progress`, `/metrics` and the termination message show this state. `RunState` is thread-safe. `RunState` also computes the percentage, the remaining
time and the texts for display from the ranks' reports.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from finetune_api.errors import FineTuneError
from finetune_api.pod import HealthReport, ProgressReport, RunConfig
from finetune_api.status import (
    Checkpoint,
    DataReport,
    EvaluationResult,
    Metrics,
    Output,
    Progress,
    ResolvedConfig,
    RunPlan,
    Stage,
)

from finetune_trainer.supervisor.pod_time import compute_time_use
from finetune_trainer.supervisor.remaining_time import RemainingTime

log = logging.getLogger(__name__)
RECENT_STEPS = 50
MAX_NEWEST_CHECKPOINTS = 5


class RunState:
    """The progress, metrics, checkpoints and health of one pod's run."""

    def __init__(self, seconds_since_process_start: float = 0.0) -> None:
        """`seconds_since_process_start`: seconds since the start of this process, which count as time in the stage `starting`."""
        self._lock = threading.RLock()
        self._run: RunConfig | None = None
        self._stage = Stage.STARTING
        self._detail: str | None = None
        self._progress = Progress()
        self._metrics = Metrics()
        self._resolved = ResolvedConfig()
        self._plan: RunPlan | None = None
        self._data: DataReport | None = None
        self._notes: list[str] = []
        self._checkpoints: dict[int, Checkpoint] = {}
        self._output: Output | None = None
        self._evaluation: EvaluationResult | None = None
        self._recent_step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_step_time: float | None = None
        self._last_heartbeat_time: float | None = None
        self._stage_start_time = time.monotonic() - seconds_since_process_start
        self._timings: dict[str, float] = {}
        self._pauses: dict[str, float] = {}
        """Seconds of pauses in training, by part of `TimeUse`."""
        self._first_step_seconds: float | None = None
        self._remaining_time = RemainingTime()
        self._health = HealthReport()
        self.resumed_from_step: int | None = None
        self.counters: dict[str, float] = {}

    def set_run_config(self, run: RunConfig, config_sha256: str) -> None:
        with self._lock:
            self._run = run
            self.merge_resolved(ResolvedConfig(config_sha256=config_sha256, world_size=run.world.size))

    # ---- updates ----

    def enter_stage(self, stage: Stage, detail: str | None = None) -> None:
        """Enter a stage, or replace the detail text of the current stage. The time in the previous stage is added to the timings."""
        with self._lock:
            if stage != self._stage:
                now = time.monotonic()
                self._timings[self._stage.value] = self._timings.get(self._stage.value, 0.0) + now - self._stage_start_time
                self._stage, self._stage_start_time = stage, now
            self._detail = detail

    def add_timing(self, name: str, seconds: float) -> None:
        """Add a duration to the timing with this name."""
        with self._lock:
            self._timings[name] = self._timings.get(name, 0.0) + seconds

    def record_pause(self, time_use_part: str, seconds: float) -> None:
        """Record a pause in training. `time_use_part`: `evaluation` or `saving`.

        A pause after a stop request is ignored, because it counts as time in `stopping`.
        """
        with self._lock:
            if self._stage is Stage.TRAINING:
                self._pauses[time_use_part] = self._pauses.get(time_use_part, 0.0) + seconds
                self._remaining_time.record_pause(time_use_part, self.step, seconds)

    def set_expected_step_seconds(self, seconds: float | None) -> None:
        """Set the duration of a step in earlier attempts. This duration is used until enough steps of this attempt are measured."""
        with self._lock:
            self._remaining_time.expected_step_seconds = seconds

    def increment_counter(self, name: str, amount: float = 1) -> None:
        """Add to a counter of `/metrics`."""
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + amount

    def record_heartbeat(self) -> None:
        """Record a heartbeat, such as the end of a micro-step or of an evaluation batch."""
        with self._lock:
            self._last_heartbeat_time = time.monotonic()

    def record_step(self, step: int) -> None:
        """Record that an optimizer step is done. A late message about an earlier step does not change the recorded step."""
        now = time.monotonic()
        with self._lock:
            step_before = self._progress.step or 0
            if self._last_step_time is not None and step == step_before + 1:
                self._recent_step_seconds.append(now - self._last_step_time)
            if self._first_step_seconds is None and self._stage is Stage.TRAINING:
                self._first_step_seconds = max(0.0, self._compute_timings()[Stage.TRAINING] - sum(self._pauses.values()))
            self._last_step_time = now
            self._remaining_time.record_step(step, now)
            if step > step_before:
                self._update_progress({"step": step})

    def merge_progress(self, progress: Progress) -> None:
        """Merge a report into the progress: fields that are None keep their earlier value."""
        with self._lock:
            self._update_progress(progress.model_dump(exclude_none=True))

    def _update_progress(self, fields: dict[str, Any]) -> None:
        self._progress = self._progress.model_copy(update=fields | {"update_time": datetime.now(UTC)})

    def merge_metrics(self, metrics: Metrics) -> None:
        """Merge a report into the metrics: fields that are None keep their earlier value."""
        with self._lock:
            self._metrics = self._metrics.model_copy(update=metrics.model_dump(exclude_none=True))

    def merge_resolved(self, resolved_config: ResolvedConfig) -> None:
        """Merge a report into the resolved configuration: fields that are None keep their earlier value."""
        with self._lock:
            self._resolved = self._resolved.model_copy(update=resolved_config.model_dump(exclude_none=True))

    def merge_plan(self, plan: RunPlan) -> None:
        """Merge a report into the plan: fields that are None keep their earlier value."""
        with self._lock:
            known_values = {name: value for name, value in plan if value is not None}
            self._plan = (self._plan or RunPlan()).model_copy(update=known_values)

    def set_data(self, data: DataReport) -> None:
        """Set the counts of the data that a preparation reports."""
        with self._lock:
            self._data = data

    def add_note(self, text: str) -> None:
        """Add a sentence to `status.resolved.notes` if the notes do not contain it yet."""
        with self._lock:
            if text not in self._notes:
                self._notes.append(text)

    def record_checkpoint_problem(self, reason: str, description: str) -> None:
        """Record that a checkpoint was skipped, could not be stored or is damaged."""
        with self._lock:
            self._health = self._health.model_copy(
                update={"healthy": False, "checkpoint_problem": f"{reason}: {description}"}
            )

    def clear_checkpoint_problem(self) -> None:
        """Record that checkpoints can be stored again."""
        with self._lock:
            self._health = self._health.model_copy(update={"healthy": True, "checkpoint_problem": None})

    def set_tracker_problem(self, problem: str | None) -> None:
        """Set the reason and the message of a tracker's current problem; None if no tracker has a problem."""
        with self._lock:
            self._health = self._health.model_copy(update={"tracker_problem": problem})

    def add_checkpoint(self, checkpoint: Checkpoint, upload_seconds: float | None = None) -> None:
        """Add a committed checkpoint. `upload_seconds`: duration of the checkpoint's upload."""
        with self._lock:
            self._checkpoints[checkpoint.step] = checkpoint
            if upload_seconds is not None:
                self._health = self._health.model_copy(update={"last_save_seconds": round(upload_seconds, 3)})

    def set_output(self, output: Output) -> None:
        """Set the committed model."""
        with self._lock:
            self._output = output

    def merge_evaluation(self, evaluation: EvaluationResult) -> None:
        """Merge the results of a stage after training: fields that are None keep their earlier value."""
        with self._lock:
            self._evaluation = (self._evaluation or EvaluationResult()).model_copy(
                update={name: value for name, value in evaluation if value is not None}
            )

    def mark_checkpoint_healthy(self, step: int) -> None:
        """Record that the losses after this checkpoint were finite."""
        with self._lock:
            if step in self._checkpoints:
                self._checkpoints[step] = self._checkpoints[step].model_copy(update={"healthy": True})

    def remove_checkpoint(self, step: int) -> None:
        with self._lock:
            self._checkpoints.pop(step, None)

    # ---- reading ----

    @property
    def current_stage(self) -> Stage:
        return self._stage

    @property
    def config_sha256(self) -> str:
        """sha256 (hex) of the run configuration."""
        return self._resolved.config_sha256 or ""

    @property
    def step(self) -> int:
        """Newest optimizer step; 0 before the first step."""
        return self._progress.step or 0

    @property
    def last_save_seconds(self) -> float | None:
        """Seconds from the start of the last checkpoint's upload to its commit."""
        return self._health.last_save_seconds

    @property
    def checkpoint_problem(self) -> str | None:
        """The reason and the message of the failure to store the last checkpoint; None after a commit."""
        return self._health.checkpoint_problem

    def seconds_since_step(self) -> float | None:
        """Return the seconds since the last step, or None before the first step."""
        with self._lock:
            return None if self._last_step_time is None else time.monotonic() - self._last_step_time

    def seconds_since_heartbeat(self) -> float | None:
        """Return the seconds since the last heartbeat, or None before the first heartbeat."""
        with self._lock:
            return None if self._last_heartbeat_time is None else time.monotonic() - self._last_heartbeat_time

    def median_step_seconds(self) -> float | None:
        """Return the median duration of the recent steps, or None before the second step."""
        with self._lock:
            return statistics.median(self._recent_step_seconds) if self._recent_step_seconds else None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The committed checkpoints, newest first."""
        with self._lock:
            return [self._checkpoints[step] for step in sorted(self._checkpoints, reverse=True)]

    def report(self) -> ProgressReport:
        """Return the response of `/progress`."""
        with self._lock:
            timings = self._compute_timings()
            newest_first = self.checkpoints
            return ProgressReport(
                attempt=self._run.attempt if self._run else 1,
                uid=self._run.uid if self._run else "",
                stage=self._stage,
                detail=self._detail,
                progress=self._build_progress_with_estimates(),
                metrics=self._metrics,
                checkpoints=choose_newest_and_best(newest_first),
                latest_checkpoint=newest_first[0].uri if newest_first else None,
                output=self._output,
                evaluation=self._evaluation,
                resumed_from_step=self.resumed_from_step,
                plan=self._plan,
                data=self._data,
                resolved=self._resolved.model_copy(update={"notes": list(self._notes) or None}),
                health=self._build_health_with_ages(),
                timings={name: round(seconds, 3) for name, seconds in timings.items()},
                time_use=compute_time_use(timings, self._pauses, self._first_step_seconds),
            )

    def _compute_timings(self) -> dict[str, float]:
        """Return the timings. The timing of the current stage includes the time up to this call."""
        return self._timings | {self._stage.value: self._timings.get(self._stage.value, 0.0) + time.monotonic() - self._stage_start_time}

    def _build_health_with_ages(self) -> HealthReport:
        seconds_since_step, seconds_since_heartbeat = self.seconds_since_step(), self.seconds_since_heartbeat()
        median_seconds = self.median_step_seconds()
        silent_seconds = None if seconds_since_step is None or seconds_since_heartbeat is None else min(seconds_since_step, seconds_since_heartbeat)
        return self._health.model_copy(
            update={
                "seconds_since_step": None if seconds_since_step is None else round(seconds_since_step, 3),
                "seconds_since_heartbeat": None if silent_seconds is None else round(silent_seconds, 3),
                "median_step_seconds": None if median_seconds is None else round(median_seconds, 4),
            }
        )

    def _build_progress_with_estimates(self) -> Progress:
        """Return the progress with percentage, remaining time and display texts."""
        step, total_steps = self._progress.step, self._progress.total_steps
        estimates: dict[str, Any] = {}
        if step is not None and total_steps:
            percent = min(100, 100 * step // total_steps)
            estimates |= {"percent": percent, "display": f"{step}/{total_steps} ({percent}%)"}
            estimated_seconds = self._remaining_time.estimate(step, total_steps)
            if estimated_seconds is not None:
                seconds_left = round(estimated_seconds)
                estimates |= {"seconds_remaining": seconds_left, "eta": format_duration(seconds_left)}
        return self._progress.model_copy(update=estimates)


def store_quietly(run_state: RunState, content_name: str, action: Callable[[], None]) -> None:
    """Run an action that stores data whose loss must not end the run. A failure only adds a note that names the data: `content_name`, such as `log lines`."""
    try:
        action()
    except FineTuneError as error:
        log.warning("%s were not stored: %s", content_name, error)
        run_state.add_note(f"some {content_name} were not stored: {error.code}")


def choose_newest_and_best(newest_first: list[Checkpoint]) -> list[Checkpoint]:
    """Return the newest `MAX_NEWEST_CHECKPOINTS` checkpoints and the checkpoint with the lowest validation loss."""
    newest_checkpoints = newest_first[:MAX_NEWEST_CHECKPOINTS]
    evaluated_checkpoints = [checkpoint for checkpoint in newest_first if checkpoint.eval_loss is not None]
    best_checkpoint = min(evaluated_checkpoints, key=lambda checkpoint: (checkpoint.eval_loss or 0.0, checkpoint.step), default=None)
    return newest_checkpoints if best_checkpoint is None or best_checkpoint in newest_checkpoints else [*newest_checkpoints, best_checkpoint]


def format_duration(seconds: int) -> str:
    """Format seconds as `45s`, `3m20s` or `1h12m`."""
    minutes, seconds = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"
