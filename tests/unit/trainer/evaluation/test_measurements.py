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

    def select(self, numbers: list[int]) -> Rows:
        ends = np.cumsum([0, *self.sizes])
        tokens = [token for number in numbers for token in range(ends[number], ends[number + 1])]
        parts = ([part[token] for token in tokens] for part in (self.labels, self.predicted, self.losses))
        return Rows([self.sizes[number] for number in numbers], *parts)  # type: ignore[arg-type]


def measure(rows: Rows) -> Measurements:
    """Measure the rows as the stages do."""
    counts, row_counts = TokenCounts(64), RowCounts()
    predictions = TokenPredictions(torch.tensor(rows.predicted), torch.tensor(rows.labels), torch.tensor(rows.losses))
    counts.add(predictions)
    ends = np.cumsum([0, *rows.sizes])
    row_counts.add(predictions, [[IGNORED_LABEL, IGNORED_LABEL, *rows.labels[ends[i] : ends[i + 1]]] for i in range(len(rows.sizes))])
    values = {name: getattr(counts, name) for name in TOKEN_METRICS}
    return Measurements(row_count=len(rows.sizes), token_sums=row_counts.sums()).with_values(values)


def draw_rows(generator: np.random.Generator, count: int, skill: float, like: Rows | None = None) -> Rows:
    """Draw the predictions of a model for `count` rows. Rows and tokens differ in difficulty.

    `skill`: the probability of a correct prediction for a token of difficulty 0. `like`: rows of another model, whose labels are used.
    """
    sizes = like.sizes if like else np.ceil(generator.lognormal(2.5, 0.5, count)).astype(int).tolist()
    wanted = np.array(like.labels) if like else generator.choice(40, size=sum(sizes), p=FREQUENCIES)
    difficulty = np.repeat(generator.normal(0, 0.1, count), sizes) + 0.2 * (wanted % 3 == 0)
    is_hit = generator.random(len(wanted)) < skill - difficulty
    predicted = np.where(is_hit, wanted, generator.choice(40, size=len(wanted), p=FREQUENCIES))
    return Rows(sizes, wanted.tolist(), predicted.tolist(), np.where(is_hit, 0.2, 3.0).tolist())


def test_every_token_metric_follows_from_the_sums_of_rows() -> None:
    generator = np.random.default_rng(3)
    base, trained = measure(draw_rows(generator, 31, 0.5)), measure(draw_rows(generator, 31, 0.7))
    for name, pairs in paired_sums(base, trained).items():
        for sums, found in ((pairs.base, base), (pairs.trained, trained)):
            assert float(pairs.metric(sums.sum(axis=0))) == pytest.approx(found.values[name].value, rel=1e-6), name
    assert paired_sums(base, trained).keys() == set(TOKEN_METRICS)
    assert [row[1] for row in base.token_sums] == draw_rows(np.random.default_rng(3), 31, 0.5).sizes


def test_the_share_of_a_row_is_its_influence_on_precision_and_f1() -> None:
    """Duplicating a row changes the metric by about (share - metric) / rows."""
    rows = draw_rows(np.random.default_rng(7), 400, 0.6)
    found = measure(rows)
    for name, column in (("precision", 3), ("f1", 4)):
        value = found.values[name].value or 0
        for number in (0, 17, 350):
            longer = measure(rows.select([*range(400), number])).values[name].value or 0
            expected = (found.token_sums[number][column] - value) / 401
            assert longer - value == pytest.approx(expected, rel=0.05, abs=2e-6), (name, number)


def test_weighted_metrics_equal_those_of_scikit_learn() -> None:
    from sklearn.metrics import f1_score, precision_score

    rows = draw_rows(np.random.default_rng(1), 20, 0.5)
    labels, predicted = np.array(rows.labels), np.array(rows.predicted)
    precisions, f1_scores = row_shares(labels, predicted, rows.sizes)
    assert np.mean(precisions) == pytest.approx(precision_score(labels, predicted, average="weighted", zero_division=0))
    assert np.mean(f1_scores) == pytest.approx(f1_score(labels, predicted, average="weighted", zero_division=0))


def test_a_row_without_counted_tokens_adds_nothing_to_the_sums() -> None:
    counts = RowCounts()
    empty = torch.tensor([], dtype=torch.long)
    counts.add(TokenPredictions(empty, empty, torch.tensor([])), [[IGNORED_LABEL, IGNORED_LABEL]])
    assert counts.sums() == []
    found = measure(Rows([0, 2], [1, 2], [1, 3], [0.1, 2.0]))
    assert found.token_sums[0][:3] == [0, 0, 0] and found.token_sums[1][:3] == pytest.approx([2.1, 2, 1])


def predictions(answers: list[str]) -> list[Prediction]:
    references = ["the cat sat on the mat today", "a dog ran over the green hill", None, "paris is the capital of france"]
    return [Prediction(None, "q", answer, reference) for answer, reference in zip(answers, references, strict=True)]


def test_the_corpus_bleu_follows_from_the_sums_of_rows() -> None:
    rows = predictions(["the cat sat on the mat", "a dog ran over a green hill", "no reference", "paris is a capital of france"])
    sums = bleu_sums(rows)
    assert float(bleu_of_sums(np.array(sums).sum(axis=0))) == pytest.approx(bleu(rows).value, rel=1e-6)
    assert sums[2] == [0.0] * 10 and sums[0][:2] == [6.0, 7.0]


def test_the_file_keeps_every_number_even_if_it_is_not_finite(tmp_path: Path) -> None:
    values = {"loss": MetricValue(None, "the loss is not finite"), "rougeL": MetricValue(0.5, "1 of 2", [0.5, None])}
    found = Measurements(row_count=2, token_sums=[[math.inf, 3.0, 1.0, 0.5, 0.25]], answers=["a"], end_token_ids=[7]).with_values(values)
    found.write(tmp_path / "m.json")
    assert Measurements.read(tmp_path / "m.json") == found
    assert Measurements.read(tmp_path / "m.json").values == values and found.gate_values["rouge"] == values["rougeL"]


def test_a_loss_that_is_not_finite_has_no_interval() -> None:
    rows = Rows([1, 1], [1, 2], [1, 2], [0.1, math.inf])
    pairs = paired_sums(measure(rows), measure(rows))["loss"]
    comparison = compare_metric(MetricValue(0.1), MetricValue(0.1), pairs, 0.95)
    assert not isinstance(comparison, str) and comparison.low is None and comparison.reason == "a score is not a finite number"


def test_a_gate_for_rouge_reads_rouge_l() -> None:
    trained = Measurements().with_values(rouge(predictions(["the cat", "a dog ran", "x", "paris"])))
    [found] = evaluate_gates([Gate.model_validate({"metric": "rouge", "op": "ge", "value": 1})], trained.gate_values, {})
    assert found.text == f"rouge is {trained.values['rougeL'].value:.6g}, and the gate requires at least 1"


# Error rate and power of gates, with measurements as the stages produce them

COMPARISONS = 200
GATED = ("loss", "perplexity", "accuracy", "precision", "f1")


def count_promoted(margins: dict[str, float], count: int, lost_skill: float) -> dict[str, int]:
    """For each metric, return how many of `COMPARISONS` models pass the gate."""
    gates = [Gate.model_validate({"metric": metric, "notWorseThanBase": {"margin": margin}}) for metric, margin in margins.items()]
    generator, promoted = np.random.default_rng(20_260_301 + count), Counter[str]()
    for _ in range(COMPARISONS):
        base_rows = draw_rows(generator, count, 0.6)
        base, trained = measure(base_rows), measure(draw_rows(generator, count, 0.6 - lost_skill, base_rows))
        results = evaluate_gates(gates, trained.gate_values, base.gate_values, paired_sums(base, trained))
        promoted.update(result.metric for result in results if result.passed)
    return {metric: promoted[metric] for metric in margins}


@pytest.mark.slow  # `make test` runs a fast variant in test_gates.py, which draws scores instead of measuring tokens
@pytest.mark.parametrize("count", [30, 100])
def test_a_model_exactly_at_the_margin_is_promoted_in_about_5_percent(count: int) -> None:
    generator = np.random.default_rng(5)
    base_rows = draw_rows(generator, 40_000, 0.6)
    base, trained = (measure(rows).values for rows in (base_rows, draw_rows(generator, 40_000, 0.5, base_rows)))
    margins = {name: abs((trained[name].value or 0) - (base[name].value or 0)) for name in GATED}
    promoted = count_promoted(margins, count, 0.1)
    assert max(promoted.values()) <= 18, promoted


@pytest.mark.slow  # `make test` runs a fast variant in test_gates.py, which draws scores instead of measuring tokens
def test_an_equal_model_is_promoted_if_the_margin_has_99_percent_power() -> None:
    """With each of these margins and 100 rows, the gate promotes a model that is as good as the base model with a probability of about 99 %."""
    promoted = count_promoted({"loss": 0.261, "perplexity": 1.25, "accuracy": 0.0906, "precision": 0.0915, "f1": 0.0909}, 100, 0.0)
    assert min(promoted.values()) >= 190, promoted
