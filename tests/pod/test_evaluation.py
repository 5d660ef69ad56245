"""Pods that evaluate their model after training, in a separate process."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget
from finetune_api.status import Stage
from pod_harness import UID, Pod, merge, run_config, write_rows

from tests.support.tiny import make_tiny_model

TEST_ROWS = 8
METRICS = ["perplexity", "accuracy", "precision", "recall", "f1", "bleu", "rouge"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_evaluating_pod(folder: Path, model: Path, spec: dict[str, Any], *, attempt: int = 1) -> Pod:
    rows = write_rows(folder / "rows.jsonl")
    base_spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": 4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "checkpoint": {"steps": 2}, "tracking": {"loggingSteps": 1},
        "evaluation": {"metrics": METRICS, "comparison": {"generation": {"maxNewTokens": 8}}},
    }  # fmt: skip
    target = StoreTarget(uri=f"file://{folder}/store/team/job/{UID}")
    return Pod(run_config(merge(base_spec, spec), target, attempt=attempt), folder / f"pod-{attempt}")


def stored_path(folder: Path, key: str) -> Path:
    """Return the path of an object in the job's storage folder."""
    return folder / "store" / "team" / "job" / UID / key


@pytest.mark.faults
def test_a_pod_evaluates_a_model_without_adapter_and_writes_its_answers(model: Path, tmp_path: Path) -> None:
    """`test_stages.py` tests the evaluation of an adapter."""
    with make_evaluating_pod(tmp_path, model, {"method": {"type": "full"}, "phases": {"infer": True}}) as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        message = pod.termination_message()
    assert message.output is not None and message.output.evaluation is not None and message.evaluation is not None
    metric_values = {name: metric.value for name, metric in (message.evaluation.metrics or {}).items()}
    assert message.evaluation.rows == TEST_ROWS
    assert metric_values.keys() == {"loss", "perplexity", "accuracy", "precision", "recall", "f1", "exactMatch", "bleu", "rouge1", "rouge2", "rougeL"}
    # The trainer process has already measured the same rows at the end of the training.
    assert metric_values["loss"] == pytest.approx(message.output.evaluation["testLoss"], abs=1e-4)
    assert metric_values["accuracy"] == pytest.approx(message.output.evaluation["testTokenAccuracy"], abs=1e-4)
    assert metric_values["recall"] == metric_values["accuracy"]
    assert math.isclose(metric_values["perplexity"] or 0, math.exp(metric_values["loss"] or 0), rel_tol=1e-3)
    predictions = [json.loads(line) for line in stored_path(tmp_path, "evaluation/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == TEST_ROWS and predictions[0].keys() == {"system_prompt", "user_prompt", "assistant_response", "ground_truth"}
    assert all(row["user_prompt"].startswith("What is ") and row["ground_truth"].startswith("It is ") for row in predictions)
    summary = json.loads(stored_path(tmp_path, "evaluation/evaluation_summary.json").read_text())
    assert summary["bleu_score"] == pytest.approx(metric_values["bleu"], abs=1e-3)
    assert stored_path(tmp_path, "evaluation/evaluation_detailed.xlsx").exists() and stored_path(tmp_path, "evaluation/evaluation_results.json").exists()
    assert stored_path(tmp_path, "run/stages/evaluating.json").exists()


@pytest.mark.faults
def test_a_pod_that_is_stopped_during_its_evaluation_keeps_its_model_and_the_next_attempt_evaluates(model: Path, tmp_path: Path) -> None:
    with make_evaluating_pod(tmp_path, model, {}) as stopped_pod:
        stopped_pod.wait_until(lambda: (report := stopped_pod.report()) is not None and report.output is not None and report.stage is Stage.EVALUATING)
        stopped_pod.terminate()
        assert stopped_pod.end() == ExitCode.PREEMPTED_SAVED, stopped_pod.text[-6000:]
    message = stopped_pod.termination_message()
    assert message.output is not None and message.evaluation is None and "after training" in (message.message or "")
    with make_evaluating_pod(tmp_path, model, {}, attempt=2) as resumed_pod:
        assert resumed_pod.end() == ExitCode.OK, resumed_pod.text[-6000:]
    assert resumed_pod.termination_message().output == message.output
    assert resumed_pod.termination_message().evaluation is not None
    assert "step 1/4" not in resumed_pod.text
