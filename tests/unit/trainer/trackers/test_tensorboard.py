"""TensorBoard's own reader can read the stored event files."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_trainer.trackers import tensorboard
from finetune_trainer.trackers.tensorboard import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.tracking import FolderStorage, compute_loss, end_events, log_events, start_events, tracked_run


def read_events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tracking" / "tensorboard" / "support-bot"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    return events


def list_scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_values_have_their_tags_steps_and_times(tmp_path: Path) -> None:
    tracker = TensorBoard(tracked_run(), tmp_path / "work", FolderStorage(tmp_path))
    tracker.open()
    tracker.send([*start_events(), *log_events(1, 20, evaluated_steps=(10, 20)), *end_events(20)])
    tracker.send(log_events(20, 20, evaluated_steps=(20,)))  # repeated values are not written again
    tracker.flush()
    events = read_events(tmp_path)
    assert list_scalars(events, "train/loss") == [(step, compute_loss(step)) for step in range(1, 21)]
    assert list_scalars(events, "eval/loss") == [(10, compute_loss(10) + 0.5), (20, compute_loss(20) + 0.5)]
    assert list_scalars(events, "evaluate/perplexity") == [(20, 5.25)]
    assert events.Scalars("train/loss")[4].wall_time == tracked_run().started_at.timestamp() + 5
    assert {"parameters", "data", "artifact/model"} <= set(events.Tags()["tensors"])


def test_full_files_are_stored_once_and_a_failed_upload_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "MAX_FILE_BYTES", 2000)
    storage = FolderStorage(tmp_path)
    tracker = TensorBoard(tracked_run(), tmp_path / "work", storage)
    tracker.open()
    for step in range(1, 61):
        tracker.send(log_events(step, step))
        if step == 30:
            storage.failures = 1
            with pytest.raises(OSError, match="storage is down"):
                tracker.flush()
            tracker.open()
        tracker.flush()
    numbers = [int(key[-5:]) for key in storage.keys]
    assert numbers == sorted(numbers) and numbers[-1] >= 2
    assert list_scalars(read_events(tmp_path), "train/loss") == [(step, compute_loss(step)) for step in range(1, 61)]
