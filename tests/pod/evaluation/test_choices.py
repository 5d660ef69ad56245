"""Multiple choice: the metrics equal those of scikit-learn, and the log-probabilities of the letters equal those of one pass per token."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import DataError
from finetune_trainer.evaluation.choices import chosen_letter, letter_log_probabilities, letter_metrics
from sklearn import metrics as sklearn_metrics
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def model_and_tokenizer(model: Path) -> tuple[Any, Any]:
    """The tiny model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)


def compute_log_probability_token_by_token(model: Any, context: list[int], suffix: list[int]) -> float:
    """Compute the log-probability of the token ids `suffix` after `context`, with one forward pass per token and no padding."""
    total = 0.0
    for position, token in enumerate(suffix):
        with torch.no_grad():
            logits = model(torch.tensor([context + suffix[:position]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize(
    ("prompt", "letters"),
    [("Answer:", ["A", "B", "C"]), ("Answer:", ["A", "zzz", "B)"]), ("Question: (a) or (b)?\nAnswer: ", ["Paris is", "Berlin is", "Rome"])],
    ids=["one token each", "of different lengths", "merged with the end of the prompt"],
)  # fmt: skip
def test_log_probabilities_equal_those_of_one_pass_per_token(model_and_tokenizer: tuple[Any, Any], prompt: str, letters: list[str]) -> None:
    model, tokenizer = model_and_tokenizer
    ids_by_letter = {letter: tokenizer(prompt + letter, add_special_tokens=False)["input_ids"] for letter in letters}
    prompt_tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    shared_count = next(count for count in range(len(prompt_tokens), 0, -1) if all(ids[:count] == prompt_tokens[:count] for ids in ids_by_letter.values()))
    log_probabilities = letter_log_probabilities(model, tokenizer, prompt, letters)
    assert list(log_probabilities) == letters
    for letter, ids in ids_by_letter.items():
        assert log_probabilities[letter] == pytest.approx(compute_log_probability_token_by_token(model, ids[:shared_count], ids[shared_count:]), abs=1e-4)


def test_the_tokenizer_merges_a_letter_with_the_end_of_the_prompt(model_and_tokenizer: tuple[Any, Any]) -> None:
    """The tokenizer makes one token of the prompt's last space and the following word, as the last case of the previous test assumes."""
    tokenizer = model_and_tokenizer[1]
    prompt, prompt_with_word = "Question: (a) or (b)?\nAnswer: ", "Question: (a) or (b)?\nAnswer: Paris"
    prompt_tokens, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, prompt_with_word))
    assert tokens[: len(prompt_tokens)] != prompt_tokens


def test_a_prompt_without_tokens_is_refused(model_and_tokenizer: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="ChoicePromptEmpty"):
        letter_log_probabilities(*model_and_tokenizer, "", ["A", "B"])


def test_equal_scores_choose_the_first_letter_of_the_row() -> None:
    assert chosen_letter({"A": -2.0, "B": -1.0, "C": -1.0}) == "B"
    assert chosen_letter({"D": -1.0, "A": -1.0}) == "D"


def make_scores(letter: str) -> dict[str, float]:
    """Return the log-probabilities of a row whose most likely letter is `letter`."""
    return {name: 0.0 if name == letter else -1.0 for name in "ABCDE"}


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_those_of_scikit_learn(seed: int) -> None:
    """In the rows of this test, E is never correct and D is never chosen. The averages cover only letters that are correct or chosen in some row."""
    random_generator = random.Random(seed)
    correct_letters = [random_generator.choice("ABCD") for _ in range(60)]
    chosen_letters = [letter if letter != "D" and random_generator.random() < 0.5 else random_generator.choice("ABCE") for letter in correct_letters]
    metrics = letter_metrics([make_scores(letter) for letter in chosen_letters], correct_letters)
    options: Any = {"average": "macro", "zero_division": 0}
    assert metrics["accuracy"].value == pytest.approx(sklearn_metrics.accuracy_score(correct_letters, chosen_letters))
    assert metrics["precision"].value == pytest.approx(sklearn_metrics.precision_score(correct_letters, chosen_letters, **options))
    assert metrics["recall"].value == pytest.approx(sklearn_metrics.recall_score(correct_letters, chosen_letters, **options))
    assert metrics["f1"].value == pytest.approx(sklearn_metrics.f1_score(correct_letters, chosen_letters, **options))
    assert metrics["accuracy"].rows == [float(chosen == correct) for chosen, correct in zip(chosen_letters, correct_letters, strict=True)]
    assert metrics["f1"].rows is None


def test_metrics_equal_values_computed_by_hand() -> None:
    metrics = letter_metrics([make_scores(letter) for letter in "AABC"], list("ABBB"))
    assert {name: metric.value for name, metric in metrics.items()} == {
        "accuracy": 0.5,
        "precision": pytest.approx((1 / 2 + 1 + 0) / 3),
        "recall": pytest.approx((1 + 1 / 3 + 0) / 3),
        "f1": pytest.approx((2 / 3 + 2 / 4 + 0) / 3),
    }


def test_metrics_that_cannot_be_computed_have_a_reason() -> None:
    metrics_without_rows = letter_metrics([], [])
    assert {metric.value for metric in metrics_without_rows.values()} == {None} and "no multiple-choice rows" in str(metrics_without_rows["f1"].reason)
    metrics_with_nan = letter_metrics([make_scores("A"), {"A": math.nan, "B": -1.0}], ["A", "B"])
    assert metrics_with_nan["accuracy"].value is None and "NaN in 1 of 2 multiple-choice rows (first: row 2)" in str(metrics_with_nan["accuracy"].reason)
    with pytest.raises(DataError, match="row 2: the correct letter 'F' is not one of A, B, C, D, E"):
        letter_metrics([make_scores("A"), make_scores("A")], ["A", "F"])
