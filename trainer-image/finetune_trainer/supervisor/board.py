"""What is known about the run, kept up to date from what ranks say: the source of `/progress`, `/metrics` and the last words.

Thread-safe. Ranks report facts; pace, time left and the words for people are made here.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import Any

from finetune_api.pod import Health, ProgressReport, RunConfig
from finetune_api.status import Checkpoint, Metrics, Progress, Resolved, Stage

RECENT_STEPS = 50
NEWEST_CHECKPOINTS = 5


class Board:
    """The facts of one pod."""

    def __init__(self, run: RunConfig | None = None, config_sha256: str = "") -> None:
        self._lock = threading.RLock()
        self._run = run
        self._stage = Stage.STARTING
        self._detail: str | None = None
        self._progress = Progress()
        self._metrics = Metrics()
        self._resolved = Resolved(config_sha256=config_sha256 or None, world_size=run.world.size if run else None)
        self._notes: list[str] = []
        self._checkpoints: dict[int, Checkpoint] = {}
        self._durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self._step_time: float | None = None
        self._sign_time: float | None = None
        self._stage_since = time.monotonic()
        self._timings: dict[str, float] = {}
        self._health = Health()
        self.resumed_from_step: int | None = None
        self.started = time.monotonic()
        self.counters: dict[str, float] = {}

    def use(self, run: RunConfig, config_sha256: str) -> None:
        """The run configuration is read."""
        with self._lock:
            self._run = run
            self.resolve(Resolved(config_sha256=config_sha256, world_size=run.world.size))

    # ---- facts coming in ----

    def stage(self, stage: Stage, detail: str | None = None) -> None:
        """Enter a stage, or say more about it. The time spent in the one before is added to the timings."""
        with self._lock:
            if stage != self._stage:
                now = time.monotonic()
                self._timings[self._stage.value] = self._timings.get(self._stage.value, 0.0) + now - self._stage_since
                self._stage, self._stage_since = stage, now
            self._detail = detail

    def timing(self, name: str, seconds: float) -> None:
        """Seconds that something took."""
        with self._lock:
            self._timings[name] = self._timings.get(name, 0.0) + seconds

    def count(self, name: str, by: float = 1) -> None:
        """Add to a counter of `/metrics`."""
        with self._lock:
            self.counters[name] = self.counters.get(name, 0) + by

    def alive(self) -> None:
        """Something moved: a step, a part of one, a batch of an evaluation, a file."""
        with self._lock:
            self._sign_time = time.monotonic()

    def heartbeat(self, step: int) -> None:
        """An optimizer step is done."""
        now = time.monotonic()
        with self._lock:
            before = self._progress.step or 0
            if self._step_time is not None and step == before + 1:
                self._durations.append(now - self._step_time)
            self._step_time = now
            if step > before:
                self._merge_progress({"step": step})

    def progress(self, value: dict[str, Any]) -> None:
        """Progress as a rank sent it."""
        with self._lock:
            self._merge_progress(Progress.model_validate(value).model_dump(exclude_none=True))

    def _merge_progress(self, found: dict[str, Any]) -> None:
        self._progress = self._progress.model_copy(update=found | {"update_time": datetime.now(UTC)})

    def metrics(self, value: dict[str, Any]) -> None:
        """Metrics as a rank sent them."""
        found = Metrics.model_validate(value).model_dump(exclude_none=True)
        with self._lock:
            self._metrics = self._metrics.model_copy(update=found)

    def resolve(self, resolved: Resolved) -> None:
        """What the run really is."""
        with self._lock:
            self._resolved = self._resolved.model_copy(update=resolved.model_dump(exclude_none=True))

    def note(self, text: str) -> None:
        """A sentence for the status; said once."""
        with self._lock:
            if text not in self._notes:
                self._notes.append(text)

    def problem(self, reason: str, sentence: str) -> None:
        """A checkpoint was skipped or damaged."""
        with self._lock:
            self._health = self._health.model_copy(
                update={"healthy": False, "checkpoint_problem": f"{reason}: {sentence}"}
            )

    def well_again(self) -> None:
        """A checkpoint was committed: what was wrong is over."""
        with self._lock:
            self._health = self._health.model_copy(update={"healthy": True, "checkpoint_problem": None})

    def saved(self, checkpoint: Checkpoint, seconds: float | None = None) -> None:
        """A checkpoint is committed."""
        with self._lock:
            self._checkpoints[checkpoint.step] = checkpoint
            if seconds is not None:
                self._health = self._health.model_copy(update={"last_save_seconds": round(seconds, 3)})

    def healthy(self, step: int) -> None:
        """The steps after this checkpoint were finite."""
        with self._lock:
            if step in self._checkpoints:
                self._checkpoints[step] = self._checkpoints[step].model_copy(update={"healthy": True})

    def removed(self, step: int) -> None:
        """A checkpoint was removed from storage."""
        with self._lock:
            self._checkpoints.pop(step, None)

    # ---- facts going out ----

    @property
    def current_stage(self) -> Stage:
        """What the pod is doing."""
        return self._stage

    @property
    def step(self) -> int:
        """Newest optimizer step heard of."""
        return self._progress.step or 0

    @property
    def last_save_seconds(self) -> float | None:
        """How long the last checkpoint took until it was committed."""
        return self._health.last_save_seconds

    def seconds_since_step(self) -> float | None:
        """Since the newest step, None before the first."""
        with self._lock:
            return None if self._step_time is None else time.monotonic() - self._step_time

    def seconds_since_heartbeat(self) -> float | None:
        """Since something moved, None if nothing did yet."""
        with self._lock:
            return None if self._sign_time is None else time.monotonic() - self._sign_time

    def median_step(self) -> float | None:
        """Median seconds of recent steps."""
        with self._lock:
            return statistics.median(self._durations) if self._durations else None

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Committed checkpoints, newest first."""
        with self._lock:
            return [self._checkpoints[step] for step in sorted(self._checkpoints, reverse=True)]

    def report(self) -> ProgressReport:
        """What `/progress` answers."""
        with self._lock:
            now = time.monotonic()
            timings = self._timings | {
                self._stage.value: self._timings.get(self._stage.value, 0.0) + now - self._stage_since
            }
            newest = self.checkpoints
            since, median = self.seconds_since_step(), self.median_step()
            sign = self.seconds_since_heartbeat()
            quiet = None if since is None or sign is None else min(since, sign)
            return ProgressReport(
                attempt=self._run.attempt if self._run else 1,
                uid=self._run.uid if self._run else "",
                stage=self._stage,
                detail=self._detail,
                progress=self._words(),
                metrics=self._metrics,
                checkpoints=shown(newest),
                latest_checkpoint=newest[0].uri if newest else None,
                resumed_from_step=self.resumed_from_step,
                resolved=self._resolved.model_copy(update={"notes": list(self._notes) or None}),
                health=self._health.model_copy(
                    update={
                        "seconds_since_step": None if since is None else round(since, 3),
                        "seconds_since_heartbeat": None if quiet is None else round(quiet, 3),
                        "median_step_seconds": None if median is None else round(median, 4),
                    }
                ),
                timings={name: round(seconds, 3) for name, seconds in timings.items()},
            )

    def _words(self) -> Progress:
        """Progress with percent, pace and the words for people."""
        step, total = self._progress.step, self._progress.total_steps
        update: dict[str, Any] = {}
        if step is not None and total:
            percent = min(100, 100 * step // total)
            update |= {"percent": percent, "display": f"{step}/{total} ({percent}%)"}
            median = self.median_step()
            if median is not None:
                left = round(median * max(0, total - step))
                update |= {"seconds_remaining": left, "eta": duration(left)}
        return self._progress.model_copy(update=update)


def shown(newest_first: list[Checkpoint]) -> list[Checkpoint]:
    """The newest few and the best."""
    kept = newest_first[:NEWEST_CHECKPOINTS]
    judged = [one for one in newest_first if one.eval_loss is not None]
    best = min(judged, key=lambda one: (one.eval_loss or 0.0, one.step), default=None)
    return kept if best is None or best in kept else [*kept, best]


def duration(seconds: int) -> str:
    """Seconds for people: `45s`, `3m20s`, `1h12m`."""
    minutes, rest = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
