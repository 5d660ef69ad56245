"""One pod with all stages after training: it evaluates its model, compares the model with the base model, checks the gates, verifies the
stored adapter and copies all results below `output.dir`."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.names import ExitCode
from finetune_api.pod import StoreTarget, TerminationMessage
from finetune_api.status import EvaluationResult, Output, VerificationOutcome
from pod_harness import UID, Pod, run_config, write_rows

from tests.support.tiny import make_tiny_model

TEST_ROWS = 8
GATES = [
    {"metric": "perplexity", "op": "le", "value": 1000},
    {"metric": "loss", "notWorseThanBase": {"margin": 5}},
    {"metric": "rouge", "notWorseThanBase": {"margin": 1}},
]


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended: its folder in storage, the folder with the copied results, and its termination message."""

    store: Path
    copy: Path
    message: TerminationMessage

    @property
    def output(self) -> Output:
        assert self.message.output is not None
        return self.message.output

    @property
    def evaluation(self) -> EvaluationResult:
        assert self.message.evaluation is not None
        return self.message.evaluation

    def read_json(self, key: str) -> Any:
        return json.loads((self.store / key).read_text())

    def predictions(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.store / "evaluation/predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> EndedRun:
    folder = tmp_path_factory.mktemp("run")
    model, rows = make_tiny_model(folder / "tiny"), write_rows(folder / "rows.jsonl")
    metrics = ["perplexity", "accuracy", "precision", "recall", "f1", "bleu", "rouge"]
    spec = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "split": {"train": 28 / 36, "test": 8 / 36}},
        "training": {"maxSteps": 4, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 1e-2},
        "checkpoint": {"steps": 2}, "tracking": {"loggingSteps": 1}, "method": {"type": "lora"}, "phases": {"infer": True},
        "evaluation": {"metrics": metrics, "comparison": {"generation": {"maxNewTokens": 8}}, "gates": GATES},
        "output": {"dir": "results/latest", "layout": "flat", "serving": ["vllm"], "verify": True},
    }  # fmt: skip
    store, copy = folder / "store/team/job" / UID, folder / "store/results/latest"
    config = run_config(spec, StoreTarget(uri=f"file://{store}")).model_copy(update={"publish": f"file://{copy}"})
    with Pod(config, folder / "pod") as pod:
        assert pod.end() == ExitCode.OK, pod.text[-6000:]
        return EndedRun(store, copy, pod.termination_message())


def test_the_model_is_measured_and_its_answers_are_stored(run: EndedRun) -> None:
    metric_values = {name: metric.value for name, metric in (run.evaluation.metrics or {}).items()}
    assert run.evaluation.rows == TEST_ROWS and run.output.evaluation is not None
    assert metric_values.keys() == {"loss", "perplexity", "accuracy", "precision", "recall", "f1", "exactMatch", "bleu", "rouge1", "rouge2", "rougeL"}
    # The trainer process has already measured the same rows at the end of the training.
    assert metric_values["loss"] == pytest.approx(run.output.evaluation["testLoss"], abs=1e-4)
    assert metric_values["accuracy"] == pytest.approx(run.output.evaluation["testTokenAccuracy"], abs=1e-4)
    assert metric_values["recall"] == metric_values["accuracy"]
    assert math.isclose(metric_values["perplexity"] or 0, math.exp(metric_values["loss"] or 0), rel_tol=1e-3)
    predictions = run.predictions()
    assert len(predictions) == TEST_ROWS and predictions[0].keys() == {"system_prompt", "user_prompt", "assistant_response", "ground_truth"}
    assert all(row["user_prompt"].startswith("What is ") and row["ground_truth"].startswith("It is ") for row in predictions)
    assert run.read_json("evaluation/evaluation_summary.json")["bleu_score"] == pytest.approx(metric_values["bleu"], abs=1e-3)
    assert (run.store / "evaluation/evaluation_detailed.xlsx").exists() and (run.store / "evaluation/evaluation_results.json").exists()
    assert (run.store / "run/stages/evaluating.json").exists()


def test_the_model_is_compared_with_the_base_model_and_promoted(run: EndedRun) -> None:
    evaluation, output, metrics = run.evaluation, run.output, run.evaluation.metrics or {}
    assert output.promoted is True
    for name, metric in metrics.items():
        assert None not in (metric.value, metric.base, metric.difference), name
        assert metric.difference == pytest.approx((metric.value or 0) - (metric.base or 0), abs=2e-3), name
        assert metric.low is not None and metric.high is not None and metric.low <= (metric.difference or 0) <= metric.high, (name, metric)
    assert (metrics["loss"].high or 0) < 0  # the whole confidence interval shows a lower loss on the held-out rows
    assert [(gate.metric, gate.passed) for gate in evaluation.gates or []] == [("perplexity", True), ("loss", True), ("rouge", True)]
    promotion = run.read_json("model/_PROMOTED")
    assert (promotion["manifestSha256"], promotion["uri"], promotion["attempt"], len(promotion["gates"])) == (output.sha256, output.uri, 1, 3)
    comparison = run.read_json("evaluation/model_comparison.json")
    assert evaluation.comparison_uri == f"file://{run.store}/evaluation/model_comparison.json"
    assert [row["finetuned_model_response"] for row in comparison["comparisons"]] == [row["assistant_response"] for row in run.predictions()]
    assert [row["label"] for row in comparison["comparisons"]] == [row["ground_truth"] for row in run.predictions()]
    assert comparison["metadata"]["prompts_file"] == "test set" and comparison["metadata"]["generation_params"]["max_new_tokens"] == 8
    assert {row["base_model_response"] for row in comparison["comparisons"]} != {row["finetuned_model_response"] for row in comparison["comparisons"]}


def test_the_stored_adapter_computes_what_was_trained(run: EndedRun) -> None:
    verification = run.output.verification
    assert verification is not None and (verification.result, verification.rows) == (VerificationOutcome.VERIFIED, TEST_ROWS)
    # The reference values contain rows of the user's data. As the model folder is published, they are stored outside it.
    (reference_file,) = (run.store / "run").glob("reference-values-*.json")
    assert verification.tokens == sum(len(row["values"]) for row in json.loads(reference_file.read_text())["rows"])
    assert not list((run.store / "model").rglob("reference-values*"))
    (artefact,) = verification.artefacts
    assert (artefact.artefact, artefact.result, artefact.reason, artefact.tolerance) == ("adapter", VerificationOutcome.VERIFIED, None, 1e-3)
    assert artefact.difference is not None and artefact.difference <= 1e-5
    assert artefact.change_from_base is not None and artefact.change_from_base > 0.01
    assert (run.store / "run/stages/verifying.json").exists()
    deployment = next(yaml.safe_load_all((run.store / "serving/vllm.yaml").read_text()))
    assert run.output.uri in deployment["spec"]["template"]["spec"]["initContainers"][0]["args"]


def test_all_results_are_copied_below_the_output_folder(run: EndedRun) -> None:
    assert run.output.uri is not None and run.output.published_uri == f"file://{run.copy}"
    model_folder = Path(run.output.uri.removeprefix("file://"))
    for path in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json"):
        assert (run.copy / path).read_bytes() == (model_folder / path).read_bytes()
    copied_names = {path.name for path in run.copy.iterdir() if path.is_file()}
    metric_files = {"step_metrics.json", "epoch_metrics.json", "final_metrics.json", "training_metrics.json", "performance_summary.json", "log.jsonl"}
    evaluation_files = {"evaluation_results.json", "evaluation_summary.json", "model_comparison.json"}
    assert metric_files | evaluation_files | {"report.html", "test_split.jsonl", "vllm.yaml"} <= copied_names
    assert json.loads((run.copy / "evaluation_results.json").read_text())["perplexity"] > 1
