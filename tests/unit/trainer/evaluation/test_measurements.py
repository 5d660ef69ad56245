"""The sums of rows that are used to compare two models, and the error rate and power of gates that use these sums."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_api.spec.results import Gate
from finetune_trainer.evaluation.bootstrap import bleu_of_sums
from finetune_trainer.evaluation.gates import compare_metric, evaluate_gates
from finetune_trainer.evaluation.measurements import Measurements, paired_sums
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.text_metrics import bleu, bleu_sums, rouge
from finetune_trainer.evaluation.token_metrics import (
    IGNORED_LABEL,
    RowCounts,
    TokenCounts,
    TokenPredictions,
    row_shares,
)
from finetune_trainer.evaluation.values import MetricValue

TOKEN_METRICS = ("loss", "perplexity", "accuracy", "precision", "recall", "f1")
FREQUENCIES = 1 / np.arange(1, 41) / (1 / np.arange(1, 41)).sum()
"""Zipf's frequencies of 40 tokens."""


@dataclass(frozen=True)
class Rows:
    """The tokens of all rows, one after the other."""

    sizes: list[int]
    labels: list[int]
    predicted: list[int]
    losses: list[float]

    def select(self, row_numbers: list[int]) -> Rows:
        ends = np.cumsum([0, *self.sizes])
        tokens = [token for row_number in row_numbers for token in range(ends[row_number], ends[row_number + 1])]
        parts = ([part[token] for token in tokens] for part in (self.labels, self.predicted, self.losses))
        return Rows([self.sizes[row_number] for row_number in row_numbers], *parts)  # type: ignore[arg-type]


def measure(rows: Rows) -> Measurements:
    """Measure the rows as the stages do."""
    counts, row_counts = TokenCounts(64), RowCounts()
    predictions = TokenPredictions(torch.tensor(rows.predicted), torch.tensor(rows.labels), torch.tensor(rows.losses))
    counts.add(predictions)
    ends = np.cumsum([0, *rows.sizes])
    row_counts.add(predictions, [[IGNORED_LABEL, IGNORED_LABEL, *rows.labels[ends[i] : ends[i + 1]]] for i in range(len(rows.sizes))])
    values = {name: getattr(counts, name) for name in TOKEN_METRICS}
    return Measurements(row_count=len(rows.sizes), token_sums=row_counts.sums()).with_values(values)


def draw_rows(generator: np.random.Generator, row_count: int, skill: float, labelled_rows: Rows | None = None) -> Rows:
    """Draw the predictions of a model for `row_count` rows. Rows and tokens differ in difficulty.

    `skill`: the probability of a correct prediction for a token of difficulty 0. `labelled_rows`: rows of another model, whose labels are used.
    """
    sizes = labelled_rows.sizes if labelled_rows else np.ceil(generator.lognormal(2.5, 0.5, row_count)).astype(int).tolist()
    labels = np.array(labelled_rows.labels) if labelled_rows else generator.choice(40, size=sum(sizes), p=FREQUENCIES)
    difficulty = np.repeat(generator.normal(0, 0.1, row_count), sizes) + 0.2 * (labels % 3 == 0)
    is_hit = generator.random(len(labels)) < skill - difficulty
    predicted = np.where(is_hit, labels, generator.choice(40, size=len(labels), p=FREQUENCIES))
    return Rows(sizes, labels.tolist(), predicted.tolist(), np.where(is_hit, 0.2, 3.0).tolist())


def test_every_token_metric_follows_from_the_sums_of_rows() -> None:
    generator = np.random.default_rng(3)
    base, trained = measure(draw_rows(generator, 31, 0.5)), measure(draw_rows(generator, 31, 0.7))
    for name, metric_sums in paired_sums(base, trained).items():
        for sums, measurements in ((metric_sums.base, base), (metric_sums.trained, trained)):
            assert float(metric_sums.metric(sums.sum(axis=0))) == pytest.approx(measurements.values[name].value, rel=1e-6), name
    assert paired_sums(base, trained).keys() == set(TOKEN_METRICS)
    assert [row[1] for row in base.token_sums] == draw_rows(np.random.default_rng(3), 31, 0.5).sizes


def test_the_share_of_a_row_is_its_influence_on_precision_and_f1() -> None:
    """Duplicating a row changes the metric by about (share - metric) / rows."""
    rows = draw_rows(np.random.default_rng(7), 400, 0.6)
    measurements = measure(rows)
    for name, column in (("precision", 3), ("f1", 4)):
        value = measurements.values[name].value or 0
        for row_number in (0, 17, 350):
            value_with_duplicate = measure(rows.select([*range(400), row_number])).values[name].value or 0
            expected_change = (measurements.token_sums[row_number][column] - value) / 401
            assert value_with_duplicate - value == pytest.approx(expected_change, rel=0.05, abs=2e-6), (name, row_number)


def test_weighted_metrics_equal_those_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score, precision_score

    rows = draw_rows(np.random.default_rng(1), 20, 0.5)
    labels, predicted = np.array(rows.labels), np.array(rows.predicted)
    precisions, f1_scores = row_shares(labels, predicted, rows.sizes)
    assert np.mean(precisions) == pytest.approx(precision_score(labels, predicted, average="weighted", zero_division=0))
    assert np.mean(f1_scores) == pytest.approx(f1_score(labels, predicted, average="weighted", zero_division=0))


def test_a_row_without_counted_tokens_adds_nothing_to_the_sums() -> None:
    counts = RowCounts()
    no_tokens = torch.tensor([], dtype=torch.long)
    counts.add(TokenPredictions(no_tokens, no_tokens, torch.tensor([])), [[IGNORED_LABEL, IGNORED_LABEL]])
    assert counts.sums() == []
    measurements = measure(Rows([0, 2], [1, 2], [1, 3], [0.1, 2.0]))
    assert measurements.token_sums[0][:3] == [0, 0, 0] and measurements.token_sums[1][:3] == pytest.approx([2.1, 2, 1])


def make_predictions(answers: list[str]) -> list[Prediction]:
    references = ["the cat sat on the mat today", "a dog ran over the green hill", None, "paris is the capital of france"]
    return [Prediction(None, "q", answer, reference) for answer, reference in zip(answers, references, strict=True)]


def test_the_corpus_bleu_follows_from_the_sums_of_rows() -> None:
    predictions = make_predictions(["the cat sat on the mat", "a dog ran over a green hill", "no reference", "paris is a capital of france"])
    sums = bleu_sums(predictions)
    assert float(bleu_of_sums(np.array(sums).sum(axis=0))) == pytest.approx(bleu(predictions).value, rel=1e-6)
    assert sums[2] == [0.0] * 10 and sums[0][:2] == [6.0, 7.0]


def test_the_file_keeps_every_number_even_if_it_is_not_finite(tmp_path: Path) -> None:
    values = {"loss": MetricValue(None, "the loss is not finite"), "rougeL": MetricValue(0.5, "1 of 2", [0.5, None])}
    measurements = Measurements(row_count=2, token_sums=[[math.inf, 3.0, 1.0, 0.5, 0.25]], answers=["a"], end_token_ids=[7]).with_values(values)
    measurements.write(tmp_path / "m.json")
    assert Measurements.read(tmp_path / "m.json") == measurements
    assert Measurements.read(tmp_path / "m.json").values == values and measurements.gate_values["rouge"] == values["rougeL"]


def test_a_loss_that_is_not_finite_has_no_interval() -> None:
    rows = Rows([1, 1], [1, 2], [1, 2], [0.1, math.inf])
    loss_sums = paired_sums(measure(rows), measure(rows))["loss"]
    comparison = compare_metric(MetricValue(0.1), MetricValue(0.1), loss_sums, 0.95)
    assert not isinstance(comparison, str) and comparison.low is None and comparison.reason == "a score is not a finite number"


def test_a_gate_for_rouge_reads_rouge_l() -> None:
    trained_measurements = Measurements().with_values(rouge(make_predictions(["the cat", "a dog ran", "x", "paris"])))
    [result] = evaluate_gates([Gate.model_validate({"metric": "rouge", "op": "ge", "value": 1})], trained_measurements.gate_values, {})
    assert result.text == f"rouge is {trained_measurements.values['rougeL'].value:.6g}, and the gate requires at least 1"


# Error rate and power of gates, with measurements as the stages produce them

COMPARISON_COUNT = 200
GATED_METRICS = ("loss", "perplexity", "accuracy", "precision", "f1")


def count_promoted(margins: dict[str, float], row_count: int, lost_skill: float) -> dict[str, int]:
    """For each metric, return how many of `COMPARISON_COUNT` models pass the gate."""
    gates = [Gate.model_validate({"metric": metric, "notWorseThanBase": {"margin": margin}}) for metric, margin in margins.items()]
    generator, promoted_counts = np.random.default_rng(20_260_301 + row_count), Counter[str]()
    for _ in range(COMPARISON_COUNT):
        base_rows = draw_rows(generator, row_count, 0.6)
        base, trained = measure(base_rows), measure(draw_rows(generator, row_count, 0.6 - lost_skill, base_rows))
        results = evaluate_gates(gates, trained.gate_values, base.gate_values, paired_sums(base, trained))
        promoted_counts.update(result.metric for result in results if result.passed)
    return {metric: promoted_counts[metric] for metric in margins}


@pytest.mark.slow  # `make test` runs a fast variant in test_gates.py, which draws scores instead of measuring tokens
@pytest.mark.parametrize("row_count", [30, 100])
def test_a_model_exactly_at_the_margin_is_promoted_in_about_5_percent(row_count: int) -> None:
    generator = np.random.default_rng(5)
    base_rows = draw_rows(generator, 40_000, 0.6)
    base, trained = (measure(rows).values for rows in (base_rows, draw_rows(generator, 40_000, 0.5, base_rows)))
    margins = {name: abs((trained[name].value or 0) - (base[name].value or 0)) for name in GATED_METRICS}
    promoted_counts = count_promoted(margins, row_count, 0.1)
    assert max(promoted_counts.values()) <= 18, promoted_counts


@pytest.mark.slow  # `make test` runs a fast variant in test_gates.py, which draws scores instead of measuring tokens
def test_an_equal_model_is_promoted_if_the_margin_has_99_percent_power() -> None:
    """With each of these margins and 100 rows, the gate promotes a model that is as good as the base model with a probability of about 99 %."""
    promoted_counts = count_promoted({"loss": 0.261, "perplexity": 1.25, "accuracy": 0.0906, "precision": 0.0915, "f1": 0.0909}, 100, 0.0)
    assert min(promoted_counts.values()) >= 190, promoted_counts
