"""Pods send their values to trackers. `test_resumed_run.py` tests TensorBoard for a killed run that repeats steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from pod_harness import UID, Pod, merge, run_config, write_rows

from tests.support.tiny import make_tiny_model
from tests.support.wandb_file import read_history, read_summary

STEPS = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_tracked_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1, env: dict[str, str] | None = None) -> Pod:
    rows = write_rows(folder / "rows.jsonl")
    base_spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1}, "checkpoint": {"steps": 10},
        "tracking": {"loggingSteps": 1, "reportTo": ["tensorboard"]},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{folder}/store/team/job/{UID}")
    return Pod(run_config(merge(base_spec, spec), target, attempt=attempt), folder / f"pod-{attempt}", env=env or {})


def stored_path(folder: Path, key: str) -> Path:
    """Return the path of an object in the job's storage folder."""
    return folder / "store" / "team" / "job" / UID / key


def read_log_entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stored_path(folder, "metrics/log.jsonl").read_text().splitlines()]


def test_wandb_files_are_written_offline_without_a_home_folder(model: Path, tmp_path: Path) -> None:
    spec = {"training": {"maxSteps": 6}, "tracking": {"reportTo": ["wandb"], "systemMetrics": True}}
    with make_tracked_pod(tmp_path, model, spec, env={"WANDB_MODE": "offline", "HOME": "/nonexistent"}) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    [run_file] = stored_path(tmp_path, "tracking/wandb").rglob("*.wandb")
    recorded_losses = [(entry["_step"], entry["loss"]) for entry in read_history(run_file) if "loss" in entry]
    assert recorded_losses == [(line["step"], line["loss"]) for line in read_log_entries(tmp_path) if "loss" in line]
    assert [step for step, _ in recorded_losses] == [1, 2, 3, 4, 5, 6]
    assert read_summary(run_file)["artifact/model"] == pod.termination_message().output.uri  # type: ignore[union-attr]
