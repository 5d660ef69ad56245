"""Pods write the metric files of the whole run, and a copy of all results below `output.dir`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import RunConfig, StoreTarget
from pod_harness import ROWS, UID, Pod, merge, run_config, write_rows

from tests.support.tiny import make_tiny_model

STEPS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def results_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1, env: dict[str, str] | None = None) -> Pod:
    rows = write_rows(folder / "rows.jsonl")
    base = {
        "model": {"source": f"file://{model}"},
        "dataset": {"train": f"file://{rows}", "split": {"train": 0.5, "validation": 0.25, "test": 0.25}},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1}, "checkpoint": {"steps": 3},
        "tracking": {"loggingSteps": 1}, "evaluation": {"steps": 3},
    }  # fmt: skip
    run = run_config(merge(base, spec), StoreTarget(uri=f"file://{folder}/store/team/job/{UID}"), attempt=attempt)
    return Pod(_with_copy(run, folder), folder / f"pod-{attempt}", env=env or {})


def _with_copy(run: RunConfig, folder: Path) -> RunConfig:
    directory = run.spec.output.dir
    return run.model_copy(update={"publish": f"file://{folder}/store/{directory}"}) if directory else run


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "store" / "team" / "job" / UID / "metrics" / name).read_text())


def test_metric_files_cover_all_attempts(model: Path, tmp_path: Path) -> None:
    with results_pod(tmp_path, model, {"training": {"maxSteps": 200}, "checkpoint": {"steps": 20}}) as killed:
        killed.wait_committed(20)
        killed.kill()
    with results_pod(tmp_path, model, {"training": {"maxSteps": 200}, "checkpoint": {"steps": 20}}, attempt=2) as resumed:
        assert resumed.end() == ExitCode.OK, resumed.text[-6000:]
    steps = read(tmp_path, "step_metrics.json")
    assert [entry["step"] for entry in steps] == list(range(1, 201))
    assert steps[0].keys() == {"step", "loss", "learning_rate", "grad_norm", "timestamp"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", entry["timestamp"]) for entry in steps)
    epochs, final = read(tmp_path, "epoch_metrics.json"), read(tmp_path, "final_metrics.json")
    assert [entry["epoch"] for entry in epochs] == list(range(1, len(epochs) + 1)) and epochs[-1]["eval_loss"] is not None
    assert final["training_summary"]["total_steps"] == 200 and final["training_summary"]["final_eval_loss"] == epochs[-1]["eval_loss"]
    assert final["configuration"]["technique"] == "lora" and final["configuration"]["batch_size"] == "4"
    performance = read(tmp_path, "performance_summary.json")
    assert performance["trainable_parameters"] == resumed.termination_message().resolved.trainable_parameters  # type: ignore[union-attr]
    assert performance["training_time_minutes"] * 60 == pytest.approx(final["training_summary"]["total_training_time"])
    assert len(read(tmp_path, "training_metrics.json")["loss_history"]) == 200
    folder = tmp_path / "store" / "team" / "job" / UID / "metrics"
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seconds = [entry["training_seconds"] for entry in logged]
    assert seconds == sorted(seconds)
    test_rows = [json.loads(line) for line in (folder / "test_split.jsonl").read_text().splitlines()]
    assert len(test_rows) == 9 and all(row in ROWS for row in test_rows)


@pytest.mark.parametrize(
    ("output", "pattern", "model_folder"),
    [
        ({"dir": "results", "project": "sums"}, r"results/sums/tiny/\d{8}_\d{6}", "model/"),
        ({"dir": "results/latest", "layout": "flat"}, "results/latest", ""),
    ],
)
def test_a_copy_of_all_results_lies_below_the_output_folder(output: dict[str, str], pattern: str, model_folder: str, model: Path, tmp_path: Path) -> None:
    spec = {"output": output, "evaluation": {"metrics": ["perplexity"]}}
    with results_pod(tmp_path, model, spec) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
    result = pod.termination_message().output
    assert result is not None and result.published_uri is not None and result.uri is not None
    root = f"file://{tmp_path}/store/"
    assert re.fullmatch(pattern, result.published_uri.removeprefix(root))
    copy, original = (Path(uri.removeprefix("file://")) for uri in (result.published_uri, result.uri))
    for path in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (copy / model_folder / path).read_bytes() == (original / path).read_bytes()
    names = {path.name for path in copy.iterdir() if path.is_file()}
    metric_files = {"step_metrics.json", "epoch_metrics.json", "final_metrics.json", "training_metrics.json", "performance_summary.json", "log.jsonl"}
    assert metric_files | {"report.html", "test_split.jsonl", "evaluation_results.json", "evaluation_summary.json"} <= names
    assert json.loads((copy / "evaluation_results.json").read_text())["perplexity"] > 1
