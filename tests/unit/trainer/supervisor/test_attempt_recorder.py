"""The record of an attempt: what it contains at each time, and when it is stored."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from finetune_api.pod import ProgressReport, TerminationMessage
from finetune_api.status import Progress, ResolvedConfig
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.folder import FolderStore
from finetune_trainer.supervisor.attempt_recorder import AttemptRecorder, read_attempt_records

from tests.support.learning import make_run

RECORD_KEY = "run/records/a1-00000001.json"
STARTED_AT = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def tree(tmp_path: Path) -> CheckpointTree:
    return CheckpointTree(FolderStore(tmp_path / "store", f"file://{tmp_path}/store"))


@pytest.fixture
def recorder(tmp_path: Path, tree: CheckpointTree, monkeypatch: pytest.MonkeyPatch) -> AttemptRecorder:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run, _ = make_run(tmp_path, tmp_path / "model")
    return AttemptRecorder(run, tree, incarnation="a1-00000001", config_sha256="c0ffee", started_at=STARTED_AT)


def test_a_record_names_the_start_the_device_and_the_end(recorder: AttemptRecorder, tree: CheckpointTree) -> None:
    recorder.record_start(4, ResolvedConfig(world_size=1))
    start_fields = {
        "attempt": 1, "incarnation": "a1-00000001", "startedAt": "2026-03-01T12:00:00Z", "gpus": 0, "pods": 1, "threads": 3,
        "configSha256": "c0ffee", "startStep": 4, "timings": {}, "notes": [], "resolved": {"worldSize": 1},
    }  # fmt: skip
    assert json.loads(tree.store.get(RECORD_KEY) or b"") == start_fields
    recorder.record_configuration(ResolvedConfig(world_size=1, device="NVIDIA H100", notes=["n"]))
    assert json.loads(tree.store.get(RECORD_KEY) or b"") == {**start_fields, "resolved": {"worldSize": 1, "device": "NVIDIA H100"}}
    progress = ProgressReport(attempt=1, uid="u", progress=Progress(step=9), timings={"training": 5.0}, resolved=ResolvedConfig(device="cpu", notes=["n"]))
    recorder.record_end(TerminationMessage(exit_code=71, code="GpuOutOfMemory", message="m", hint="h"), progress)
    stored_record = json.loads(tree.store.get(RECORD_KEY) or b"")
    assert stored_record.pop("endedAt") > "2026-03-01"
    end_fields = {"lastStep": 9, "exitCode": 71, "code": "GpuOutOfMemory", "message": "m", "hint": "h", "timings": {"training": 5.0}, "notes": ["n"]}
    assert stored_record == {**start_fields, **end_fields, "resolved": {"device": "cpu"}}


def test_a_record_is_stored_again_only_if_it_has_changed(recorder: AttemptRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str | None] = []
    monkeypatch.setattr(FolderStore, "put", lambda self, key, data: devices.append(json.loads(data)["resolved"].get("device")))
    recorder.record_start(0, ResolvedConfig())
    for configuration in (ResolvedConfig(), ResolvedConfig(notes=["n"]), ResolvedConfig(device="NVIDIA H100")):
        recorder.record_configuration(configuration)
    assert devices == [None, "NVIDIA H100"]


def test_records_are_read_in_the_order_of_their_start(recorder: AttemptRecorder, tree: CheckpointTree, tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, tmp_path / "model")
    for attempt, incarnation, hour in ((10, "a10-00000001", 15), (2, "a2-00000009", 13), (2, "a2-00000001", 14)):
        other_recorder = AttemptRecorder(
            run.model_copy(update={"attempt": attempt}), tree, incarnation=incarnation, config_sha256="", started_at=STARTED_AT.replace(hour=hour)
        )
        other_recorder.record_start(0, ResolvedConfig())
    tree.store.put("run/records/a3-00000001.json", b"{")
    assert [record.incarnation for record in read_attempt_records(tree)] == ["a2-00000009", "a2-00000001", "a10-00000001"]
