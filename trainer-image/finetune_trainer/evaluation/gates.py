"""Decides for each gate of `evaluation.gates` whether the trained model passes.

A gate passes only if a measurement shows it. A metric without a value, or a comparison without a confidence interval, fails its gate
with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune_api.rules import LOWER_IS_BETTER, value_or_default
from finetune_api.spec.enums import GateOperator
from finetune_api.spec.results import Gate, NotWorseThanBase
from finetune_api.status import GateResult

from finetune_trainer.evaluation.bootstrap import Comparison, MetricOfSums, Numbers, compare_rows, compare_sums


class MeasuredMetric(Protocol):
    """A metric of one model. Without a value, the reason says why."""

    @property
    def value(self) -> float | None:
        """Value of the metric, in its own unit."""

    @property
    def reason(self) -> str | None:
        """Why the metric has no value, or which rows the value does not cover."""

    @property
    def rows(self) -> Sequence[float | None] | None:
        """Score of each row, or None for a row without a score. None: the metric has no scores of single rows."""


@dataclass(frozen=True)
class PairedSums:
    """What each row adds to the sums of a metric that is not the mean of its rows, for both models: shape (rows, number of sums)."""

    base: Numbers
    trained: Numbers
    metric: MetricOfSums
    """Computes the metric from the sums over all rows."""


def evaluate_gates(
    gates: Sequence[Gate],
    trained: Mapping[str, MeasuredMetric],
    base: Mapping[str, MeasuredMetric],
    sums: Mapping[str, PairedSums] | None = None,
) -> list[GateResult]:
    """Return one result per gate, in the order of the gates.

    `trained` and `base` contain the metrics of both models on the same rows, by name. `sums` contains the sums of loss, perplexity, BLEU
    and other metrics that are not the mean of their rows; `notWorseThanBase` needs them for such a metric.
    """
    return [_evaluate_gate(gate, trained.get(gate.metric), base.get(gate.metric), (sums or {}).get(gate.metric)) for gate in gates]


def _evaluate_gate(gate: Gate, trained: MeasuredMetric | None, base: MeasuredMetric | None, sums: PairedSums | None) -> GateResult:
    problem = _missing_value(gate.metric, trained, "the trained model")
    if gate.not_worse_than_base is not None:
        problem = problem or _missing_value(gate.metric, base, "the base model")
    if problem:
        return _result(gate, False, problem)
    assert trained is not None and trained.value is not None, "checked above"
    if gate.not_worse_than_base is None:
        return _compare_with_value(gate, trained.value)
    assert base is not None, "checked above"
    return _compare_with_base(gate, gate.not_worse_than_base, trained, base, sums)


def _missing_value(metric: str, measured: MeasuredMetric | None, model: str) -> str | None:
    """Return why the metric has no usable value. None: the metric has a value."""
    if measured is None:
        return f"{metric} of {model} was not measured, so the gate cannot pass"
    if measured.value is None:
        return f"{metric} of {model} could not be measured, so the gate cannot pass: {measured.reason}"
    if not math.isfinite(measured.value):
        return f"{metric} of {model} is not a finite number, so the gate cannot pass"
    return None


_PHRASES = {
    GateOperator.LT: "less than",
    GateOperator.LE: "at most",
    GateOperator.GT: "more than",
    GateOperator.GE: "at least",
}


def _compare_with_value(gate: Gate, value: float) -> GateResult:
    if gate.value is None or gate.op is None:
        return _result(gate, False, f"the gate for {gate.metric} has no value or no op, so the gate cannot pass")
    passed = {
        GateOperator.LT: value < gate.value,
        GateOperator.LE: value <= gate.value,
        GateOperator.GT: value > gate.value,
        GateOperator.GE: value >= gate.value,
    }[gate.op]
    value_text, limit_text = _distinct_texts(value, gate.value)
    return _result(gate, passed, f"{gate.metric} is {value_text}, and the gate requires {_PHRASES[gate.op]} {limit_text}")


def _compare_with_base(
    gate: Gate, requirement: NotWorseThanBase, trained: MeasuredMetric, base: MeasuredMetric, sums: PairedSums | None
) -> GateResult:
    """Pass if the one-sided confidence bound of the loss of quality is at most the margin.

    A one-sided bound with confidence 0.95 is one end of the two-sided interval with confidence 0.90.
    """
    margin, confidence = value_or_default(requirement, "margin"), value_or_default(requirement, "confidence")
    comparison = compare_metric(trained, base, sums, 2 * confidence - 1)
    if isinstance(comparison, str) or comparison.low is None or comparison.high is None:
        reason = comparison if isinstance(comparison, str) else comparison.reason
        return _result(gate, False, f"{gate.metric} of both models cannot be compared, so the gate cannot pass: {reason}")
    is_lower_better = gate.metric in LOWER_IS_BETTER
    bound, limit = (comparison.high, margin) if is_lower_better else (comparison.low, -margin)
    passed = bound <= limit if is_lower_better else bound >= limit
    phrase = "at most" if is_lower_better else "at least"
    bound_text, limit_text = _distinct_texts(bound, limit)
    return _result(
        gate, passed,
        f"on {comparison.rows} rows {gate.metric} is {comparison.trained:.6g} and the base model's is {comparison.base:.6g}; "
        f"with {100 * confidence:g} % confidence the difference is {phrase} {bound_text}, and the gate requires {phrase} {limit_text}",
    )  # fmt: skip


def compare_metric(trained: MeasuredMetric, base: MeasuredMetric, sums: PairedSums | None, confidence: float) -> Comparison | str:
    """Return the comparison of both models, or a sentence that says why they cannot be compared. `confidence` is two-sided."""
    if sums is not None:
        return compare_sums(sums.base, sums.trained, sums.metric, confidence=confidence)
    if trained.rows is None or base.rows is None:
        return "the metric has no scores of single rows"
    if len(trained.rows) != len(base.rows):
        return f"the trained model has {len(trained.rows)} rows, but the base model has {len(base.rows)}"
    if not _is_mean_of_rows(trained) or not _is_mean_of_rows(base):
        return "the metric is not the mean of its rows, and the sums of its rows are missing"
    pairs = [(b, t) for b, t in zip(base.rows, trained.rows, strict=True) if b is not None and t is not None]
    return compare_rows([b for b, _ in pairs], [t for _, t in pairs], confidence=confidence)


def _is_mean_of_rows(measured: MeasuredMetric) -> bool:
    scores = [score for score in measured.rows or [] if score is not None]
    if not scores or measured.value is None:
        return False
    return math.isclose(math.fsum(scores) / len(scores), measured.value, rel_tol=1e-6, abs_tol=1e-9)


def _distinct_texts(value: float, limit: float) -> tuple[str, str]:
    """Return both numbers as text, with as many digits as are necessary to see a difference between them."""
    for digits in (6, 9, 12):
        texts = f"{value:.{digits}g}", f"{limit:.{digits}g}"
        if texts[0] != texts[1] or value == limit:
            return texts
    return repr(value), repr(limit)


def _result(gate: Gate, passed: bool, text: str) -> GateResult:
    return GateResult(metric=gate.metric.value, passed=bool(passed), text=text)
