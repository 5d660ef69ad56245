"""Runs the stage `evaluating`: measures the final model on the held-out rows, and stores its answers to the questions in these rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune_api.names import Storage
from finetune_api.pod import RunConfig
from finetune_api.rules import compares_metrics, metrics_after_training
from finetune_api.status import EvaluationResult, MetricResult

from finetune_trainer.channel import Channel
from finetune_trainer.evaluation.gates import evaluate_gates
from finetune_trainer.evaluation.predictions import Prediction, write_predictions
from finetune_trainer.evaluation.summary_files import write_results, write_summary, write_workbook
from finetune_trainer.evaluation.values import MetricValue
from finetune_trainer.inputs import Inputs
from finetune_trainer.stages.files import MEASUREMENTS_FILE, OUTPUT_FOLDER, StageResult, StageTask
from finetune_trainer.stages.final_model import load_final_model
from finetune_trainer.stages.measure import ModelResults, load_held_out, measure_model

PREDICTIONS_FILE, RESULTS_FILE = "predictions.jsonl", "evaluation_results.json"
SUMMARY_FILE, WORKBOOK_FILE = "evaluation_summary.json", "evaluation_detailed.xlsx"


def run_stage(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask, folder: Path) -> StageResult:
    """Evaluate the final model, and write the files of the stage."""
    model_results = measure_model(run, channel, inputs, load_held_out(run, channel, inputs, task, load_final_model))
    _write_files(run, model_results, folder / OUTPUT_FOLDER)
    return StageResult(evaluation=_summarise(run, model_results))


def _write_files(run: RunConfig, model_results: ModelResults, folder: Path) -> None:
    predictions, values = model_results.predictions, model_results.measurements.values
    model_results.measurements.write(folder / MEASUREMENTS_FILE)
    if predictions:
        write_predictions(folder / PREDICTIONS_FILE, predictions)
    if metrics_after_training(run.spec):
        write_results(folder / RESULTS_FILE, values)
        write_summary(folder / SUMMARY_FILE, values)
        if predictions:
            write_workbook(folder / WORKBOOK_FILE, predictions, {name: value for name, value in values.items() if _has_row_of_each(value, predictions)})


def _has_row_of_each(value: MetricValue, predictions: Sequence[Prediction]) -> bool:
    return value.rows is not None and len(value.rows) == len(predictions)


def _summarise(run: RunConfig, model_results: ModelResults) -> EvaluationResult:
    """Return the results for the status. The results of the gates are included only if no stage `comparing` follows, because that stage evaluates the gates."""
    measurements, gates = model_results.measurements, run.spec.evaluation.gates
    decides_gates = gates is not None and not compares_metrics(run.spec)
    return EvaluationResult(
        rows=measurements.row_count or None, metrics=_build_metric_results(measurements.values) or None,
        gates=evaluate_gates(gates, measurements.gate_values, {}) if decides_gates and gates else None,
        predictions_uri=f"{run.storage.uri}/{Storage.EVALUATION}/{PREDICTIONS_FILE}" if model_results.predictions else None,
    )  # fmt: skip


def _build_metric_results(values: Mapping[str, MetricValue]) -> dict[str, MetricResult]:
    return {name: MetricResult(value=value.value, reason=value.reason) for name, value in values.items()}
