"""Text metrics. The tests compute the expected values without the libraries that the trainer uses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache

import pytest
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.text_metrics import bertscore, bleu, cosine, exact_match, rouge, semantic_similarity

ANSWER_PAIRS = [
    ("the cat sat on the red mat", "the cat sat on the red mat"),
    ("the the the dog ran to the old man", "the dog ran to the old man at six"),
    ("a big fox can see the sun set in the sky", "the fox can see the sun go up in the sky"),
]
"""Pairs of a model's answer and the correct answer. Stemming changes none of the words, and each pair shares a sequence of four words."""


def to_predictions(pairs: Sequence[tuple[str, str | None]]) -> list[Prediction]:
    return [Prediction(None, "question", answer, reference) for answer, reference in pairs]


PREDICTIONS_WITHOUT_REFERENCE = to_predictions([("anything", None)])


def count_ngrams(text: str, size: int) -> Counter[tuple[str, ...]]:
    words = text.split()
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def compute_bleu_by_hand(pairs: Sequence[tuple[str, str]], max_size: int = 4) -> float:
    """Return the geometric mean of the clipped n-gram precisions times the brevity penalty (Papineni et al. 2002), from 0 to 100."""
    logarithms = []
    for size in range(1, max_size + 1):
        matches = sum((count_ngrams(answer, size) & count_ngrams(reference, size)).total() for answer, reference in pairs)
        logarithms.append(math.log(matches / sum(count_ngrams(answer, size).total() for answer, _ in pairs)))
    answer_length, reference_length = (sum(len(pair[side].split()) for pair in pairs) for side in (0, 1))
    return 100 * min(1.0, math.exp(1 - reference_length / answer_length)) * math.exp(sum(logarithms) / max_size)


def compute_f_measure(matches: int, answer_length: int, reference_length: int) -> float:
    return 2 * matches / (answer_length + reference_length)


def measure_common_subsequence(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    @cache
    def measure_from(first_start: int, second_start: int) -> int:
        if first_start == len(first) or second_start == len(second):
            return 0
        if first[first_start] == second[second_start]:
            return 1 + measure_from(first_start + 1, second_start + 1)
        return max(measure_from(first_start + 1, second_start), measure_from(first_start, second_start + 1))

    return measure_from(0, 0)


def test_bleu_is_computed_over_the_corpus_on_a_scale_to_100() -> None:
    metric = bleu(to_predictions(ANSWER_PAIRS))
    assert metric.value == pytest.approx(compute_bleu_by_hand(ANSWER_PAIRS), rel=1e-9)
    assert metric.rows == pytest.approx([compute_bleu_by_hand([pair]) for pair in ANSWER_PAIRS], rel=1e-9)
    assert metric.rows is not None and metric.rows[0] == 100.0 and metric.reason is None
    assert 40 < metric.value < 90 and metric.value != pytest.approx(sum(metric.scores) / 3)


def test_bleu_of_a_short_row_uses_only_n_grams_up_to_its_length() -> None:
    """A row of two words has no n-grams of three or four words."""
    assert bleu(to_predictions([("red mat", "red mat")])).rows == [100.0]


def test_rouge_is_the_mean_f_measure_of_the_rows() -> None:
    metrics = rouge(to_predictions(ANSWER_PAIRS))
    for size, name in ((1, "rouge1"), (2, "rouge2")):
        ngram_counts = [(count_ngrams(answer, size), count_ngrams(reference, size)) for answer, reference in ANSWER_PAIRS]
        expected_scores = [compute_f_measure((answer & reference).total(), answer.total(), reference.total()) for answer, reference in ngram_counts]
        assert metrics[name].rows == pytest.approx(expected_scores)
        assert metrics[name].value == pytest.approx(sum(expected_scores) / 3)
    word_pairs = [(tuple(answer.split()), tuple(reference.split())) for answer, reference in ANSWER_PAIRS]
    expected_rouge_l = [compute_f_measure(measure_common_subsequence(*pair), len(pair[0]), len(pair[1])) for pair in word_pairs]
    assert metrics["rougeL"].rows == pytest.approx(expected_rouge_l) and metrics["rougeL"].value == pytest.approx(sum(expected_rouge_l) / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Running, runs!", "runs running", 1.0),  # words are stemmed, and punctuation does not count
        ("Αθήνα", "Αθήνα", 1.0),
        ("東京です", "東京", 2 * 2 / (4 + 2)),
        ("", "Paris", 0.0),
    ],
)  # fmt: skip
def test_rouge_compares_stemmed_words_in_every_script(answer: str, reference: str, score: float) -> None:
    assert rouge(to_predictions([(answer, reference)]))["rouge1"].value == pytest.approx(score)


def test_rouge_of_ascii_text_equals_that_of_the_rouge_library() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    answer, reference = "Don't stop: the 3 runners' e-mails (generously) said nothing.", "The runner generously e-mailed 3 times, don't stop!"
    library_scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    metrics = rouge(to_predictions([(answer, reference)]))
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx({name: score.fmeasure for name, score in library_scores.items()})


def test_exact_match_ignores_only_white_space_at_the_start_and_the_end() -> None:
    metric = exact_match(to_predictions([(" Paris\n", "Paris"), ("paris", "Paris"), ("Paris.", "Paris"), ("x", None)]))
    assert metric.value == pytest.approx(1 / 3) and metric.rows == [1.0, 0.0, 0.0, None]
    assert metric.reason == "1 of 4 rows are not scored (first: the row has no ground_truth)"
    assert metric.row_reasons == {3: "the row has no ground_truth"}


VECTORS = {"one": [1.0, 0.0], "diagonal": [3.0, 3.0], "opposite": [-2.0, 0.0], "zero": [0.0, 0.0]}


def test_semantic_similarity_is_the_mean_cosine() -> None:
    embedded_texts = []

    def embed(texts: list[str]) -> list[list[float]]:
        embedded_texts.append(texts)
        return [VECTORS[text] for text in texts]

    predictions = to_predictions([("one", "diagonal"), ("one", "opposite"), ("one", None), ("one", "zero"), (" ", "one")])
    metric = semantic_similarity(predictions, embed, field="x")
    assert metric.rows == [pytest.approx(math.sqrt(0.5)), -1.0, None, None, 0.0]
    assert metric.value == pytest.approx((math.sqrt(0.5) - 1) / 3)
    assert metric.row_reasons == {2: "the row has no ground_truth", 3: "an embedding is zero or not finite"}
    assert embedded_texts == [["one", "one", "one", "diagonal", "opposite", "zero"]]
    assert semantic_similarity(to_predictions([("one", "zero")]), embed, field="x").value is None


def test_metrics_without_a_model_name_the_field_to_set() -> None:
    predictions = to_predictions(ANSWER_PAIRS)
    assert semantic_similarity(predictions, None, field="evaluation.a").reason == "semantic similarity needs an embedding model: set evaluation.a"
    metrics = bertscore(predictions, None, field="evaluation.b")
    assert set(metrics) == {"precision", "recall", "f1"}
    assert metrics["f1"].value is None and metrics["f1"].reason == "BERTScore needs a local encoder model: set evaluation.b"


@pytest.mark.parametrize("predictions", [PREDICTIONS_WITHOUT_REFERENCE, []], ids=["no correct answer", "no rows"])
def test_metrics_without_a_correct_answer_have_no_value(predictions: list[Prediction]) -> None:
    similarity = semantic_similarity(predictions, lambda texts: [[1.0] for _ in texts], field="x")
    metrics = [bleu(predictions), *rouge(predictions).values(), exact_match(predictions), similarity]
    assert {metric.value for metric in metrics} == {None}
    assert {metric.reason for metric in metrics} == {"no row of the predictions has a ground_truth"}


def test_rows_without_a_correct_answer_keep_their_position() -> None:
    predictions = [*PREDICTIONS_WITHOUT_REFERENCE, *to_predictions(ANSWER_PAIRS)]
    for metric in (bleu(predictions), *rouge(predictions).values()):
        assert metric.rows is not None and metric.rows[0] is None and len(metric.scores) == 3
    assert bleu(predictions).value == bleu(to_predictions(ANSWER_PAIRS)).value


def test_vectors_that_are_zero_or_not_finite_have_no_cosine() -> None:
    assert cosine([1.0], [0.0]) is None and cosine([math.nan], [1.0]) is None and cosine([math.inf], [1.0]) is None
    assert cosine([1e200, 1e200], [1.0, 1.0]) == pytest.approx(1.0)
