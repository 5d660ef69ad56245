"""A pod writes the lineage statement after the commit of the model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.lineage import Statement
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from pod_harness import UID, Pod, run_config, write_rows

from tests.support.tiny import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def lineage_pod(folder: Path, model: Path, *, attempt: int = 1, steps: int = 200, env: dict[str, str] | None = None) -> Pod:
    rows = write_rows(folder / "rows.jsonl")
    spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}"}, "checkpoint": {"steps": steps // 10, "keep": 2},
        "training": {"maxSteps": steps, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1},
        "placement": {"env": [{"name": "MY_VALUE", "value": "not-for-others"}]},
    }  # fmt: skip
    run = run_config(spec, StoreTarget(uri=f"file://{folder}/store/team/job/{UID}"), attempt=attempt)
    return Pod(run, folder / f"pod-{attempt}", env=env or {})


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_statement_describes_all_attempts_the_inputs_and_every_file(model: Path, tmp_path: Path) -> None:
    with lineage_pod(tmp_path, model) as killed:
        killed.wait_committed(20)
        killed.kill()
    with lineage_pod(tmp_path, model, attempt=2) as resumed:
        assert resumed.end() == ExitCode.OK, resumed.text[-6000:]
    message = resumed.termination_message()
    root = tmp_path / "store" / "team" / "job" / UID
    assert message.output is not None and message.output.lineage_uri == f"file://{root}/lineage/statement.json"
    text = (root / "lineage/statement.json").read_text()
    statement = Statement.model_validate_json(text)
    folder = Path((message.output.uri or "").removeprefix("file://"))
    files = {path.name: sha256(path) for path in folder.iterdir()}
    assert {one.name: one.digest["sha256"] for one in statement.subject} == files and len(statement.subject) == len(files)
    dependencies = {one.name: one.digest.get("sha256") for one in statement.predicate.build_definition.resolved_dependencies}
    assert dependencies["dataset.train/rows.jsonl"] == sha256(tmp_path / "rows.jsonl")
    assert dependencies["model.source/model.safetensors"] == sha256(model / "model.safetensors")
    assert statement.job == f"team/job/{UID}" and statement.run.step == 200 and statement.spec["training"]["seed"] == 42
    assert [(one.attempt, one.resumed_from_step) for one in statement.run.attempts] == [(1, None), (2, message.resumed_from_step)]
    assert statement.run.attempts[1].device == message.resolved.device  # type: ignore[union-attr]
    checkpoints = {one.name: one.digest["sha256"] for one in statement.predicate.run_details.byproducts}
    markers = {f"checkpoints/{path.parent.name}": json.loads(path.read_text())["manifestSha256"] for path in root.glob("checkpoints/*/_COMMITTED")}
    assert checkpoints == markers and len(markers) == 2
    assert "not-for-others" not in text and statement.spec["placement"]["env"] == [{"name": "MY_VALUE"}]
    versions = statement.predicate.run_details.builder.version
    assert {"python", "torch", "transformers", "peft", "trl"} <= versions.keys()


def test_a_pod_stops_before_training_if_the_inputs_of_a_replay_have_changed(model: Path, tmp_path: Path) -> None:
    expected = {"FINETUNE_EXPECTED_INPUTS": json.dumps({"modelRevision": "sha256:0", "datasetDigest": "1"})}
    with lineage_pod(tmp_path, model, env=expected) as pod:
        assert pod.end() == ExitCode.CONFIG_INVALID, pod.text[-6000:]
    message = pod.termination_message()
    assert message.code == "InputsChanged"
    assert "base model is sha256:" in (message.message or "") and "instead of sha256:0; training data is " in (message.message or "")
