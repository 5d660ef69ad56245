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
class Measured:
    value: float | None
    reason: str | None = None
    rows: list[float | None] | None = None


def mean_metric(rows: list[float | None]) -> Measured:
    scores = [score for score in rows if score is not None]
    return Measured(math.fsum(scores) / len(scores), None, rows)


def loss_metric(sums: FloatArray) -> Measured:
    return Measured(float(ratio_of_sums(sums.sum(axis=0))))


def gate_result(gate: dict[str, Any], trained: Measured | None, base: Measured | None = None, sums: PairedSums | None = None) -> GateResult:
    read_gate = Gate.model_validate(gate)
    name = read_gate.metric.value
    trained_metrics, base_metrics = ({} if metric is None else {name: metric} for metric in (trained, base))
    [found] = evaluate_gates([read_gate], trained_metrics, base_metrics, {} if sums is None else {name: sums})
    assert found.metric == name and found.text
    return found


@pytest.mark.parametrize(
    ("op", "below", "equal", "above"),
    [("lt", True, False, False), ("le", True, True, False), ("gt", False, False, True), ("ge", False, True, True)],
)
def test_a_gate_compares_the_metric_with_a_value(op: str, below: bool, equal: bool, above: bool) -> None:
    gate = {"metric": "accuracy", "op": op, "value": 0.8}
    assert [gate_result(gate, Measured(value)).passed for value in (0.79, 0.8, 0.81)] == [below, equal, above]


def test_the_text_contains_the_measured_and_the_required_value() -> None:
    gate = {"metric": "accuracy", "op": "ge", "value": 0.8}
    assert gate_result(gate, Measured(0.75)).text == "accuracy is 0.75, and the gate requires at least 0.8"
    assert gate_result(gate, Measured(0.79999999)).text == "accuracy is 0.79999999, and the gate requires at least 0.8"


NOT_WORSE: dict[str, Any] = {"metric": "rouge", "notWorseThanBase": {"margin": 0.02}}
SCORES = mean_metric([0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("gate", "trained", "base", "expected"),
    [
        ({"metric": "rouge", "op": "lt", "value": 9}, None, None, "rouge of the trained model was not measured"),
        ({"metric": "rouge", "op": "lt", "value": 9}, Measured(None, "no test rows"), None, "could not be measured, so the gate cannot pass: no test rows"),
        ({"metric": "rouge", "op": "lt", "value": 9}, Measured(math.nan), None, "not a finite number"),
        (NOT_WORSE, SCORES, None, "rouge of the base model was not measured"),
        (NOT_WORSE, SCORES, Measured(None, "out of memory"), "of the base model could not be measured, so the gate cannot pass: out of memory"),
        (NOT_WORSE, SCORES, Measured(0.1), "the metric has no scores of single rows"),
        (NOT_WORSE, SCORES, mean_metric([0.1, 0.1]), "the trained model has 4 rows, but the base model has 2"),
        (NOT_WORSE, Measured(0.9, None, [0.1, 0.1]), mean_metric([0.1, 0.1]), "not the mean of its rows"),
        (NOT_WORSE, mean_metric([0.9]), mean_metric([0.1]), "at least 2 rows"),
        (NOT_WORSE, mean_metric([0.9, None]), mean_metric([None, 0.1]), "at least 2 rows"),
    ],
)
def test_a_gate_without_a_measurement_fails(gate: dict[str, Any], trained: Measured | None, base: Measured | None, expected: str) -> None:
    found = gate_result(gate, trained, base)
    assert not found.passed and expected in str(found.text)


def test_a_gate_without_a_condition_fails() -> None:
    assert not gate_result({"metric": "rouge"}, SCORES).passed


def test_only_rows_with_a_score_from_both_models_are_compared() -> None:
    trained, base = mean_metric([0.9, None, *[0.9, 0.8, 0.95] * 10]), mean_metric([0.1, 0.2, *[0.5, 0.6, 0.6] * 10])
    found = gate_result(NOT_WORSE, trained, base)
    assert found.passed and str(found.text).startswith("on 31 rows rouge is ")


def test_a_lower_loss_passes_and_a_higher_loss_fails() -> None:
    generator = np.random.default_rng(1)
    tokens = generator.integers(20, 60, 200).astype(float)
    base = np.column_stack([generator.gamma(8, 0.2, 200) * tokens, tokens])
    gate = {"metric": "loss", "notWorseThanBase": {"margin": 0.05}}
    for shift, passed in ((-0.1, True), (0.0, True), (0.1, False)):
        trained = base + np.column_stack([(shift + generator.normal(0, 0.1, 200)) * tokens, np.zeros(200)])
        found = gate_result(gate, loss_metric(trained), loss_metric(base), PairedSums(base, trained, ratio_of_sums))
        assert found.passed is passed
        assert "with 95 % confidence the difference is at most " in str(found.text) and str(found.text).endswith("requires at most 0.05")


def test_the_default_margin_is_zero_and_a_higher_confidence_is_stricter() -> None:
    generator = np.random.default_rng(6)
    base = generator.random(100)
    trained = base + generator.normal(0.02, 0.1, 100)
    measured = [Measured(float(rows.mean()), None, rows.tolist()) for rows in (trained, base)]
    assert gate_result({"metric": "rouge", "notWorseThanBase": {}}, *measured).passed
    assert not gate_result({"metric": "rouge", "notWorseThanBase": {"confidence": 0.9999}}, *measured).passed


# Error rate and power

COMPARISONS = 200
Draw = Callable[[np.random.Generator, int, float], tuple[Measured, Measured, PairedSums | None]]


def draw_continuous(generator: np.random.Generator, rows: int, difference: float) -> tuple[Measured, Measured, None]:
    """Scores of two models with a correlation of 0.8. The standard deviation of the differences is 0.15."""
    base = generator.normal(0.6, 0.2, rows)
    trained = base + generator.normal(difference, 0.15, rows)
    return Measured(float(trained.mean()), None, trained.tolist()), Measured(float(base.mean()), None, base.tolist()), None


def draw_skewed(generator: np.random.Generator, rows: int, difference: float) -> tuple[Measured, Measured, None]:
    """Most rows gain a little, and a few rows lose much. The standard deviation of the differences is 0.15."""
    base = generator.normal(0.6, 0.2, rows)
    trained = base + difference + 0.15 * (1 - generator.exponential(1, rows))
    return Measured(float(trained.mean()), None, trained.tolist()), Measured(float(base.mean()), None, base.tolist()), None


def draw_fractions(generator: np.random.Generator, rows: int, difference: float) -> tuple[Measured, Measured, None]:
    """Scores of 1 for correct and 0 for wrong answers. 60 % of the rows are equally difficult for both models."""
    difficulty = generator.random(rows)
    own = np.where(generator.random(rows) < 0.6, difficulty, generator.random(rows))
    base, trained = (difficulty < 0.7).astype(float), (own < 0.7 + difference).astype(float)
    return Measured(float(trained.mean()), None, trained.tolist()), Measured(float(base.mean()), None, base.tolist()), None


def draw_loss(generator: np.random.Generator, rows: int, difference: float) -> tuple[Measured, Measured, PairedSums]:
    """Losses of rows with very different lengths. A positive `difference` is an improvement."""
    tokens = np.ceil(generator.lognormal(4, 0.7, rows))
    base_loss = generator.gamma(8, 0.2, rows)
    trained_loss = base_loss - generator.normal(difference, 0.1, rows)
    base, trained = (np.column_stack([loss * tokens, tokens]) for loss in (base_loss, trained_loss))
    return loss_metric(trained), loss_metric(base), PairedSums(base, trained, ratio_of_sums)


MARGINS: dict[Draw, tuple[str, float]] = {
    draw_continuous: ("rouge", 0.05), draw_skewed: ("rouge", 0.05), draw_fractions: ("accuracy", 0.1), draw_loss: ("loss", 0.05),
}  # fmt: skip


def count_promoted(draw: Draw, rows: int, difference: float) -> int:
    generator = np.random.default_rng(20_260_301 + rows)
    metric, margin = MARGINS[draw]
    gate = {"metric": metric, "notWorseThanBase": {"margin": margin}}
    return sum(gate_result(gate, *draw(generator, rows, difference)).passed for _ in range(COMPARISONS))


@pytest.mark.parametrize("rows", [30, 100, 1000])
@pytest.mark.parametrize("draw", MARGINS)
def test_a_model_exactly_at_the_margin_is_promoted_in_about_5_percent_of_the_comparisons(draw: Draw, rows: int) -> None:
    assert count_promoted(draw, rows, -MARGINS[draw][1]) <= 18


@pytest.mark.parametrize(
    ("draw", "rows", "difference"),
    [
        (draw_continuous, 30, 0.068), (draw_continuous, 100, 0.012), (draw_continuous, 1000, -0.03),
        (draw_fractions, 30, 0.26), (draw_fractions, 100, 0.075), (draw_fractions, 1000, -0.045),
        (draw_loss, 30, 0.068), (draw_loss, 100, 0.008), (draw_loss, 1000, -0.033),
    ],
)  # fmt: skip
def test_a_model_is_promoted_if_its_effect_is_detected_with_99_percent_power(draw: Draw, rows: int, difference: float) -> None:
    """The gate detects an effect of `difference` with a probability of about 99 %: in 98.5 to 99.7 % of 1000 comparisons."""
    assert count_promoted(draw, rows, difference) >= 190
