"""The log lines of an incarnation are one object in storage."""

from __future__ import annotations

from pathlib import Path

from finetune_api.errors import StorageError
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.metric_log import MetricLog
from finetune_trainer.supervisor.run_state import RunState


def test_every_upload_contains_all_lines_so_far(tmp_path: Path) -> None:
    store, metric_log = FolderStore(tmp_path, "file://x"), MetricLog(RunState(), "a1-0")
    metric_log.upload(store)
    assert list(store.list("")) == []
    for step in (1, 2):
        metric_log.append(step, {"loss": 0.5})
        metric_log.upload(store)
    assert store.get("metrics/a1-0.jsonl") == b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'


def test_a_failed_upload_adds_a_note(tmp_path: Path) -> None:
    class FullStore(FolderStore):
        def put(self, key: str, data: bytes) -> None:
            raise StorageError("LocalDiskFull", "full")

    state = RunState()
    metric_log = MetricLog(state, "a1-0")
    metric_log.append(1, {})
    metric_log.upload(FullStore(tmp_path, "file://x"))
    assert state.report().resolved.notes == ["some log lines were not stored: LocalDiskFull"]
