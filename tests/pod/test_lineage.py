"""A pod that replays a run compares its inputs with the inputs of that run. `test_resumed_run.py` tests the lineage statement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from pod_harness import UID, Pod, run_config, write_rows

from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_lineage_pod(folder: Path, model: Path, *, attempt: int = 1, steps: int = 200, env: dict[str, str] | None = None) -> Pod:
    rows = write_rows(folder / "rows.jsonl")
    spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"}, "checkpoint": {"steps": steps // 10, "keep": 2},
        "training": {"maxSteps": steps, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1},
        "placement": {"env": [{"name": "MY_VALUE", "value": "not-for-others"}]},
    }  # fmt: skip
    run = run_config(spec, StoreTarget(uri=f"file://{folder}/store/team/job/{UID}"), attempt=attempt)
    return Pod(run, folder / f"pod-{attempt}", env=env or {})


def test_a_pod_stops_before_training_if_the_inputs_of_a_replay_have_changed(model: Path, tmp_path: Path) -> None:
    variables = {"FINETUNE_EXPECTED_INPUTS": json.dumps({"modelRevision": "sha256:0", "datasetDigest": "1"})}
    with make_lineage_pod(tmp_path, model, env=variables) as pod:
        assert pod.end() == ExitCode.CONFIG_INVALID, pod.text[-6000:]
    message = pod.termination_message()
    assert message.code == "InputsChanged"
    assert "base model is sha256:" in (message.message or "") and "instead of sha256:0; training data is " in (message.message or "")
