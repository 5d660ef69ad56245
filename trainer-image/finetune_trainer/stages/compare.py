"""Runs the stage `comparing`: measures the base model in the same way as the stage `evaluating` measured the trained model, then evaluates the gates.

The process loads only the base model. It reads the measurements of the trained model from the file that the stage `evaluating` has stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.errors import InternalError
from finetune_api.names import Storage
from finetune_api.pod import RunConfig
from finetune_api.rules import compares_metrics, has_test_set, prompts_to_compare, value_or_default
from finetune_api.sources import redact_source
from finetune_api.spec.enums import OutputKind
from finetune_api.spec.results import Generation
from finetune_api.status import EvaluationResult, MetricResult

from finetune_trainer.channel import Channel
from finetune_trainer.evaluation.gates import PairedSums, compare_metric, evaluate_gates
from finetune_trainer.evaluation.measurements import Measurements, paired_sums
from finetune_trainer.evaluation.values import MetricValue
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs
from finetune_trainer.results.model_comparison import (
    ComparedAnswers,
    ComparisonMetadata,
    GenerationParams,
    ModelComparison,
    format_iso_time,
)
from finetune_trainer.stages.files import MEASUREMENTS_FILE, OUTPUT_FOLDER, StageResult, StageTask
from finetune_trainer.stages.final_model import load_base_model
from finetune_trainer.stages.generate import GENERATION_FIELDS
from finetune_trainer.stages.measure import HeldOutEvaluation, load_held_out, measure_model

BASE_FILE, COMPARISON_FILE = "base_measurements.json", "model_comparison.json"
CONFIDENCE_LEVEL = 0.95
"""Two-sided confidence level of the confidence intervals in the job's status."""


def run_stage(run: RunConfig, channel: Channel, inputs: Inputs, task: StageTask, folder: Path) -> StageResult:
    """Measure the base model, and write the files of the stage."""
    trained_measurements, output_folder = _read_trained_measurements(task), folder / OUTPUT_FOLDER
    held_out = load_held_out(run, channel, inputs, task, load_base_for_comparison)
    held_out.end_token_ids = trained_measurements.end_token_ids
    base_measurements = measure_model(run, channel, inputs, held_out).measurements
    base_measurements.write(output_folder / BASE_FILE)
    if trained_measurements.answers is not None:
        comparison = _compare_answers(run, task, held_out, trained_measurements.answers, base_measurements.answers or [])
        (output_folder / COMPARISON_FILE).write_text(comparison.to_json(), "utf-8")
    return StageResult(evaluation=summarise(run, base_measurements, trained_measurements))


def _read_trained_measurements(task: StageTask) -> Measurements:
    """Read the measurements of the trained model. Errors: InternalError `MeasurementsUnreadable`."""
    assert task.evaluated is not None, "the supervisor passes the files of the stage evaluating"
    try:
        return Measurements.read(task.evaluated / MEASUREMENTS_FILE)
    except (OSError, ValueError) as error:
        raise InternalError("MeasurementsUnreadable", f"evaluation/{MEASUREMENTS_FILE} cannot be read: {type(error).__name__}") from error


def load_base_for_comparison(run: RunConfig, inputs: Inputs, task: StageTask, hardware: Hardware, tokenizer: Any) -> Any:
    """Load the base model in the precision in which the trained model was evaluated. It is quantised only if the trained model is an adapter.

    The embedding rows of new tokens get the values that they had at the start of training.
    """
    from finetune_trainer import vocabulary

    model = load_base_model(run, inputs, hardware, quantizes=task.kind is OutputKind.ADAPTER)
    if run.spec.model.new_tokens:
        vocabulary.fit_embeddings(model, tokenizer, run)
    return model


def summarise(run: RunConfig, base_measurements: Measurements, trained_measurements: Measurements) -> EvaluationResult:
    """Return the compared metrics and the results of the gates, from the spec and the stored measurements of both models."""
    sums, trained_values, base_values = paired_sums(base_measurements, trained_measurements), trained_measurements.values, base_measurements.values
    metrics = {name: _compare_values(value, base_values.get(name), sums.get(name)) for name, value in trained_values.items()}
    gates = run.spec.evaluation.gates
    decides_gates = gates is not None and compares_metrics(run.spec)
    return EvaluationResult(
        metrics=metrics or None,
        gates=evaluate_gates(gates, trained_measurements.gate_values, base_measurements.gate_values, sums) if decides_gates and gates else None,
        comparison_uri=f"{run.storage.uri}/{Storage.EVALUATION}/{COMPARISON_FILE}" if trained_measurements.answers is not None else None,
    )  # fmt: skip


def _compare_values(trained_value: MetricValue, base_value: MetricValue | None, sums: PairedSums | None) -> MetricResult:
    """Return the values of both models, and their difference with its confidence interval. `reason` says why a value or the interval is missing."""
    if trained_value.value is None or base_value is None or base_value.value is None:
        base_reason = "the base model was not measured" if base_value is None else f"of the base model: {base_value.reason}"
        missing_reason = trained_value.reason if trained_value.value is None else base_reason
        return MetricResult(value=trained_value.value, base=base_value.value if base_value else None, reason=missing_reason)
    reason = trained_value.reason or base_value.reason
    result = MetricResult(value=trained_value.value, base=base_value.value, difference=trained_value.value - base_value.value, reason=reason)
    comparison = compare_metric(trained_value, base_value, sums, CONFIDENCE_LEVEL)
    if isinstance(comparison, str) or comparison.low is None or comparison.high is None:
        reason = comparison if isinstance(comparison, str) else comparison.reason
        return result.model_copy(update={"reason": f"no confidence interval: {reason}"})
    return result.model_copy(update={"difference": comparison.difference, "low": comparison.low, "high": comparison.high})


# ---- both answers


def _compare_answers(
    run: RunConfig, task: StageTask, held_out: HeldOutEvaluation, trained_answers: Sequence[str], base_answers: Sequence[str]
) -> ModelComparison:
    """Return the contents of `model_comparison.json`."""
    ref, now = prompts_to_compare(run.spec), datetime.now(UTC)
    questions = held_out.questions if ref is None else held_out.prompts
    prompt_source = f"configmap://{ref.name}/{ref.key}" if ref else "test set" if has_test_set(run.spec) else "validation set"
    comparisons = [
        ComparedAnswers.of(
            number, question.user_prompt, base_answer=base_answer, trained_answer=trained_answer, time=now,
            label=question.ground_truth if ref is None else None,
        )
        for number, (question, base_answer, trained_answer) in enumerate(zip(questions, base_answers, trained_answers, strict=True), 1)
    ]  # fmt: skip
    metadata = ComparisonMetadata(
        base_model=redact_source(run.spec.model.source or ""), finetuned_model_path=task.uri, prompts_file=prompt_source,
        num_prompts=len(comparisons), generation_params=_build_generation_params(run), device=str(held_out.model.get_input_embeddings().weight.device),
        comparison_date=format_iso_time(now),
    )  # fmt: skip
    return ModelComparison(metadata=metadata, comparisons=comparisons)


def _build_generation_params(run: RunConfig) -> GenerationParams:
    generation = (run.spec.evaluation.comparison and run.spec.evaluation.comparison.generation) or Generation()
    return GenerationParams.model_validate({name: value_or_default(generation, name) for name in GENERATION_FIELDS})
