"""Checks that a finished job has written all results that its spec requests."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_api.status import EvaluationResult, FineTuneJobStatus, Output, OutputKind, VerificationOutcome

from tests.support.mlflow_runs import MlflowRuns
from tests.support.page_examples import FIRST_NUMBERS, HELD_OUT_COUNT, PROMPTS, ROW_COUNT

METRIC_FILES = {"step_metrics.json", "epoch_metrics.json", "final_metrics.json", "training_metrics.json", "performance_summary.json", "log.jsonl"}
TOKEN_METRICS = ("accuracy", "f1", "precision", "recall")
RESULT_NAMES_BY_METRIC = {"rouge": ("rouge1", "rouge2", "rougeL"), "perplexity": ("perplexity", "loss")}
"""The names that the results use for a metric of the spec. A metric that is not listed here has the same name in the spec and in the results."""
FULL_METHODS = ("full", "spectrum")
GPT2_LAYERS = {"c_attn", "c_fc", "c_proj"}
LLAMA_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True)
class FinishedRun:
    """A finished job: the spec of its manifest, its status, and functions that read and list stored objects by URI."""

    spec: dict[str, Any]
    status: FineTuneJobStatus
    read: Callable[[str], bytes]
    list_files: Callable[[str], list[str]]
    """Returns the paths of all files below a URI, relative to the URI."""

    @property
    def output(self) -> Output:
        assert self.status.output is not None
        return self.status.output

    @property
    def evaluation(self) -> EvaluationResult:
        assert self.status.evaluation is not None
        return self.status.evaluation

    @property
    def folder(self) -> str:
        """URI of the job's folder in storage."""
        return str(self.output.uri).rpartition("/model/")[0]

    def get_field(self, path: str) -> Any:
        """Return the spec field at a dotted path, such as `method.lora.rank`; None if it is not set."""
        value: Any = self.spec
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def read_json(self, path: str) -> Any:
        """Return the content of a JSON file in the job's folder."""
        return json.loads(self.read(f"{self.folder}/{path}"))

    def read_rows(self, path: str) -> list[dict[str, Any]]:
        """Return the rows of a JSONL file in the job's folder."""
        return [json.loads(line) for line in self.read(f"{self.folder}/{path}").splitlines()]


def check_results(run: FinishedRun, steps: int) -> None:
    """Check that a run with `steps` optimizer steps has written the results that its spec requests. Errors: AssertionError."""
    _check_progress(run, steps)
    _check_model(run)
    _check_metric_files(run, steps)
    _check_published_copy(run)
    _check_report_and_lineage(run)
    if has_validation(run):
        _check_validation(run)
    if run.get_field("dataset.split.test") or run.get_field("dataset.test"):
        _check_test_rows(run)
    if run.get_field("phases.evaluate") is not False and (metrics := run.get_field("evaluation.metrics")):
        _check_metrics(run, metrics)
    if run.get_field("phases.infer"):
        _check_predictions(run)
    if run.get_field("evaluation.comparison.promptsRef"):
        _check_comparison(run)
    if benchmarks := run.get_field("evaluation.benchmarks"):
        _check_benchmarks(run, benchmarks)


def has_validation(run: FinishedRun) -> bool:
    """Whether the job has validation data."""
    return bool(run.get_field("dataset.validation") or run.get_field("dataset.split.validation"))


def _check_progress(run: FinishedRun, steps: int) -> None:
    progress, metrics = run.status.progress, run.status.metrics
    assert progress is not None and metrics is not None
    assert (progress.step, progress.total_steps, run.status.restarts) == (steps, steps, 0)
    assert metrics.train_loss is not None and 0 < metrics.train_loss < 20
    interval, kept_count = run.get_field("checkpoint.steps"), run.get_field("checkpoint.keep")
    saved_steps = {*range(interval, steps, interval), steps} if interval else None
    stored_steps = {int(path.partition("/")[0].removeprefix("step-")) for path in run.list_files(f"{run.folder}/checkpoints") if path.endswith("/_COMMITTED")}
    if saved_steps is not None:
        assert stored_steps <= saved_steps and steps in stored_steps
        assert stored_steps == saved_steps if not kept_count else len(stored_steps) <= kept_count + 2  # + 2: the best and the newest checkpoint


def _check_model(run: FinishedRun) -> None:
    files = {entry["path"] for entry in json.loads(run.read(f"{run.output.uri}/manifest.json"))["files"]}
    assert files <= set(run.list_files(str(run.output.uri)))
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= files
    method = run.get_field("method.type")
    if method in FULL_METHODS:
        assert run.output.kind is OutputKind.MODEL and "model.safetensors" in files
    else:
        assert run.output.kind is OutputKind.ADAPTER and "adapter_model.safetensors" in files
        _check_adapter(run, json.loads(run.read(f"{run.output.uri}/adapter_config.json")))
    verification = run.output.verification
    assert verification is not None
    artefacts = [entry.artefact for entry in verification.artefacts or []]
    for entry in verification.artefacts or []:
        # An adapter of a quantised base is merged into the unquantised base. So the merged model differs from the trained model by the quantisation error.
        assert entry.result is VerificationOutcome.VERIFIED or (entry.artefact, entry.code, method) == ("merged", "BaseWasQuantised", "qlora"), entry
    is_merged = bool(run.get_field("output.mergeAdapter"))
    assert artefacts == (["model"] if method in FULL_METHODS else ["adapter", "merged"] if is_merged else ["adapter"])
    if is_merged:
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(run.list_files(str(run.output.merged_uri)))


def _check_adapter(run: FinishedRun, adapter_config: dict[str, Any]) -> None:
    lora = run.get_field("method.lora")
    assert (adapter_config["r"], adapter_config["lora_alpha"], adapter_config["lora_dropout"]) == (lora["rank"], lora["alpha"], lora["dropout"])
    assert adapter_config["use_dora"] is (run.get_field("method.type") == "dora")
    assert adapter_config["use_rslora"] is bool(lora.get("rankStabilized"))
    target_modules = {name.rpartition(".")[2] for name in adapter_config["target_modules"]}
    if requested_modules := lora.get("targetModules"):
        assert target_modules == set(requested_modules)
    else:
        assert target_modules in (GPT2_LAYERS, LLAMA_LAYERS)


def _check_metric_files(run: FinishedRun, steps: int) -> None:
    assert set(run.list_files(f"{run.folder}/metrics")) >= METRIC_FILES
    final_metrics = run.read_json("metrics/final_metrics.json")
    summary, configuration = final_metrics["training_summary"], final_metrics["configuration"]
    assert (summary["total_steps"], configuration["technique"]) == (steps, run.get_field("method.type"))
    assert configuration["batch_size"] == str(run.get_field("training.batchSizePerDevice"))
    assert float(configuration["learning_rate"]) == run.get_field("training.learningRate")
    assert run.status.metrics is not None
    assert run.status.metrics.train_loss == pytest.approx(read_logged_losses(run)[-1][1], rel=1e-5)
    assert summary["best_train_loss"] <= summary["final_train_loss"] < 20
    logging_interval = run.get_field("tracking.loggingSteps")
    expected_steps = sorted({1, *range(logging_interval, steps + 1, logging_interval), steps})
    assert [entry["step"] for entry in run.read_json("metrics/step_metrics.json")] == expected_steps
    epochs = run.read_json("metrics/epoch_metrics.json")
    assert [entry["epoch"] for entry in epochs] == list(range(1, len(epochs) + 1))
    if not run.get_field("training.maxSteps"):
        assert len(epochs) == run.get_field("training.epochs") == summary["total_epochs"]


def _check_published_copy(run: FinishedRun) -> None:
    copy_uri, has_folders = str(run.output.published_uri), run.get_field("output.layout") == "projectModelTime"
    root, output_folder = run.get_field("storage.uri"), run.get_field("output.dir")
    assert copy_uri.startswith(f"{root}/{output_folder}/{run.get_field('output.project')}/" if has_folders else f"{root}/{output_folder}")
    model_uri = f"{copy_uri}/model" if has_folders else copy_uri
    weights_name = "model.safetensors" if run.output.kind is OutputKind.MODEL else "adapter_model.safetensors"
    assert run.read(f"{model_uri}/{weights_name}") == run.read(f"{run.output.uri}/{weights_name}")
    files = set(run.list_files(copy_uri))
    assert METRIC_FILES | {"report.html"} <= files
    if run.get_field("output.mergeAdapter"):
        assert "merged/model.safetensors" in files
    if run.get_field("evaluation.comparison.promptsRef"):
        assert "model_comparison.json" in files


def _check_report_and_lineage(run: FinishedRun) -> None:
    page = run.read(str(run.output.report_uri)).decode()
    assert page.startswith("<!doctype html>") and str(run.output.uri) in page
    statement = json.loads(run.read(str(run.output.lineage_uri)))
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    manifest = json.loads(run.read(f"{run.output.uri}/manifest.json"))
    assert subjects["manifest.json"] == run.output.sha256
    assert subjects.items() >= {entry["path"]: entry["sha256"] for entry in manifest["files"]}.items()


def _check_validation(run: FinishedRun) -> None:
    assert run.status.metrics is not None and run.status.metrics.eval_loss is not None
    last_epoch = run.read_json("metrics/epoch_metrics.json")[-1]
    assert run.status.metrics.eval_loss == pytest.approx(last_epoch["eval_loss"], rel=1e-5)
    assert 0 <= last_epoch["eval_accuracy"] <= 1
    if "f1" in (run.get_field("evaluation.metrics") or []):
        assert all(0 <= last_epoch[f"eval_{name}"] <= 1 for name in TOKEN_METRICS)
    if run.get_field("evaluation.steps"):
        evaluated_steps = {entry["step"] for entry in run.read_rows("metrics/log.jsonl") if "eval_loss" in entry}
        assert run.status.progress is not None and run.status.progress.step in evaluated_steps


def _check_test_rows(run: FinishedRun) -> None:
    split = run.get_field("dataset.split") or {}
    expected_count = ROW_COUNT - sum(math.floor(ROW_COUNT * split.get(name, 0)) for name in ("train", "validation"))
    assert len(run.read_rows("metrics/test_split.jsonl")) == (HELD_OUT_COUNT if run.get_field("dataset.test") else expected_count)
    assert run.output.evaluation is not None and run.output.evaluation["testRows"] > 0


def _check_metrics(run: FinishedRun, metrics: list[str]) -> None:
    metric_results = run.evaluation.metrics or {}
    names = [name for metric in metrics for name in RESULT_NAMES_BY_METRIC.get(metric, (metric,))]
    if run.get_field("dataset.format") == "mcq":
        names += [f"letter{metric.capitalize()}" for metric in metrics]
    for name in names:
        assert metric_results[name].value is not None, (name, metric_results[name].reason)
    stored_results = run.read_json("evaluation/evaluation_results.json")
    stored_values = {name: stored_results[_to_file_name(name)] for name in names}
    assert run.read_json("evaluation/evaluation_summary.json")
    if {"bleu", "rouge"} & set(metrics):
        assert run.read(f"{run.folder}/evaluation/evaluation_detailed.xlsx").startswith(b"PK")
    assert {name: metric_results[name].value for name in names} == pytest.approx(stored_values, rel=1e-3)


def _to_file_name(metric: str) -> str:
    name = re.sub("^letter(.)", lambda match: f"letter_{match[1].lower()}", metric)
    return f"{name}_f" if name.startswith("rouge") else name


def _check_predictions(run: FinishedRun) -> None:
    rows, first_number = run.read_rows("evaluation/predictions.jsonl"), FIRST_NUMBERS["test"]
    numbers = range(first_number, first_number + HELD_OUT_COUNT)
    assert len(rows) == HELD_OUT_COUNT
    assert all(row.keys() == {"system_prompt", "user_prompt", "assistant_response", "ground_truth"} for row in rows)
    assert [row["user_prompt"] for row in rows] == [f"What is {number} + 2?" for number in numbers]
    assert [row["ground_truth"] for row in rows] == [f"It is {number + 2}." for number in numbers]


def _check_comparison(run: FinishedRun) -> None:
    comparison = run.read_json("evaluation/model_comparison.json")
    assert comparison["metadata"]["generation_params"].items() >= {"max_new_tokens": 150, "temperature": 0.7, "top_p": 0.9, "do_sample": True}.items()
    assert [row["prompt"] for row in comparison["comparisons"]] == PROMPTS.strip().split("\n\n")
    assert all(row["base_model_response"] and row["finetuned_model_response"] for row in comparison["comparisons"])


def _check_benchmarks(run: FinishedRun, benchmarks: list[dict[str, Any]]) -> None:
    files = set(run.list_files(f"{run.folder}/evaluation"))
    benchmark_values = {(entry.name, entry.task, entry.metric): entry.value for entry in run.evaluation.benchmarks or []}
    assert all(value is not None for value in benchmark_values.values())
    for benchmark in benchmarks:
        name = benchmark["name"]
        if name == "human-eval":
            sheet = run.read(f"{run.folder}/evaluation/human_rating.csv").decode("utf-8-sig")
            assert len(list(csv.DictReader(io.StringIO(sheet)))) == 6
            assert {"human_rating.json", "human_rating_key.json", "human_rating_instructions.txt"} <= files
        elif name == "domain-specific-eval":
            assert (name, "sums", "bleu") in benchmark_values and "domain_sums_results.json" in files
        else:
            assert {task for result_name, task, _ in benchmark_values if result_name == name} == set(benchmark["tasks"])
            assert set(run.read_json("evaluation/lm_eval_results.json")) == set(benchmark["tasks"])
    assert len(run.read_json("evaluation/benchmark_results.json")["benchmarks"]) == len(benchmark_values)


# --- trackers -------------------------------------------------------------------------------------------------------


def read_logged_losses(run: FinishedRun) -> list[tuple[int, float]]:
    """Return (step, training loss) for each logged training loss."""
    return [(line["step"], line["loss"]) for line in run.read_rows("metrics/log.jsonl") if "loss" in line]


def check_tensorboard(run: FinishedRun, folder: Path) -> None:
    """Check the run's event files, which are read with TensorBoard's own reader. `folder` receives a copy of the files. Errors: AssertionError."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uri = f"{run.folder}/tracking/tensorboard"
    for path in run.list_files(uri):
        (folder / Path(path).name).write_bytes(run.read(f"{uri}/{path}"))
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    _check_same_losses([(event.step, event.value) for event in events.Scalars("train/loss")], run)


def check_wandb_files(run: FinishedRun, folder: Path) -> None:
    """Check the run's offline file for Weights & Biases, which is read with the message classes of the package `wandb`. `folder` receives a copy of the file.
    Errors: AssertionError.
    """
    from tests.support.wandb_file import read_history, read_summary

    uri = f"{run.folder}/tracking/wandb"
    [path] = [path for path in run.list_files(uri) if path.endswith(".wandb")]
    copied_file = folder / "run.wandb"
    copied_file.write_bytes(run.read(f"{uri}/{path}"))
    _check_same_losses([(row["_step"], row["loss"]) for row in read_history(copied_file) if "loss" in row], run)
    assert read_summary(copied_file)["artifact/model"] == run.output.uri


def check_mlflow(run: FinishedRun, runs: MlflowRuns) -> None:
    """Check the runs on an MLflow server: a parent run and a training run, both finished. Errors: AssertionError."""
    [run_name] = [name for name in runs.names() if f"{name}_finetuning" in runs.names()]
    run_name_spec = run.get_field("output.runName")
    assert run_name.startswith(run_name_spec.get("prefix", "")) and run_name.endswith(run_name_spec.get("suffix", ""))
    assert run_name_spec.get("name", run_name) == run_name
    parent, training = runs.run(run_name), runs.run(f"{run_name}_finetuning")
    assert (parent.info.status, training.info.status) == ("FINISHED", "FINISHED")
    assert training.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params["training.learningRate"] == str(run.get_field("training.learningRate"))
    _check_same_losses(runs.history(f"{run_name}_finetuning", "loss"), run)


def _check_same_losses(tracked_losses: list[tuple[int, float]], run: FinishedRun) -> None:
    logged_losses = read_logged_losses(run)
    assert logged_losses and [step for step, _ in tracked_losses] == [step for step, _ in logged_losses]
    assert [value for _, value in tracked_losses] == pytest.approx([loss for _, loss in logged_losses], rel=1e-6)
