"""Creates a tracked run and its events, for tests of trackers."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.trackers.base import TrackedRun
from finetune_trainer.trackers.events import (
    ArtifactEvent,
    DataEvent,
    DataSource,
    EndEvent,
    Event,
    LogEvent,
    PhaseEvent,
    RunEnd,
    TrackedPhase,
)

UID = "11111111-2222-3333-4444-555555555555"
STARTED_AT = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
START = STARTED_AT.timestamp()


def tracked_run(**changes: Any) -> TrackedRun:
    """Return the tracked run of a job's first attempt, with `changes` to its fields."""
    run_fields: dict[str, Any] = {
        "name": "support-bot", "project": "support", "namespace": "team", "job": "job", "uid": UID, "attempt": 1, "model": "org/base",
        "storage_uri": "s3://bucket/team/job", "started_at": STARTED_AT, "resumed_from_step": 0,
        "parameters": {"method.type": "lora", "training.batchSizePerDevice": "4", "training.learningRate": "0.0002"},
    }  # fmt: skip
    return TrackedRun(**run_fields | changes)


def log_events(first: int, last: int, *, evaluated_steps: tuple[int, ...] = ()) -> list[Event]:
    """Return a training log event for each step from `first` to `last`, and an evaluation log event for each step in `evaluated_steps`."""
    events: list[Event] = []
    for step in range(first, last + 1):
        coordinates = {"step": step, "epoch": step / 10, "unix_time": START + step}
        events.append(LogEvent(entry=LogEntry(**coordinates, loss=compute_loss(step), learning_rate=1e-4)))
        if step in evaluated_steps:
            events.append(LogEvent(entry=LogEntry(**coordinates, eval_loss=compute_loss(step) + 0.5)))
    return events


def compute_loss(step: int) -> float:
    """Return the training loss of a step. The loss is exactly representable as a binary floating-point number."""
    return 4 - step / 32


def start_events() -> list[Event]:
    """Return the events about the datasets and the start of training."""
    sources = (
        DataSource(context="training", source="s3://bucket/train.jsonl", digest="a" * 64),
        DataSource(context="validation", source="s3://bucket/validation.jsonl", digest="b" * 64),
    )
    return [DataEvent(sources=sources), PhaseEvent(phase=TrackedPhase.TRAIN, start_time=START + 1)]


def end_events(last: int, *, end: RunEnd = RunEnd.FINISHED, reason: str | None = None) -> list[Event]:
    """Return the events after step `last`: the training summary, the model, the end of training, an evaluation, and the end of the attempt.

    If `end` is not FINISHED, only the event about the end of the attempt is returned.
    """
    end_event = EndEvent(end=end, time=START + 100, reason=reason)
    if end is not RunEnd.FINISHED:
        return [end_event]
    end_fields: dict[str, Any] = {"end": RunEnd.FINISHED, "step": last}
    summary = LogEntry(step=last, epoch=last / 10, unix_time=START + 60, **{"train_loss": 1.5, "train_runtime": 60.0})
    return [
        LogEvent(entry=summary),
        ArtifactEvent(name="model", uri="s3://bucket/team/job/model/a1-1", sha256="c" * 64),
        PhaseEvent(phase=TrackedPhase.TRAIN, start_time=START + 1, end_time=START + 61, **end_fields),
        PhaseEvent(phase=TrackedPhase.EVALUATE, start_time=START + 62, end_time=START + 70, values={"perplexity": 5.25}, **end_fields),
        end_event,
    ]


@dataclass
class FolderStorage:
    """Stores the files of trackers in a local folder instead of S3. The next `failures` uploads fail. `keys` lists the keys of all successful uploads."""

    folder: Path
    failures: int = 0
    keys: list[str] = field(default_factory=list)

    def put_file(self, path: Path, key: str) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError("storage is down")
        target = self.folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        self.keys.append(key)
