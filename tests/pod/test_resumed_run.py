"""One run whose first attempt was killed: its metric files, TensorBoard values, lineage statement, report and use of time cover both attempts."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.lineage import Statement
from finetune_api.names import REPORT_KEY
from finetune_api.pod import TerminationMessage
from finetune_api.status import Attempt, AttemptTime, TimeUse
from finetune_operator.goodput import (
    AttemptTimes,
    PodTimes,
    build_goodput,
    split_attempt_time,
    split_lost_steps,
    sum_parts,
)
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.supervisor.remaining_time import estimate_step_seconds
from pod_harness import UID
from report_run import (
    KILLED_AFTER_STEP,
    SECRET,
    STEPS,
    TwoAttempts,
    make_number_rows,
    read_json,
    run_with_report,
    stored_run_folder,
)
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.html_page import Element, parse_page, read_table
from tests.support.tiny import make_tiny_model

CHANGED_SPEC: dict[str, Any] = {
    "checkpoint": {"keep": 2}, "output": {"runName": {"prefix": "sums-", "name": "Run 1"}},
    "tracking": {"reportTo": ["tensorboard"], "systemMetrics": True},
    "placement": {"env": [{"name": "MY_VALUE", "value": "not-for-others"}]},
}  # fmt: skip


@dataclass(frozen=True)
class ResumedRun:
    """A run with two attempts that has ended."""

    folder: Path
    model: Path
    attempts: TwoAttempts

    @property
    def message(self) -> TerminationMessage:
        """The termination message of the second attempt."""
        return self.attempts.message

    @property
    def store(self) -> Path:
        """The folder in storage with the files of the run."""
        return stored_run_folder(self.folder)

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The logged entries of both attempts."""
        return [json.loads(line) for line in (self.store / "metrics/log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ResumedRun:
    model, folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"), tmp_path_factory.mktemp("run")
    return ResumedRun(folder, model, run_with_report(folder, model, CHANGED_SPEC))


def read_tensor_shapes(path: Path) -> list[tuple[int, ...]]:
    """Return the shapes of all tensors in a safetensors file."""
    with safe_open(path, "pt") as file:
        return [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118  a safetensors file cannot be iterated like a mapping


def test_metric_files_cover_all_attempts(run: ResumedRun) -> None:
    step_entries, epoch_entries, final_metrics, performance_summary, training_metrics = (
        read_json(run.store / "metrics" / f"{name}.json")
        for name in ("step_metrics", "epoch_metrics", "final_metrics", "performance_summary", "training_metrics")
    )
    assert [entry["step"] for entry in step_entries] == list(range(1, STEPS + 1))
    assert step_entries[0].keys() == {"step", "loss", "learning_rate", "grad_norm", "timestamp"}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", entry["timestamp"]) for entry in step_entries)
    assert [entry["epoch"] for entry in epoch_entries] == list(range(1, len(epoch_entries) + 1)) and epoch_entries[-1]["eval_loss"] is not None
    assert final_metrics["training_summary"]["total_steps"] == STEPS and final_metrics["training_summary"]["final_eval_loss"] == epoch_entries[-1]["eval_loss"]
    assert final_metrics["configuration"]["technique"] == "full" and final_metrics["configuration"]["batch_size"] == "8"
    assert performance_summary["trainable_parameters"] == sum(math.prod(shape) for shape in read_tensor_shapes(run.model / "model.safetensors"))
    assert performance_summary["training_time_minutes"] * 60 == pytest.approx(final_metrics["training_summary"]["total_training_time"])
    assert len(training_metrics["loss_history"]) == STEPS
    training_seconds = [entry["training_seconds"] for entry in run.logged]
    assert training_seconds == sorted(training_seconds)
    test_rows = [json.loads(line) for line in (run.store / "metrics/test_split.jsonl").read_text().splitlines()]
    assert len(test_rows) == 23 and all(row in make_number_rows() for row in test_rows)


def test_each_step_is_in_tensorboard_once(run: ResumedRun) -> None:
    (folder,) = (run.store / "tracking/tensorboard").iterdir()
    assert folder.name == "sums-run-1"
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    logged_losses = [(line["step"], line["loss"]) for line in run.logged if "loss" in line]
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert losses == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged_losses]
    perplexity = run.message.evaluation.metrics["perplexity"].value  # type: ignore[union-attr,index]
    assert [(event.step, event.value) for event in events.Scalars("evaluate/perplexity")] == [(STEPS, pytest.approx(perplexity))]
    samples = [json.loads(line) for line in (run.store / "metrics/system_metrics.jsonl").read_text().splitlines()]
    assert samples and samples[0]["values"]["system/system_memory_usage_megabytes"] > 0
    assert [event.step for event in events.Scalars("system/cpu_utilization_percentage")] == sorted({line["seconds"] for line in samples})
    tracker_state = read_json(run.store / "run/trackers.json")["trackers"]["tensorboard"]
    assert tracker_state["hasEnded"] and tracker_state["address"].endswith("tracking/tensorboard/sums-run-1") and tracker_state["problem"] is None


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_lineage_statement_describes_all_attempts_the_inputs_and_every_file(run: ResumedRun) -> None:
    output = run.message.output
    assert output is not None and output.lineage_uri == f"file://{run.store}/lineage/statement.json"
    text = (run.store / "lineage/statement.json").read_text()
    statement = Statement.model_validate_json(text)
    files = {path.name: sha256(path) for path in Path((output.uri or "").removeprefix("file://")).iterdir()}
    assert {subject.name: subject.digest["sha256"] for subject in statement.subject} == files and len(statement.subject) == len(files)
    dependencies = {dependency.name: dependency.digest.get("sha256") for dependency in statement.predicate.build_definition.resolved_dependencies}
    assert dependencies["dataset.train/sums-and-products.jsonl"] == sha256(run.folder / "sums-and-products.jsonl")
    assert dependencies["model.source/model.safetensors"] == sha256(run.model / "model.safetensors")
    assert statement.job == f"team-a/sums-bot/{UID}" and statement.run.step == STEPS and statement.spec["training"]["seed"] == 42
    assert run.message.resumed_from_step is not None and run.message.resumed_from_step >= KILLED_AFTER_STEP
    assert [(attempt.attempt, attempt.start_step) for attempt in statement.run.attempts] == [(1, 0), (2, run.message.resumed_from_step)]
    resolved = statement.run.attempts[1].resolved
    assert resolved is not None and resolved.device == "cpu"
    checkpoints = {byproduct.name: byproduct.digest["sha256"] for byproduct in statement.predicate.run_details.byproducts}
    markers = {f"checkpoints/{path.parent.name}": read_json(path)["manifestSha256"] for path in run.store.glob("checkpoints/*/_COMMITTED")}
    assert checkpoints == markers and len(markers) == 2
    assert "not-for-others" not in text and statement.spec["placement"]["env"] == [{"name": "MY_VALUE"}]
    versions = statement.predicate.run_details.builder.version
    assert {"python", "torch", "transformers", "peft", "trl"} <= versions.keys()


def read_badge(page: Element) -> str:
    """Return the text of the badge that shows the phase of the run."""
    return next(element.full_text for element in page.find_all("span") if "badge" in element.attributes.get("class", ""))


def test_the_report_covers_all_steps_and_attempts(run: ResumedRun) -> None:
    message, store = run.message, run.store
    assert message.output is not None and message.output.report_uri == f"file://{store}/{REPORT_KEY}"
    text = (store / REPORT_KEY).read_text()
    page = parse_page(text)
    assert read_badge(page) == "Completed" and SECRET not in text
    attempt_rows = read_table(page, "Attempts of the run")
    resume_step = int(attempt_rows[2][3])
    assert [row[0] for row in attempt_rows] == ["attempt", "1", "2"] and attempt_rows[2][4] == str(STEPS) and resume_step % 20 == 0
    assert attempt_rows[1][3:5] == ["0", attempt_rows[1][4]] and int(attempt_rows[1][4].removesuffix(" or later")) >= resume_step
    assert (attempt_rows[1][6], attempt_rows[2][6]) == ("The pod was killed before it could write a reason.", "completed")
    figures = {figure.find_all("strong")[0].full_text: figure for figure in page.find_all("figure")}
    point_counts = {figure: len(element.find_all("path")[0].attributes["d"].split("L")) for figure, element in figures.items() if element.find_all("path")}
    assert point_counts["Training loss"] == point_counts["Learning rate"] == point_counts["Gradient norm"] == STEPS
    assert point_counts["Validation loss"] == STEPS // 10
    assert figures["Training loss"].find_all("g", **{"class": "attempts"})[0].full_text == "attempt 2 attempt 2"
    evaluated_steps = [row.children[0].full_text for row in figures["Validation loss"].find_all("tr")[1:]]
    assert evaluated_steps == [str(step) for step in range(10, STEPS + 1, 10)]
    metric_cells = {row[0]: row[1] for row in read_table(page, "Evaluation of 23 rows after training")}
    assert {"loss", "perplexity", "accuracy", "f1", "bleu", "rougeL"} < metric_cells.keys()
    assert len(page.find_all("article")) == 2 * 12, "the report shows each of 12 answers twice: alone, and next to the answer of the base model"
    check_cells = dict(read_table(page, "Checks of the training rows"))
    assert (check_cells["duplicates left out"], check_cells["rows that may hold personal data: email"]) == ("1", "1")
    origin_cells = dict(read_table(page, "Model and inputs"))
    assert (origin_cells["final model"], origin_cells["sha256 of the model's manifest"]) == (message.output.uri, message.output.sha256)
    assert {row[0] for row in read_table(page, "Files of the final model")[1:]} >= {"model.safetensors", "tokenizer.json"}
    records = [read_json(path) for path in sorted((store / "run/records").iterdir())]
    assert [(record["attempt"], "endedAt" in record) for record in records] == [(1, False), (2, True)]


def split_observed_time(times: tuple[datetime, datetime], reported_time: TimeUse | None, last_part: str) -> dict[str, float]:
    """Return how many seconds an attempt spent on each of its parts, such as training. The attempt's pod is scheduled without a delay."""
    assert reported_time is not None
    begins_at, ends_at = times
    pod_times = PodTimes(begins_at, begins_at, begins_at, ends_at, reported_time.seconds(), last_part)
    attempt_times = AttemptTimes(begins_at, ends_at, job_created_at=begins_at, pods=[pod_times])
    return {part: round(seconds, 3) for part, seconds in split_attempt_time(attempt_times).items()}


def test_the_parts_of_the_time_sum_to_the_wall_time_of_both_attempts(run: ResumedRun) -> None:
    attempts, message = run.attempts, run.attempts.message
    first_parts = split_observed_time(attempts.first_times, attempts.first_report.time_use, "steps")
    second_parts = split_observed_time(attempts.second_times, message.time_use, "other")
    assert {"starting", "checking", "loading", "firstStep", "steps", "evaluation", "saving"} <= first_parts.keys() and "other" not in first_parts
    assert {"firstStep", "steps", "evaluation", "upload", "finishing", "other"} <= second_parts.keys()

    entries = [AttemptTime(number=number, wall_seconds=sum_parts(parts), parts=parts) for number, parts in ((1, first_parts), (2, second_parts))]
    records = [
        Attempt(number=1, last_step=attempts.first_report.progress.step),
        Attempt(number=2, resumed_from_step=message.resumed_from_step, last_step=STEPS),
    ]
    goodput = build_goodput(split_lost_steps(entries, records), {})
    wall_seconds = sum((end - start).total_seconds() for start, end in (attempts.first_times, attempts.second_times))
    parts = goodput.parts.seconds()
    assert min(parts.values()) > 0 and sum(parts.values()) == pytest.approx(wall_seconds, rel=0.001)
    assert goodput.attempts[0].parts["lostSteps"] > 0 and "lostSteps" not in goodput.attempts[1].parts
    assert parts["other"] < 0.01 * wall_seconds, parts


def test_a_resumed_attempt_can_estimate_its_end_from_the_steps_of_the_first_attempt(run: ResumedRun) -> None:
    entries = [LogEntry.model_validate(line) for line in run.logged]
    first_entries = [entry for entry in entries if entry.step <= KILLED_AFTER_STEP]
    facts = RunFacts(world_size=1, effective_batch=8)
    estimated_seconds = estimate_step_seconds(first_entries, facts, facts)
    first_start, first_end = run.attempts.first_times
    assert estimated_seconds is not None and 0 < estimated_seconds < (first_end - first_start).total_seconds() / KILLED_AFTER_STEP
