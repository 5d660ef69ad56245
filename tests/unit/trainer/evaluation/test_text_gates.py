"""Error rate and power of gates for BLEU and ROUGE, with texts that are measured as the stages measure them.

Each population has 1500 rows. A row has a correct answer, and the answers of a base model and of a trained model. The measurements of the whole population are
the true values of the metrics. A comparison draws rows of the population with replacement. A model is exactly at the
margin of a gate if its true value is worse than that of the base model by the margin.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from finetune_api.spec.results import Gate
from finetune_trainer.evaluation.bootstrap import FloatArray, bleu_of_sums
from finetune_trainer.evaluation.gates import evaluate_gates
from finetune_trainer.evaluation.measurements import Measurements, paired_sums
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.text_metrics import bleu, bleu_sums, rouge
from finetune_trainer.evaluation.values import MetricValue, mean_of_rows

COMPARISON_COUNT, POPULATION_ROW_COUNT = 200, 1500
WORDS = [f"w{first}{end}" for first in "bcdfghjklmnpqrstvwxz" for end in ("a", "en", "ing", "ed", "ion", "er", "ly", "est")]
FREQUENCIES = 1 / np.arange(1, len(WORDS) + 1) / (1 / np.arange(1, len(WORDS) + 1)).sum()
"""Zipf's frequencies."""
SHARE_OF_CUT_ANSWERS = 0.1


@dataclass(frozen=True)
class Answers:
    """The answers of one model to all questions, and their measurements."""

    predictions: list[Prediction]
    bleu_sums: FloatArray
    rouge_scores: FloatArray

    @staticmethod
    def of(predictions: list[Prediction]) -> Answers:
        return Answers(predictions, np.array(bleu_sums(predictions)), np.array(rouge(predictions)["rougeL"].rows))

    def measure_rows(self, row_indices: FloatArray) -> Measurements:
        """Return the measurements of these rows, as the stage would store them. `row_indices`: row indices, which may occur several times."""
        sums = self.bleu_sums[row_indices]
        values = {"bleu": MetricValue(float(bleu_of_sums(sums.sum(axis=0)))), "rougeL": mean_of_rows(self.rouge_scores[row_indices].tolist(), {})}
        return Measurements(row_count=len(row_indices), bleu_sums=sums.tolist()).with_values(values)

    @property
    def true_values(self) -> dict[str, float]:
        return {"bleu": float(bleu_of_sums(self.bleu_sums.sum(axis=0))), "rouge": float(self.rouge_scores.mean())}


def draw_answers(generator: np.random.Generator, correct_answers: list[FloatArray], difficulty: FloatArray, skill: float) -> Answers:
    """Draw the answers of a model. A model with more `skill` knows more words. Some answers are cut."""
    predictions = []
    for correct_answer, row_difficulty in zip(correct_answers, difficulty, strict=True):
        is_known = generator.random(len(correct_answer)) < skill - row_difficulty
        answer = np.where(is_known, correct_answer, generator.choice(len(WORDS), len(correct_answer), p=FREQUENCIES))
        if generator.random() < SHARE_OF_CUT_ANSWERS:
            answer = answer[: max(1, int(len(answer) * generator.random()))]
        texts = (" ".join(WORDS[number] for number in words) for words in (answer, correct_answer))
        predictions.append(Prediction(None, "question", *texts))
    return Answers.of(predictions)


@pytest.fixture(scope="module")
def answers_by_model() -> dict[str, Answers]:
    """The answers of a base model, of a worse model, and of a model with the base model's skill."""
    generator = np.random.default_rng(11)
    lengths = np.ceil(generator.lognormal(2.7, 0.5, POPULATION_ROW_COUNT)).astype(int)
    correct_answers = [generator.choice(len(WORDS), length, p=FREQUENCIES) for length in lengths]
    difficulty = generator.normal(0, 0.15, POPULATION_ROW_COUNT)
    return {name: draw_answers(generator, correct_answers, difficulty, skill) for name, skill in (("base", 0.8), ("worse", 0.7), ("equal", 0.8))}


def count_promoted(base: Answers, trained: Answers, margins: dict[str, float], row_count: int) -> dict[str, int]:
    """For each metric, return how many of `COMPARISON_COUNT` models pass the gate."""
    gates = [Gate.model_validate({"metric": metric, "notWorseThanBase": {"margin": margin}}) for metric, margin in margins.items()]
    generator, promoted_counts = np.random.default_rng(20_260_301 + row_count), Counter[str]()
    for _ in range(COMPARISON_COUNT):
        row_indices = generator.integers(0, POPULATION_ROW_COUNT, row_count)
        trained_measurements, base_measurements = trained.measure_rows(row_indices), base.measure_rows(row_indices)
        results = evaluate_gates(gates, trained_measurements.gate_values, base_measurements.gate_values, paired_sums(base_measurements, trained_measurements))
        promoted_counts.update(result.metric for result in results if result.passed)
    return {metric: promoted_counts[metric] for metric in margins}


def test_the_measurements_of_drawn_rows_are_those_of_their_texts(answers_by_model: dict[str, Answers]) -> None:
    row_indices = np.random.default_rng(3).integers(0, POPULATION_ROW_COUNT, 40)
    predictions = [answers_by_model["worse"].predictions[row_index] for row_index in row_indices]
    measurements = answers_by_model["worse"].measure_rows(row_indices)
    assert measurements.values["bleu"].value == pytest.approx(bleu(predictions).value, rel=1e-9)
    assert measurements.values["rougeL"] == rouge(predictions)["rougeL"]
    assert measurements.bleu_sums == bleu_sums(predictions)


@pytest.mark.slow
@pytest.mark.parametrize("row_count", [30, 100, 300])
def test_a_model_exactly_at_the_margin_is_promoted_in_about_5_percent(row_count: int, answers_by_model: dict[str, Answers]) -> None:
    base, worse = answers_by_model["base"], answers_by_model["worse"]
    margins = {name: value - worse.true_values[name] for name, value in base.true_values.items()}
    assert min(margins.values()) > 0
    promoted_counts = count_promoted(base, worse, margins, row_count)
    assert max(promoted_counts.values()) <= 18, promoted_counts


DETECTED_EFFECTS = {"bleu": 12.8, "rouge": 0.089}
"""For each metric: the distance from the margin that the gate detects with a probability of about 99 % if it sees 100 rows."""


@pytest.mark.slow
def test_an_effect_with_99_percent_power_is_promoted(answers_by_model: dict[str, Answers]) -> None:
    """Both models have the same skill, and the margin lies below their true difference by the distance in DETECTED_EFFECTS."""
    base, equal = answers_by_model["base"], answers_by_model["equal"]
    margins = {name: DETECTED_EFFECTS[name] - (equal.true_values[name] - value) for name, value in base.true_values.items()}
    promoted_counts = count_promoted(base, equal, margins, 100)
    assert min(promoted_counts.values()) >= 190, promoted_counts
