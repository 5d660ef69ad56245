"""A sample run for the tests of the report."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.defaults import resolve_defaults
from finetune_api.lineage import AttemptRecord
from finetune_api.pod import ResumeConfig, RunConfig, StoreTarget, World
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import EvaluationResult, GateResult, MetricResult, Output, ResolvedConfig
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.report.run_report import (
    CompletedStage,
    DataRecord,
    ModelFile,
    RunReport,
    StoredCheckpoint,
)
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.results.model_comparison import (
    ComparedAnswers,
    ComparisonMetadata,
    GenerationParams,
    ModelComparison,
)

START = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def make_attempt_record(number: int, **fields: Any) -> AttemptRecord:
    """Return the record of an attempt that took ten minutes on two GPUs."""
    started_at = START + timedelta(hours=number - 1)
    defaults = {
        "attempt": number, "incarnation": f"a{number}-00000000", "started_at": started_at, "ended_at": started_at + timedelta(minutes=10), "gpus": 2,
        "start_step": 0, "last_step": 4, "exit_code": 0,
    }  # fmt: skip
    return AttemptRecord(**{**defaults, **fields})


def make_training_line(step: int, **values: Any) -> LogEntry:
    """Return the log entry of a training line."""
    defaults = {"step": step, "epoch": step / 4, "loss": 2.0 / step, "learning_rate": 2e-4, "grad_norm": 0.5, "training_seconds": step * 10.0}
    return LogEntry(**{**defaults, "unix_time": START.timestamp() + step, **values})


def make_comparison() -> ModelComparison:
    """Return a comparison of one prompt with the answers of both models."""
    answers = ComparedAnswers.of(1, "Which town?", base_answer="I cannot say.", trained_answer="Oslo.", time=START)
    metadata = ComparisonMetadata(
        base_model="org/m", finetuned_model_path="s3://b/x", prompts_file="p", num_prompts=1, device="cpu", comparison_date="2026-03-01",
        generation_params=GenerationParams(max_new_tokens=8, temperature=1, top_p=1, do_sample=False),
    )  # fmt: skip
    return ModelComparison(metadata=metadata, comparisons=[answers])


def make_sample_report(spec: dict[str, Any] | None = None, **fields: Any) -> RunReport:
    """Return the report of a completed run with two attempts and all kinds of results."""
    spec_fields = {"model": {"source": "org/base@main"}, "dataset": {"train": "s3://data/rows.jsonl"}, "training": {"epochs": 1}, **(spec or {})}
    resolution = resolve_defaults(FineTuneJobSpec.model_validate(spec_fields))
    run = RunConfig(
        name="bot", namespace="team-a", uid="uid", attempt=2, spec=resolution.spec, defaults=sorted(resolution.defaults),
        world=World(nodes=1, processes_per_node=2, gpus_per_node=2, master_address="127.0.0.1", master_port=0, rendezvous_id="uid-2"),
        storage=StoreTarget(uri="s3://models/team-a/bot/uid"), resume=ResumeConfig(mode="auto"), grace_seconds=60,
    )  # fmt: skip
    metrics = {
        "accuracy": MetricResult(value=0.83, base=0.79, difference=0.04, low=0.012, high=0.068),
        "bertscore": MetricResult(reason="the model of bertscore has no weights"),
    }
    defaults: dict[str, Any] = {
        "run": run, "config_sha256": "c0ffee", "written_at": START + timedelta(hours=2), "started_at": START,
        "attempts": (
            make_attempt_record(1, last_step=2, exit_code=71, code="GpuOutOfMemory", message="no memory left"),
            make_attempt_record(2, start_step=2, notes=["1 duplicate rows were left out"], timings={"training": 90.0}, resolved=ResolvedConfig(device="H100")),
        ),
        "log": (
            make_training_line(1, tokens_per_second=100.0), make_training_line(2), LogEntry(step=2, eval_loss=1.5),
            make_training_line(3, loss=float("nan")), make_training_line(4),
        ),
        "output": Output(uri="s3://models/team-a/bot/uid/model/a2", sha256="abc", kind="adapter", evaluation={"testLoss": 1.25}),
        "evaluation": EvaluationResult(rows=8, metrics=metrics, gates=[GateResult(metric="accuracy", passed=True, text="accuracy is 0.83")]),
        "data": DataRecord(formats=["messages"], rows={"train": 1200, "test": 8}, duplicates=1, personal_data={"email": 3}),
        "token_counts": {"train": {"tokens": 54321, "longest": 99, "truncated": 7}},
        "checkpoints": (StoredCheckpoint(4, 2, "feed", True, 12_000_000, 1.5),), "model_files": (ModelFile("adapter.safetensors", 2048, "beef"),),
        "stages": (CompletedStage("evaluating", 2, "2026-03-01T13:08:00.1+00:00"),), "versions": {"torch": "2.9"},
        "predictions": (Prediction(None, "2 + 2?", "4", "4"), Prediction(None, "2 + 3?", "7", "5")), "prediction_count": 2, "comparison": make_comparison(),
    }  # fmt: skip
    return RunReport(**{**defaults, **fields})
