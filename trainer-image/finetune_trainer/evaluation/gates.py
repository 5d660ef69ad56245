"""Decides for each gate of `evaluation.gates` whether the trained model passes it.

A gate passes only if a measurement shows that its condition is met. If the metric of a gate has no value, or if a comparison has no confidence
interval, the gate fails and its result gives the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune_api.rules import LOWER_IS_BETTER_METRICS, value_or_default
from finetune_api.spec.enums import GateOperator
from finetune_api.spec.results import Gate, NotWorseThanBase
from finetune_api.status import GateResult

from finetune_trainer.evaluation.bootstrap import FloatArray, MetricComparison, MetricOfSums, compare_rows, compare_sums


class MeasuredMetric(Protocol):
    """A metric of one model. If the metric has no value, `reason` says why."""

    @property
    def value(self) -> float | None:
        """The value of the metric, in its own unit; None if it could not be computed."""

    @property
    def reason(self) -> str | None:
        """Why the metric has no value, or which rows its value does not cover; else None."""

    @property
    def rows(self) -> Sequence[float | None] | None:
        """The score of each row, None for a row without a score. None instead of a list if the metric has no scores of single rows."""


@dataclass(frozen=True)
class PairedSums:
    """The summands of each row, for both models. The metric is computed from the sums of the summands over all rows.

    Both arrays have the shape (rows, number of sums).
    """

    base: FloatArray
    trained: FloatArray
    metric: MetricOfSums
    """Computes the metric from the sums over all rows."""


def evaluate_gates(
    gates: Sequence[Gate],
    trained_metrics: Mapping[str, MeasuredMetric],
    base_metrics: Mapping[str, MeasuredMetric],
    sums_by_metric: Mapping[str, PairedSums] | None = None,
) -> list[GateResult]:
    """Return one result per gate, in the order of the gates.

    `trained_metrics`, `base_metrics`: the metrics of both models on the same rows, by name. `sums_by_metric`: the sums of the metrics that are not
    the mean of their rows, such as loss, perplexity and BLEU. A gate with `notWorseThanBase` needs these sums if its metric is not the mean of its rows.
    """
    return [_evaluate_gate(gate, trained_metrics.get(gate.metric), base_metrics.get(gate.metric), (sums_by_metric or {}).get(gate.metric)) for gate in gates]


def _evaluate_gate(gate: Gate, trained_metric: MeasuredMetric | None, base_metric: MeasuredMetric | None, paired_sums: PairedSums | None) -> GateResult:
    problem = _explain_missing_value(gate.metric, trained_metric, "the trained model")
    if gate.not_worse_than_base is not None:
        problem = problem or _explain_missing_value(gate.metric, base_metric, "the base model")
    if problem:
        return _build_gate_result(gate, False, problem)
    assert trained_metric is not None and trained_metric.value is not None, "checked above"
    if gate.not_worse_than_base is None:
        return _compare_with_value(gate, trained_metric.value)
    assert base_metric is not None, "checked above"
    return _compare_with_base(gate, gate.not_worse_than_base, trained_metric, base_metric, paired_sums)


def _explain_missing_value(metric: str, measured_metric: MeasuredMetric | None, model: str) -> str | None:
    """Return why the metric has no usable value; None if it has one. `model`: the model's name in the sentence."""
    if measured_metric is None:
        return f"{metric} of {model} was not measured, so the gate cannot pass"
    if measured_metric.value is None:
        return f"{metric} of {model} could not be measured, so the gate cannot pass: {measured_metric.reason}"
    if not math.isfinite(measured_metric.value):
        return f"{metric} of {model} is not a finite number, so the gate cannot pass"
    return None


OPERATOR_PHRASES = {
    GateOperator.LT: "less than",
    GateOperator.LE: "at most",
    GateOperator.GT: "more than",
    GateOperator.GE: "at least",
}


def _compare_with_value(gate: Gate, value: float) -> GateResult:
    if gate.value is None or gate.op is None:
        return _build_gate_result(gate, False, f"the gate for {gate.metric} has no value or no op, so the gate cannot pass")
    passed = {
        GateOperator.LT: value < gate.value,
        GateOperator.LE: value <= gate.value,
        GateOperator.GT: value > gate.value,
        GateOperator.GE: value >= gate.value,
    }[gate.op]
    value_text, limit_text = _format_distinct_numbers(value, gate.value)
    return _build_gate_result(gate, passed, f"{gate.metric} is {value_text}, and the gate requires {OPERATOR_PHRASES[gate.op]} {limit_text}")


def _compare_with_base(
    gate: Gate, requirement: NotWorseThanBase, trained_metric: MeasuredMetric, base_metric: MeasuredMetric, paired_sums: PairedSums | None
) -> GateResult:
    """Return whether the trained model is, with the required confidence, worse than the base model by at most the margin.

    The result follows from a one-sided bound. With confidence 0.95, this bound is one end of the two-sided interval with confidence 0.90.
    """
    margin, confidence = value_or_default(requirement, "margin"), value_or_default(requirement, "confidence")
    comparison = compare_metric(trained_metric, base_metric, paired_sums, 2 * confidence - 1)
    if isinstance(comparison, str) or comparison.low is None or comparison.high is None:
        reason = comparison if isinstance(comparison, str) else comparison.reason
        return _build_gate_result(gate, False, f"{gate.metric} of both models cannot be compared, so the gate cannot pass: {reason}")
    is_lower_better = gate.metric in LOWER_IS_BETTER_METRICS
    bound, limit = (comparison.high, margin) if is_lower_better else (comparison.low, -margin)
    passed = bound <= limit if is_lower_better else bound >= limit
    phrase = "at most" if is_lower_better else "at least"
    bound_text, limit_text = _format_distinct_numbers(bound, limit)
    return _build_gate_result(
        gate, passed,
        f"on {comparison.rows} rows {gate.metric} is {comparison.trained:.6g} and the base model's is {comparison.base:.6g}; "
        f"with {100 * confidence:g} % confidence the difference is {phrase} {bound_text}, and the gate requires {phrase} {limit_text}",
    )  # fmt: skip


def compare_metric(trained_metric: MeasuredMetric, base_metric: MeasuredMetric, paired_sums: PairedSums | None, confidence: float) -> MetricComparison | str:
    """Return the comparison of both models, or a sentence that says why they cannot be compared.

    `paired_sums`: None for a metric that is the mean of its rows. `confidence`: confidence of the two-sided interval, from 0 to 1.
    """
    if paired_sums is not None:
        return compare_sums(paired_sums.base, paired_sums.trained, paired_sums.metric, confidence=confidence)
    if trained_metric.rows is None or base_metric.rows is None:
        return "the metric has no scores of single rows"
    if len(trained_metric.rows) != len(base_metric.rows):
        return f"the trained model has {len(trained_metric.rows)} rows, but the base model has {len(base_metric.rows)}"
    if not _is_mean_of_rows(trained_metric) or not _is_mean_of_rows(base_metric):
        return "the metric is not the mean of its rows, and the sums of its rows are missing"
    pairs = [(b, t) for b, t in zip(base_metric.rows, trained_metric.rows, strict=True) if b is not None and t is not None]
    return compare_rows([b for b, _ in pairs], [t for _, t in pairs], confidence=confidence)


def _is_mean_of_rows(measured_metric: MeasuredMetric) -> bool:
    scores = [score for score in measured_metric.rows or [] if score is not None]
    if not scores or measured_metric.value is None:
        return False
    return math.isclose(math.fsum(scores) / len(scores), measured_metric.value, rel_tol=1e-6, abs_tol=1e-9)


def _format_distinct_numbers(value: float, limit: float) -> tuple[str, str]:
    """Return both numbers as text, with enough digits to show a difference between them."""
    for digits in (6, 9, 12):
        texts = f"{value:.{digits}g}", f"{limit:.{digits}g}"
        if texts[0] != texts[1] or value == limit:
            return texts
    return repr(value), repr(limit)


def _build_gate_result(gate: Gate, passed: bool, text: str) -> GateResult:
    return GateResult(metric=gate.metric.value, passed=bool(passed), text=text)
