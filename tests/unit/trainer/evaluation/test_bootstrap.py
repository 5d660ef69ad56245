"""Confidence intervals of the difference between two models, compared with independent references."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from finetune_trainer.evaluation import bootstrap
from finetune_trainer.evaluation.bootstrap import (
    MetricComparison,
    bleu_of_sums,
    compare_rows,
    compare_sums,
    perplexity_of_sums,
    ratio_of_sums,
    student_quantile,
)
from scipy import stats

IntervalEnds = tuple[float, float]


def get_interval_ends(comparison: MetricComparison) -> IntervalEnds:
    assert comparison.low is not None and comparison.high is not None
    return comparison.low, comparison.high


def test_equal_inputs_have_equal_results_and_another_seed_changes_the_interval() -> None:
    generator = np.random.default_rng(1)
    base, trained = generator.random(40), generator.random(40)
    first_comparison = compare_rows(base, trained)
    bootstrap._draw_row_counts_cached.cache_clear()
    assert compare_rows(base, trained) == first_comparison
    assert get_interval_ends(compare_rows(base, trained, seed=7)) != get_interval_ends(first_comparison)


@pytest.mark.parametrize("row_count", [10, 30, 300])
def test_the_interval_of_normal_differences_is_close_to_the_t_interval(row_count: int) -> None:
    generator = np.random.default_rng(row_count)
    base = generator.normal(0.5, 0.2, row_count)
    trained = base + generator.normal(0.02, 0.1, row_count)
    t_interval = stats.ttest_rel(trained, base).confidence_interval(0.95)
    low, high = get_interval_ends(compare_rows(base, trained))
    t_interval_width = t_interval.high - t_interval.low
    assert low <= t_interval.low + 1e-6 and high >= t_interval.high - 1e-6
    assert high - low < 1.25 * t_interval_width


def test_resamples_have_the_distribution_of_all_possible_resamples() -> None:
    """With 4 rows there are 4^4 equally likely resamples, so their t values can be enumerated."""
    differences = np.array([0.1, 0.4, -0.2, 0.7])
    mean, standard_error = differences.mean(), stats.sem(differences)
    resamples = np.array([differences[list(indices)] for indices in itertools.product(range(4), repeat=4)])
    with np.errstate(divide="ignore"):
        t_values = (resamples.mean(axis=1) - mean) / stats.sem(resamples, axis=1)
    low, high = get_interval_ends(compare_rows(np.zeros(4), differences, confidence=0.8))
    quantiles = np.quantile(t_values, [0.1, 0.9], method="nearest")
    student_quantile_90 = stats.t.ppf(0.9, 3)
    assert low == pytest.approx(mean - max(quantiles[1], student_quantile_90) * standard_error, rel=1e-6)
    assert high == pytest.approx(mean - min(quantiles[0], -student_quantile_90) * standard_error, rel=1e-6)


@pytest.mark.parametrize("wins", range(6))
@pytest.mark.parametrize("losses", range(6))
def test_the_interval_of_fractions_contains_exactly_the_differences_that_the_score_test_accepts(wins: int, losses: int) -> None:
    """The reference in this test finds the maximum likelihood under each hypothesis by a search on a grid. The tested code solves an equation."""
    row_count, confidence = 12, 0.9
    base = np.array([0.0] * wins + [1.0] * losses + [1.0] * (row_count - wins - losses))
    trained = np.array([1.0] * wins + [0.0] * losses + [1.0] * (row_count - wins - losses))
    low, high = get_interval_ends(compare_rows(base, trained, confidence=confidence))
    for hypothesis in np.linspace(-0.95, 0.95, 39):
        loss_shares = np.linspace(max(0, -hypothesis), (1 - hypothesis) / 2, 20_001)
        win_shares, tie_shares = loss_shares + hypothesis, 1 - 2 * loss_shares - hypothesis
        with np.errstate(divide="ignore", invalid="ignore"):
            log_likelihoods = sum(
                np.where(count == 0, 0, count * np.log(np.maximum(share, 0)))
                for count, share in ((wins, win_shares), (losses, loss_shares), (row_count - wins - losses, tie_shares))
            )
        most_likely_loss_share = loss_shares[np.nanargmax(log_likelihoods)]
        variance = row_count * (2 * most_likely_loss_share + hypothesis - hypothesis**2)
        score = (wins - losses - row_count * hypothesis) / math.sqrt(max(variance, 1e-12))
        if abs(abs(score) - stats.norm.ppf(0.95)) > 0.01:
            assert (low < hypothesis < high) == (abs(score) < stats.norm.ppf(0.95)), hypothesis


def test_fractions_without_a_difference_have_an_interval_of_more_than_one_value() -> None:
    comparison = compare_rows([1.0] * 30, [1.0] * 30, confidence=0.9)
    squared_critical_value = stats.norm.ppf(0.95) ** 2
    highest_difference = squared_critical_value / (30 + squared_critical_value)
    assert get_interval_ends(comparison) == pytest.approx((-highest_difference, highest_difference))


def test_rows_with_equal_differences_have_the_exact_interval_for_zero_of_n_events() -> None:
    comparison = compare_rows([0.5] * 30, [0.5] * 30, confidence=0.9)
    highest_share = stats.beta.ppf(0.95, 1, 30)
    assert get_interval_ends(comparison) == pytest.approx((-0.5 * highest_share, 0.5 * highest_share))


@pytest.mark.parametrize(
    ("base", "trained", "reason"),
    [
        ([], [], "at least 2 rows"),
        ([0.5], [0.4], "at least 2 rows"),
        ([1.0], [0.0], "at least 2 rows"),
        ([0.5, math.nan], [0.5, 0.5], "not a finite number"),
    ],
    ids=["no rows", "one row", "one fraction", "NaN"],
)
def test_a_comparison_without_an_interval_has_a_reason(base: list[float], trained: list[float], reason: str) -> None:
    comparison = compare_rows(base, trained)
    assert (comparison.low, comparison.high) == (None, None)
    assert comparison.reason is not None and reason in comparison.reason


@pytest.mark.parametrize(("row_count", "changed_count"), [(30, 1), (30, 2), (1000, 1)])
def test_few_different_rows_have_an_interval_from_the_exact_limit_of_their_fraction(row_count: int, changed_count: int) -> None:
    low, high = get_interval_ends(compare_rows([0.5] * row_count, [0.5] * (row_count - changed_count) + [0.2] * changed_count, confidence=0.9))
    assert low == pytest.approx(-0.5 * stats.beta.ppf(0.95, changed_count + 1, row_count - changed_count))
    assert 0 <= high < 0.01


def test_equal_gains_in_all_rows_are_significant() -> None:
    low, high = get_interval_ends(compare_rows([0.5] * 30, [0.75] * 30))
    assert 0.1 < low < 0.25 < high


def test_two_rows_have_the_widest_possible_interval() -> None:
    assert get_interval_ends(compare_rows([0.5, 0.4], [0.4, 0.1])) == (-0.5, 0.5)


def test_the_interval_of_sums_with_one_different_row_is_finite() -> None:
    base, _ = draw_loss_sums(1000)
    trained = base.copy()
    trained[3, 0] *= 2
    low, high = get_interval_ends(compare_sums(base, trained, ratio_of_sums))
    assert -0.01 < low < high < 0.02


def test_two_fractions_have_a_wide_interval() -> None:
    low, high = get_interval_ends(compare_rows([1.0, 0.0], [1.0, 1.0]))
    assert -1 <= low < 0 and 0.9 < high <= 1


def test_different_numbers_of_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match="one score per row"):
        compare_rows([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="the same sums"):
        compare_sums(np.ones((3, 2)), np.ones((4, 2)), ratio_of_sums)


def test_resampling_in_blocks_gives_almost_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(8)
    base, trained = generator.random(100), generator.random(100)
    low, high = get_interval_ends(compare_rows(base, trained))
    monkeypatch.setattr(bootstrap, "MAX_COUNTS_IN_MEMORY", 30_000)
    assert get_interval_ends(compare_rows(base, trained)) == pytest.approx((low, high), abs=0.05 * (high - low))


# Metrics of sums


def draw_loss_sums(row_count: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    tokens = np.ceil(generator.lognormal(4, 0.7, row_count))
    base = generator.gamma(8, 0.2, row_count)
    return np.column_stack([base * tokens, tokens]), np.column_stack([(base - generator.normal(0.05, 0.1, row_count)) * tokens, tokens])


def test_the_loss_is_weighted_with_tokens_and_has_the_error_of_a_ratio_estimator() -> None:
    base, trained = draw_loss_sums(200)
    comparison = compare_sums(base, trained, ratio_of_sums)
    tokens, loss_changes = base[:, 1], trained[:, 0] - base[:, 0]
    ratio = loss_changes.sum() / tokens.sum()
    standard_error = math.sqrt(np.sum((loss_changes - ratio * tokens) ** 2) * 200 / 199) / tokens.sum()  # Cochran 1977, section 6.3
    assert comparison.base == pytest.approx(base[:, 0].sum() / tokens.sum())
    assert comparison.difference == pytest.approx(ratio)
    assert get_interval_ends(comparison) == pytest.approx((ratio - 1.97 * standard_error, ratio + 1.97 * standard_error), abs=0.15 * standard_error)


def test_rows_with_one_token_each_have_the_interval_of_a_mean() -> None:
    generator = np.random.default_rng(5)
    base, trained, ones = generator.random(50), generator.random(50), np.ones(50)
    comparison_of_sums = compare_sums(np.column_stack([base, ones]), np.column_stack([trained, ones]), ratio_of_sums)
    assert get_interval_ends(comparison_of_sums) == pytest.approx(get_interval_ends(compare_rows(base, trained)))


def test_the_interval_of_the_perplexity_is_close_to_the_transformed_interval_of_the_loss() -> None:
    base, trained = draw_loss_sums(300)
    loss_comparison, perplexity_comparison = compare_sums(base, trained, ratio_of_sums), compare_sums(base, trained, perplexity_of_sums)
    assert loss_comparison.base is not None and loss_comparison.trained is not None and perplexity_comparison.difference is not None
    assert perplexity_comparison.difference == pytest.approx(math.exp(loss_comparison.trained) - math.exp(loss_comparison.base))
    slope = math.exp((loss_comparison.base + loss_comparison.trained) / 2)
    assert get_interval_ends(perplexity_comparison) == pytest.approx([slope * end for end in get_interval_ends(loss_comparison)], rel=0.2)


def test_almost_equal_models_keep_the_precision_of_their_difference() -> None:
    generator = np.random.default_rng(2)
    tokens, base = np.full(100, 50.0), generator.normal(100.0, 10.0, 100)
    changes = generator.normal(1e-6, 1e-6, 100)
    comparison = compare_sums(np.column_stack([base, tokens]), np.column_stack([base + changes, tokens]), ratio_of_sums)
    t_interval = stats.ttest_1samp(changes, 0).confidence_interval(0.95)
    assert get_interval_ends(comparison) == pytest.approx((t_interval.low / 50, t_interval.high / 50), rel=0.1)


def test_a_metric_that_is_not_finite_has_a_reason() -> None:
    huge_sums = np.column_stack([np.full(5, 1e5), np.ones(5)])
    assert compare_sums(huge_sums, huge_sums, perplexity_of_sums).reason == "the metric of the rows is not a finite number"


def test_bleu_of_one_text_is_the_textbook_value() -> None:
    """Candidate `the cat sat on the mat`, reference `the cat is on the mat`: 5/6, 3/5, 1/4 and 0/3 matching n-grams."""
    sums = np.array([6.0, 6, 5, 3, 1, 0, 6, 5, 4, 3])
    expected_bleu = 100 * (5 / 6 * 3 / 5 * 1 / 4 * (1 / 2) / 3) ** 0.25
    assert float(bleu_of_sums(sums)) == pytest.approx(expected_bleu)
    assert float(bleu_of_sums(np.array([6.0, 8, 6, 5, 4, 3, 6, 5, 4, 3]))) == pytest.approx(100 * math.exp(1 - 8 / 6))
    assert float(bleu_of_sums(np.zeros(10))) == 0.0


def test_bleu_of_sums_equals_sacrebleu() -> None:
    metrics = pytest.importorskip("sacrebleu.metrics")
    generator = np.random.default_rng(11)
    for longest_text in (1, 3, 5, 20) * 10:
        text_lists = [[" ".join(generator.choice(list("abcdefgh"), generator.integers(1, longest_text + 1))) for _ in range(3)] for _ in range(2)]
        score = metrics.BLEU().corpus_score(text_lists[0], [text_lists[1]])
        sums = np.array([score.sys_len, score.ref_len, *score.counts, *score.totals], dtype=float)
        assert float(bleu_of_sums(sums)) == pytest.approx(score.score)


def test_the_interval_of_bleu_contains_the_difference_and_shrinks_with_more_rows() -> None:
    generator = np.random.default_rng(4)

    def draw_sums(row_count: int, precision: float) -> np.ndarray:
        lengths = generator.integers(10, 30, row_count)
        totals = np.column_stack([lengths - order for order in range(4)])
        matches = np.column_stack([generator.binomial(totals[:, order], precision ** (order + 1)) for order in range(4)])
        return np.column_stack([lengths, lengths + generator.integers(-2, 3, row_count), matches, totals]).astype(float)

    widths = []
    for row_count in (50, 800):
        comparison = compare_sums(draw_sums(row_count, 0.5), draw_sums(row_count, 0.6), bleu_of_sums)
        low, high = get_interval_ends(comparison)
        assert comparison.difference is not None and 0 < low < comparison.difference < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.9995])
@pytest.mark.parametrize("degrees_of_freedom", [1, 2, 5, 29, 999, 100_000])
def test_the_quantile_of_students_t_distribution_equals_that_of_scipy(probability: float, degrees_of_freedom: int) -> None:
    assert student_quantile(probability, degrees_of_freedom) == pytest.approx(stats.t.ppf(probability, degrees_of_freedom), rel=1e-5)
