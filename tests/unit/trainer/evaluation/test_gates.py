"""The decisions of gates, and the error rate and power of `notWorseThanBase` in simulations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from finetune_api.spec.results import Gate
from finetune_api.status import GateResult
from finetune_trainer.evaluation.bootstrap import FloatArray, ratio_of_sums
from finetune_trainer.evaluation.gates import PairedSums, evaluate_gates


@dataclass(frozen=True)
class MeasuredMetric:
    value: float | None
    reason: str | None = None
    rows: list[float | None] | None = None


def make_mean_metric(rows: list[float | None]) -> MeasuredMetric:
    scores = [score for score in rows if score is not None]
    return MeasuredMetric(math.fsum(scores) / len(scores), None, rows)


def make_loss_metric(sums: FloatArray) -> MeasuredMetric:
    return MeasuredMetric(float(ratio_of_sums(sums.sum(axis=0))))


def evaluate_gate(gate: dict[str, Any], trained: MeasuredMetric | None, base: MeasuredMetric | None = None, sums: PairedSums | None = None) -> GateResult:
    parsed_gate = Gate.model_validate(gate)
    name = parsed_gate.metric.value
    trained_metrics, base_metrics = ({} if metric is None else {name: metric} for metric in (trained, base))
    [result] = evaluate_gates([parsed_gate], trained_metrics, base_metrics, {} if sums is None else {name: sums})
    assert result.metric == name and result.text
    return result


@pytest.mark.parametrize(
    ("op", "passes_below", "passes_if_equal", "passes_above"),
    [("lt", True, False, False), ("le", True, True, False), ("gt", False, False, True), ("ge", False, True, True)],
)
def test_a_gate_compares_the_metric_with_a_value(op: str, passes_below: bool, passes_if_equal: bool, passes_above: bool) -> None:
    gate = {"metric": "accuracy", "op": op, "value": 0.8}
    assert [evaluate_gate(gate, MeasuredMetric(value)).passed for value in (0.79, 0.8, 0.81)] == [passes_below, passes_if_equal, passes_above]


def test_the_text_contains_the_measured_and_the_required_value() -> None:
    gate = {"metric": "accuracy", "op": "ge", "value": 0.8}
    assert evaluate_gate(gate, MeasuredMetric(0.75)).text == "accuracy is 0.75, and the gate requires at least 0.8"
    assert evaluate_gate(gate, MeasuredMetric(0.79999999)).text == "accuracy is 0.79999999, and the gate requires at least 0.8"


BELOW_9_GATE: dict[str, Any] = {"metric": "rouge", "op": "lt", "value": 9}
NOT_WORSE_GATE: dict[str, Any] = {"metric": "rouge", "notWorseThanBase": {"margin": 0.02}}
ROUGE = make_mean_metric([0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("gate", "trained", "base", "message_part"),
    [
        (BELOW_9_GATE, None, None, "rouge of the trained model was not measured"),
        (BELOW_9_GATE, MeasuredMetric(None, "no test rows"), None, "could not be measured, so the gate cannot pass: no test rows"),
        (BELOW_9_GATE, MeasuredMetric(math.nan), None, "not a finite number"),
        (NOT_WORSE_GATE, ROUGE, None, "rouge of the base model was not measured"),
        (NOT_WORSE_GATE, ROUGE, MeasuredMetric(None, "out of memory"), "of the base model could not be measured, so the gate cannot pass: out of memory"),
        (NOT_WORSE_GATE, ROUGE, MeasuredMetric(0.1), "the metric has no scores of single rows"),
        (NOT_WORSE_GATE, ROUGE, make_mean_metric([0.1, 0.1]), "the trained model has 4 rows, but the base model has 2"),
        (NOT_WORSE_GATE, MeasuredMetric(0.9, None, [0.1, 0.1]), make_mean_metric([0.1, 0.1]), "not the mean of its rows"),
        (NOT_WORSE_GATE, make_mean_metric([0.9]), make_mean_metric([0.1]), "at least 2 rows"),
        (NOT_WORSE_GATE, make_mean_metric([0.9, None]), make_mean_metric([None, 0.1]), "at least 2 rows"),
    ],
)
def test_a_gate_without_a_measurement_fails(gate: dict[str, Any], trained: MeasuredMetric | None, base: MeasuredMetric | None, message_part: str) -> None:
    result = evaluate_gate(gate, trained, base)
    assert not result.passed and message_part in str(result.text)


def test_a_gate_without_a_condition_fails() -> None:
    assert not evaluate_gate({"metric": "rouge"}, ROUGE).passed


def test_only_rows_with_a_score_from_both_models_are_compared() -> None:
    trained, base = make_mean_metric([0.9, None, *[0.9, 0.8, 0.95] * 10]), make_mean_metric([0.1, 0.2, *[0.5, 0.6, 0.6] * 10])
    result = evaluate_gate(NOT_WORSE_GATE, trained, base)
    assert result.passed and str(result.text).startswith("on 31 rows rouge is ")


def test_a_lower_loss_passes_and_a_higher_loss_fails() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 60, 200).astype(float)
    base = np.column_stack([generator.gamma(8, 0.2, 200) * tokens, tokens])
    gate = {"metric": "loss", "notWorseThanBase": {"margin": 0.05}}
    for loss_shift, passes in ((-0.1, True), (0.0, True), (0.1, False)):
        trained = base + np.column_stack([(loss_shift + generator.normal(0, 0.1, 200)) * tokens, np.zeros(200)])
        result = evaluate_gate(gate, make_loss_metric(trained), make_loss_metric(base), PairedSums(base, trained, ratio_of_sums))
        assert result.passed is passes
        assert "with 95 % confidence the difference is at most " in str(result.text) and str(result.text).endswith("requires at most 0.05")


def test_the_default_margin_is_zero_and_a_higher_confidence_is_stricter() -> None:
    generator = np.random.default_rng(6)
    base = generator.random(100)
    trained = base + generator.normal(0.02, 0.1, 100)
    metrics = [MeasuredMetric(float(rows.mean()), None, rows.tolist()) for rows in (trained, base)]
    assert evaluate_gate({"metric": "rouge", "notWorseThanBase": {}}, *metrics).passed
    assert not evaluate_gate({"metric": "rouge", "notWorseThanBase": {"confidence": 0.9999}}, *metrics).passed


# Error rate and power

COMPARISON_COUNT = 200
DrawFunction = Callable[[np.random.Generator, int, float], tuple[MeasuredMetric, MeasuredMetric, PairedSums | None]]


def draw_continuous(generator: np.random.Generator, row_count: int, difference: float) -> tuple[MeasuredMetric, MeasuredMetric, None]:
    """Scores of two models with a correlation of 0.8. The standard deviation of the differences is 0.15."""
    base = generator.normal(0.6, 0.2, row_count)
    trained = base + generator.normal(difference, 0.15, row_count)
    return MeasuredMetric(float(trained.mean()), None, trained.tolist()), MeasuredMetric(float(base.mean()), None, base.tolist()), None


def draw_skewed(generator: np.random.Generator, row_count: int, difference: float) -> tuple[MeasuredMetric, MeasuredMetric, None]:
    """Most rows gain a little, and a few rows lose much. The standard deviation of the differences is 0.15."""
    base = generator.normal(0.6, 0.2, row_count)
    trained = base + difference + 0.15 * (1 - generator.exponential(1, row_count))
    return MeasuredMetric(float(trained.mean()), None, trained.tolist()), MeasuredMetric(float(base.mean()), None, base.tolist()), None


def draw_fractions(generator: np.random.Generator, row_count: int, difference: float) -> tuple[MeasuredMetric, MeasuredMetric, None]:
    """Scores of 1 for correct and 0 for wrong answers. 60 % of the rows are equally difficult for both models."""
    base_difficulty = generator.random(row_count)
    trained_difficulty = np.where(generator.random(row_count) < 0.6, base_difficulty, generator.random(row_count))
    base, trained = (base_difficulty < 0.7).astype(float), (trained_difficulty < 0.7 + difference).astype(float)
    return MeasuredMetric(float(trained.mean()), None, trained.tolist()), MeasuredMetric(float(base.mean()), None, base.tolist()), None


def draw_loss(generator: np.random.Generator, row_count: int, difference: float) -> tuple[MeasuredMetric, MeasuredMetric, PairedSums]:
    """Losses of rows with very different lengths. A positive `difference` is an improvement."""
    tokens = np.ceil(generator.lognormal(4, 0.7, row_count))
    base_loss = generator.gamma(8, 0.2, row_count)
    trained_loss = base_loss - generator.normal(difference, 0.1, row_count)
    base, trained = (np.column_stack([loss * tokens, tokens]) for loss in (base_loss, trained_loss))
    return make_loss_metric(trained), make_loss_metric(base), PairedSums(base, trained, ratio_of_sums)


METRIC_AND_MARGIN: dict[DrawFunction, tuple[str, float]] = {
    draw_continuous: ("rouge", 0.05), draw_skewed: ("rouge", 0.05), draw_fractions: ("accuracy", 0.1), draw_loss: ("loss", 0.05),
}  # fmt: skip


def count_promoted(draw: DrawFunction, row_count: int, difference: float) -> int:
    generator = np.random.default_rng(20_260_301 + row_count)
    metric, margin = METRIC_AND_MARGIN[draw]
    gate = {"metric": metric, "notWorseThanBase": {"margin": margin}}
    return sum(evaluate_gate(gate, *draw(generator, row_count, difference)).passed for _ in range(COMPARISON_COUNT))


@pytest.mark.parametrize("row_count", [30, 100, 1000])
@pytest.mark.parametrize("draw", METRIC_AND_MARGIN)
def test_a_model_exactly_at_the_margin_is_promoted_in_about_5_percent_of_the_comparisons(draw: DrawFunction, row_count: int) -> None:
    assert count_promoted(draw, row_count, -METRIC_AND_MARGIN[draw][1]) <= 18


@pytest.mark.parametrize(
    ("draw", "row_count", "difference"),
    [
        (draw_continuous, 30, 0.068), (draw_continuous, 100, 0.012), (draw_continuous, 1000, -0.03),
        (draw_fractions, 30, 0.26), (draw_fractions, 100, 0.075), (draw_fractions, 1000, -0.045),
        (draw_loss, 30, 0.068), (draw_loss, 100, 0.008), (draw_loss, 1000, -0.033),
    ],
)  # fmt: skip
def test_a_model_is_promoted_if_its_effect_is_detected_with_99_percent_power(draw: DrawFunction, row_count: int, difference: float) -> None:
    """With `row_count` rows, the gate detects an effect of size `difference` in about 99 % of all comparisons (98.5 to 99.7 % of 1000 drawn ones)."""
    assert count_promoted(draw, row_count, difference) >= 190
