"""Builds the top of the page, the section with the curves, and the list of all sections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from finetune_api.names import ExitCode
from finetune_api.rules import method_type_of, trainer_type_of
from finetune_api.sources import HubSource, get_last_folder, parse_source, redact_source
from finetune_api.spec.enums import TrainerType

from finetune_trainer.report import result_sections, run_sections
from finetune_trainer.report.attempt_times import sum_gpu_seconds, sum_pod_seconds
from finetune_trainer.report.blocks import (
    ChartGrid,
    RunOutcome,
    Section,
    Tile,
)
from finetune_trainer.report.cells import (
    format_hours,
    format_metric,
    format_seconds,
)
from finetune_trainer.report.chart import AttemptLine, ChartData, Series, draw_chart
from finetune_trainer.report.redaction import redact_text
from finetune_trainer.report.run_report import RunReport
from finetune_trainer.report.scale import format_number
from finetune_trainer.results.log_entry import LineKind, LogEntry

NO_EVALUATION = "the spec has no validation set, or evaluations during training are off"
NO_GPU_MEMORY = "the run used no GPU, and the trainer measures only GPU memory"


def build_sections(report: RunReport) -> list[Section]:
    """Return all sections that have something to show, in the order of the page."""
    optional_sections = [
        build_curves_section(report), result_sections.build_evaluation_section(report), result_sections.build_answers_section(report),
        run_sections.build_spec_section(report),
        run_sections.build_attempts_section(report), run_sections.build_data_section(report), run_sections.build_costs_section(report),
        run_sections.build_lineage_section(report), run_sections.build_notes_section(report),
    ]  # fmt: skip
    return [section for section in optional_sections if section.blocks]


# ---- top of the page


def describe_outcome(report: RunReport) -> RunOutcome:
    """Return how the last attempt ended."""
    last_attempt = report.last_attempt
    has_model = report.output is not None and report.output.uri is not None
    if last_attempt is None or last_attempt.exit_code is None:
        return RunOutcome("Not finished", "open", "The report was written before the attempt ended.")
    if last_attempt.exit_code == ExitCode.OK:
        return RunOutcome("Completed", "good", "Training is complete, and the final model is stored.")
    ending = f"Attempt {last_attempt.attempt} ended with exit code {last_attempt.exit_code} ({last_attempt.code or 'no code'})"
    sentence = f"{ending}: {redact_text(last_attempt.message)}." if last_attempt.message else f"{ending}."
    if last_attempt.exit_code in (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED):
        return RunOutcome("Stopped", "open", f"{sentence} A later attempt can continue the run.", last_attempt.hint or "")
    if has_model:
        return RunOutcome("Failed after training", "bad", f"The final model is stored, but a stage after training failed. {sentence}", last_attempt.hint or "")
    return RunOutcome("Failed", "bad", f"{sentence} The operator may start another attempt, which replaces this report.", last_attempt.hint or "")


def build_tiles(report: RunReport) -> list[Tile]:
    """Return the most important numbers of the run, for the top of the page."""
    training_entries = [entry for entry in report.log if entry.kind is LineKind.TRAINING and entry.loss is not None]
    tiles = [_build_steps_tile(report)]
    if training_entries:
        tiles.append(Tile("Training loss", format_number(training_entries[-1].loss or 0.0), f"from {format_number(training_entries[0].loss or 0.0)}"))
    evaluated_entries = [entry for entry in report.log if entry.eval_loss is not None]
    if evaluated_entries:
        best_entry = min(evaluated_entries, key=lambda entry: entry.eval_loss or math.inf)
        tiles.append(Tile("Best validation loss", format_number(best_entry.eval_loss or 0.0), f"at step {best_entry.step}"))
    tiles += _build_evaluation_tiles(report)
    pod_seconds, is_estimate = sum_pod_seconds(report)
    bound_sign = "≥ " if is_estimate else ""
    gpu_count = max((attempt.gpus for attempt in report.attempts), default=0)
    if gpu_count:
        tiles.append(Tile("GPU hours", bound_sign + format_hours(sum_gpu_seconds(report)[0]), f"on {gpu_count} GPU{'s' * (gpu_count > 1)}"))
    attempt_count = len({attempt.attempt for attempt in report.attempts})
    tiles.append(Tile("Running time", bound_sign + format_seconds(pod_seconds), f"{attempt_count} attempt{'s' * (attempt_count != 1)}"))
    return tiles


def _build_steps_tile(report: RunReport) -> Tile:
    last_step = max((entry.step for entry in report.log), default=0)
    last_epoch = max((entry.epoch or 0.0 for entry in report.log), default=0.0)
    return Tile("Optimizer steps", str(last_step), f"{last_epoch:.4g} epoch{'s' * (last_epoch != 1)}" if last_epoch else "")


def _build_evaluation_tiles(report: RunReport) -> Iterable[Tile]:
    evaluation_result = report.evaluation
    if evaluation_result is None:
        return
    for name in ("accuracy", "letterAccuracy", "exactMatch", "rougeL", "bleu", "perplexity"):
        metric = (evaluation_result.metrics or {}).get(name)
        if metric is not None and metric.value is not None:
            detail = "after training" if metric.difference is None else f"{metric.difference:+.4g} against the base model"
            yield Tile(name, format_metric(name, metric.value), detail)
            break
    if evaluation_result.gates:
        passed_count = sum(gate.passed for gate in evaluation_result.gates)
        gate_count = len(evaluation_result.gates)
        yield Tile("Gates passed", f"{passed_count} of {gate_count}", "", "good" if passed_count == gate_count else "bad")


# ---- curves


def build_curves_section(report: RunReport) -> Section:
    """Return the section with charts of the logged values over the optimizer steps."""
    training_entries = [entry for entry in report.log if entry.kind is LineKind.TRAINING]
    evaluation_entries = [entry for entry in report.log if entry.kind is LineKind.EVALUATION]
    attempt_lines = _list_attempt_lines(report)
    unit = "nats per token" if trainer_type_of(report.run.spec) is TrainerType.SFT else f"loss of {trainer_type_of(report.run.spec)}"
    nothing_logged_reason = "no line of the training log is stored"

    def make_chart(title: str, unit: str, series: Sequence[Series], reason: str, *, starts_at_zero: bool = False) -> ChartData:
        return ChartData(title, unit, series, reason if report.log else nothing_logged_reason, starts_at_zero, attempt_lines)

    charts = [
        make_chart("Training loss", unit, [Series("training loss", _list_points(training_entries, "loss"))], nothing_logged_reason),
        make_chart("Validation loss", unit, [Series("validation loss", _list_points(evaluation_entries, "eval_loss"), is_dashed=True)], NO_EVALUATION),
        make_chart("Learning rate", "", [Series("learning rate", _list_points(training_entries, "learning_rate"))], nothing_logged_reason, starts_at_zero=True),
        make_chart("Gradient norm", "before clipping", [Series("gradient norm", _list_points(training_entries, "grad_norm"))],
            nothing_logged_reason, starts_at_zero=True),
        make_chart("Throughput", "tokens per second, all ranks", [Series("tokens per second", _list_points(training_entries, "tokens_per_second"))],
              "the trainer measured no throughput", starts_at_zero=True),
        make_chart("GPU memory", "peak of rank 0, GB", [Series("GPU memory", _list_points(training_entries, "peak_memory_gb"))],
            NO_GPU_MEMORY, starts_at_zero=True),
    ]  # fmt: skip
    charts_and_drawings = [(chart, draw_chart(chart)) for chart in charts]
    grid = ChartGrid([drawing for _, drawing in charts_and_drawings if drawing], [
        (chart.title, f"not measured: {chart.reason}") for chart, drawing in charts_and_drawings if drawing is None
    ])
    marker_note = " A dashed vertical line marks the step at which a later attempt continued." if attempt_lines else ""
    return Section("curves", "Curves", [grid], f"Values by optimizer step.{marker_note}")


def _list_points(entries: Iterable[LogEntry], name: str) -> list[tuple[float, float | None]]:
    points = []
    for entry in entries:
        value = getattr(entry, name, None)
        points.append((float(entry.step), float(value) if isinstance(value, int | float) and math.isfinite(value) else None))
    return points


def _list_attempt_lines(report: RunReport) -> list[AttemptLine]:
    """Return a line for each attempt but the first, at the step where it continued the training. An attempt without training has no line."""
    return [AttemptLine(attempt.start_step, f"attempt {attempt.attempt}") for attempt in report.attempts[1:] if attempt.start_step is not None]


# ---- values


def build_subtitle(report: RunReport) -> str:
    """Return base model, objective and method in one line."""
    spec = report.run.spec
    source = parse_source(spec.model.source or "")
    name = source.repo if isinstance(source, HubSource) else get_last_folder(redact_source(spec.model.source or ""))
    return f"{name} · {trainer_type_of(spec)} · {method_type_of(spec)}"


