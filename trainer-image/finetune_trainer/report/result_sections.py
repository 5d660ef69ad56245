"""Builds the sections with the results: metrics, gates, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping

from finetune_api.status import MetricResult

from finetune_trainer.report.blocks import (
    AnsweredPrompt,
    Answers,
    Block,
    Cell,
    Section,
    Sentences,
    Table,
    make_missing_cell,
)
from finetune_trainer.report.cells import (
    format_metric,
    make_number_cell,
    shorten_text,
)
from finetune_trainer.report.redaction import flatten_values, redact_text
from finetune_trainer.report.run_report import RunReport

MAX_ANSWERS = 20


def build_evaluation_section(report: RunReport) -> Section:
    """Return the section with metrics, gates, and results of further stages."""
    blocks: list[Block] = []
    evaluation = report.evaluation
    if evaluation is not None and evaluation.metrics:
        rows_text = f" of {evaluation.rows} rows" if evaluation.rows is not None else ""
        blocks.append(_build_metric_table(evaluation.metrics, f"Evaluation{rows_text} after training"))
    if evaluation is not None and evaluation.gates:
        rows = [
            [Cell(gate.metric), Cell("passed", "good") if gate.passed else Cell("failed", "bad"), Cell(redact_text(gate.text or ""))]
            for gate in evaluation.gates
        ]
        blocks.append(Table("Gates", ["metric", "result", "measured and required"], rows))
    test_set_values = (report.output.evaluation if report.output else None) or {}
    if test_set_values:
        rows = [[Cell(name), make_number_cell(value)] for name, value in test_set_values.items()]
        blocks.append(Table("Test set, measured by the trainer", ["metric", "value"], rows, is_narrow=True))
    for name, value in report.further_results.items():
        rows = [[Cell(path), Cell(text, "number")] for path, text in flatten_values(value)]
        if rows:
            blocks.append(Table(name.capitalize(), ["value", "result"], rows, is_narrow=True))
    if not blocks:
        reason = "evaluation.metrics is not set, and the spec has no test set" if report.output else "the run has no final model"
        blocks.append(Sentences([f"Not measured: {reason}."]))
    return Section("results", "Results", blocks)


def _build_metric_table(metrics: Mapping[str, MetricResult], caption: str) -> Table:
    is_compared = any(value is not None for metric in metrics.values() for value in (metric.base, metric.difference, metric.low))
    has_remarks = any(metric.reason and metric.value is not None for metric in metrics.values())
    columns = ["metric", "trained model", *(["base model", "difference", "95 % interval"] if is_compared else []), *(["remark"] if has_remarks else [])]
    return Table(caption, columns, [_build_metric_row(name, metric, is_compared, has_remarks) for name, metric in metrics.items()], is_narrow=not is_compared)


def _build_metric_row(name: str, metric: MetricResult, is_compared: bool, has_remarks: bool) -> list[Cell]:
    reason = redact_text(metric.reason or "the trainer recorded no reason")
    row = [Cell(name), make_missing_cell(reason) if metric.value is None else Cell(format_metric(name, metric.value), "number")]
    if is_compared:
        has_interval = metric.low is not None and metric.high is not None
        row += [
            Cell("–") if metric.base is None else Cell(format_metric(name, metric.base), "number"),
            Cell("–") if metric.difference is None else Cell(f"{metric.difference:+.4g}", "number"),
            Cell(f"{metric.low:+.4g} to {metric.high:+.4g}", "number") if has_interval else Cell("–"),
        ]
    return [*row, Cell(reason if metric.reason and metric.value is not None else "")] if has_remarks else row


def build_answers_section(report: RunReport) -> Section:
    """Return the section that shows the answers of the base model and the trained model side by side."""
    blocks: list[Block] = []
    if report.comparison is not None and report.comparison.comparisons:
        compared_answers = report.comparison.comparisons
        items = [
            AnsweredPrompt(
                f"Prompt {comparison.prompt_id}", shorten_text(comparison.prompt),
                [("base model", shorten_text(comparison.base_model_response), ""), ("trained model", shorten_text(comparison.finetuned_model_response), ""),
                 *([("expected", shorten_text(comparison.label), "")] if comparison.label is not None else [])],
            )
            for comparison in compared_answers[:MAX_ANSWERS]
        ]  # fmt: skip
        note = _describe_shown_count(len(items), len(compared_answers), "evaluation/model_comparison.json")
        blocks.append(Answers("Base model and trained model", items, note))
    if report.predictions:
        items = []
        for number, prediction in enumerate(report.predictions[:MAX_ANSWERS], 1):
            mark = "" if prediction.ground_truth is None else "good" if prediction.assistant_response.strip() == prediction.ground_truth.strip() else "bad"
            reference_answers = [] if prediction.ground_truth is None else [("answer of the data", shorten_text(prediction.ground_truth), "")]
            trained_answer = ("trained model", shorten_text(prediction.assistant_response), mark)
            items.append(AnsweredPrompt(f"Row {number}", shorten_text(prediction.user_prompt), [trained_answer, *reference_answers]))
        note = _describe_shown_count(len(items), report.prediction_count, "evaluation/predictions.jsonl")
        blocks.append(Answers("Answers to the test set", items, note))
    return Section("answers", "Answers", blocks)


def _describe_shown_count(shown_count: int, total_count: int, file: str) -> str:
    return f"All {total_count} answers." if shown_count == total_count else f"The first {shown_count} of {total_count} answers; {file} contains all of them."
