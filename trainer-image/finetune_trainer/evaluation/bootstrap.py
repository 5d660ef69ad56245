"""Compares two models on the same rows: the difference of a metric and its confidence interval.

The test rows are a sample of all possible rows, so another test set would give another difference. The interval shows which differences over all
possible rows are plausible.
Both models answer the same rows. So each resample draws rows together with the results of both models (paired bootstrap). The module needs
only numpy, and equal inputs give equal results.

The method depends on the data:

* All scores are 0 or 1 (accuracy): Tango's score interval. Such scores have too few different values for a bootstrap. For example, if the
  models never differ, every resample has a difference of exactly 0.
* Other scores of rows, and metrics that are computed from sums over rows: the interval that contains both the studentised bootstrap interval
  (Efron and Tibshirani 1993, section 12.5) and Student's t interval. If most rows have equal scores, the bootstrap alone is too narrow; if
  the differences are skewed, the t interval alone is too narrow.
* The models differ in no row or in very few rows: an interval from the exact upper limit of the fraction of rows in which they differ. A
  bootstrap would use only the differences that occur in the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
MetricOfSums = Callable[[FloatArray], FloatArray]
"""A smooth function that computes a metric from sums over rows. The function maps arrays of shape (..., number of sums) to shape (...)."""

RESAMPLE_COUNT = 2000
"""Number of bootstrap resamples. With 2000 resamples, the standard deviation of the 5 % quantile is 0.5 percentage points."""
RESAMPLE_SEED = 42
MAX_COUNTS_IN_MEMORY = 4_000_000
"""Maximum number of counts (rows x resamples) in memory at a time: 32 MB. If there are more counts, the resamples are drawn in several blocks."""
RELATIVE_STEP = 1e-5
"""Step of the numerical derivatives, relative to the sum. The relative error of central differences is about the square of the step."""
ROUNDING_ERROR = 1e-11
"""A variance below this fraction of its terms is a rounding error and counts as 0."""

TOO_FEW_ROWS_REASON = "a confidence interval needs at least 2 rows"
NOT_FINITE_REASON = "a score is not a finite number"


@dataclass(frozen=True)
class MetricComparison:
    """The values of both models on the same rows, their difference, and its two-sided confidence interval."""

    rows: int
    """Number of compared rows."""
    base: float | None
    trained: float | None
    difference: float | None
    """Value of the trained model minus value of the base model; None if one of the values could not be computed."""
    low: float | None = None
    """Lower end of the confidence interval; None if there is no interval."""
    high: float | None = None
    reason: str | None = None
    """Why there is no interval; None if there is an interval."""


def compare_rows(base_values: Sequence[float], trained_values: Sequence[float], *, confidence: float = 0.95, seed: int = RESAMPLE_SEED) -> MetricComparison:
    """Compare the mean scores of two models. `base_values[i]` and `trained_values[i]` are the scores of row i.

    Errors: ValueError if the lists have different lengths.
    """
    base_scores, trained_scores = np.asarray(base_values, dtype=np.float64), np.asarray(trained_values, dtype=np.float64)
    if base_scores.shape != trained_scores.shape or base_scores.ndim != 1:
        raise ValueError(f"both models need one score per row, but the shapes are {base_scores.shape} and {trained_scores.shape}")
    if _has_only_zeros_and_ones(base_scores) and _has_only_zeros_and_ones(trained_scores) and len(base_scores) > 1:
        return _compare_fractions(base_scores, trained_scores, confidence)
    ones, differences = np.ones_like(base_scores), trained_scores - base_scores
    usual_difference = float(np.median(differences)) if len(differences) else 0.0
    largest_score = float(np.max(np.abs([base_scores, trained_scores]), initial=0.0))
    changed_rows = _ChangedRows(int((np.abs(differences - usual_difference) > ROUNDING_ERROR).sum()), usual_difference, largest_score)
    return _compare(np.column_stack([base_scores, ones]), np.column_stack([trained_scores, ones]), ratio_of_sums, confidence, seed, changed_rows)


def compare_sums(
    base_values: FloatArray, trained_values: FloatArray, metric: MetricOfSums, *, confidence: float = 0.95, seed: int = RESAMPLE_SEED
) -> MetricComparison:
    """Compare a metric that is computed from sums over all rows, such as the loss per token.

    `base_values` and `trained_values` have the shape (rows, number of sums) and contain the summands of each row. Errors: ValueError if the shapes differ.
    """
    base_values, trained_values = np.asarray(base_values, dtype=np.float64), np.asarray(trained_values, dtype=np.float64)
    if base_values.shape != trained_values.shape or base_values.ndim != 2:
        raise ValueError(f"both models need the same sums for each row, but the shapes are {base_values.shape} and {trained_values.shape}")
    return _compare(base_values, trained_values, metric, confidence, seed, _ChangedRows(int((base_values != trained_values).any(axis=1).sum())))


@dataclass(frozen=True)
class _ChangedRows:
    """The rows in which the difference between the two models is not the usual difference, which is mostly 0."""

    count: int
    usual_difference: float = 0.0
    largest_difference: float | None = None
    """Largest possible difference in one row. If this field is None, the larger absolute value of the two models' metrics is used."""


def _compare(
    base_values: FloatArray, trained_values: FloatArray, metric: MetricOfSums, confidence: float, seed: int, changed_rows: _ChangedRows
) -> MetricComparison:
    row_count = len(base_values)
    if not np.isfinite(base_values).all() or not np.isfinite(trained_values).all():
        return MetricComparison(row_count, None, None, None, reason=NOT_FINITE_REASON)
    if row_count == 0:
        return MetricComparison(row_count, None, None, None, reason=TOO_FEW_ROWS_REASON)
    with np.errstate(all="ignore"):
        base_value, trained_value = float(metric(base_values.sum(axis=0))), float(metric(trained_values.sum(axis=0)))
    if not math.isfinite(base_value) or not math.isfinite(trained_value):
        return MetricComparison(row_count, None, None, None, reason="the metric of the rows is not a finite number")
    difference = trained_value - base_value
    if row_count == 1:
        return MetricComparison(row_count, base_value, trained_value, difference, reason=TOO_FEW_ROWS_REASON)
    difference_metric = _build_difference_metric(metric, base_values.shape[1])
    interval_ends = _compute_studentised_ends(np.hstack([base_values, trained_values - base_values]), difference_metric, confidence, seed)
    if not math.isfinite(interval_ends[0]) or not math.isfinite(interval_ends[1]):
        largest_difference = max(abs(base_value), abs(trained_value)) if changed_rows.largest_difference is None else changed_rows.largest_difference
        exact_ends = _compute_ends_with_few_changed_rows(row_count, changed_rows.count, changed_rows.usual_difference, largest_difference, confidence)
        interval_ends = (
            interval_ends[0] if math.isfinite(interval_ends[0]) else exact_ends[0],
            interval_ends[1] if math.isfinite(interval_ends[1]) else exact_ends[1],
        )
    return MetricComparison(row_count, base_value, trained_value, difference, *interval_ends)


# Metrics of sums


def ratio_of_sums(sums: FloatArray) -> FloatArray:
    """Return sum 0 / sum 1. For the sums (score, 1), this is the mean score; for (negative log-likelihood, tokens), the loss per token."""
    return sums[..., 0] / sums[..., 1]


def perplexity_of_sums(sums: FloatArray) -> FloatArray:
    """Return exp(sum 0 / sum 1) for the sums (negative log-likelihood in nats, tokens)."""
    return np.exp(sums[..., 0] / sums[..., 1])


def bleu_of_sums(sums: FloatArray) -> FloatArray:
    """Return the corpus BLEU from 0 to 100, with the smoothing `exp`, which is sacrebleu's default.

    The ten sums are sacrebleu's statistics: the numbers of tokens of answer and reference; the numbers of matching n-grams for n = 1 to 4;
    and the numbers of all n-grams of the answer for n = 1 to 4. Source: Papineni et al. 2002, Post 2018.
    """
    answer_length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2:6], sums[..., 6:10]
    smoothed_matches = np.where(matches > 0, matches, 1 / 2.0 ** np.cumsum(matches <= 0, axis=-1))
    log_precisions = np.log(100 * smoothed_matches / np.maximum(totals, 1e-300))
    brevity_penalty = np.exp(np.minimum(0, 1 - reference_length / np.maximum(answer_length, 1e-300)))
    has_score = (matches > 0).any(axis=-1) & (totals > 0).all(axis=-1)
    return np.where(has_score, brevity_penalty * np.exp(log_precisions.mean(axis=-1)), 0.0)


def _build_difference_metric(metric: MetricOfSums, sum_count: int) -> MetricOfSums:
    """Return a function that computes the difference between the metrics of the two models.

    The input of the function contains the `sum_count` sums of the base model, and then the differences between the sums of both models. With differences as
    input, the result is precise even if both models are almost equal.
    """
    return lambda sums: metric(sums[..., :sum_count] + sums[..., sum_count:]) - metric(sums[..., :sum_count])


# Studentised bootstrap


def _compute_studentised_ends(rows: FloatArray, statistic: MetricOfSums, confidence: float, seed: int) -> tuple[float, float]:
    """Return both ends of the interval for `statistic(rows.sum(axis=0))`. An end is infinite if too many resamples have no variation."""
    first, second = np.triu_indices(rows.shape[1])
    columns = np.hstack([rows, rows[:, first] * rows[:, second]])
    with np.errstate(all="ignore"):
        estimate, standard_error = _compute_estimate_and_error(columns.sum(axis=0), statistic, rows.shape)
        if standard_error == 0:
            return -math.inf, math.inf
        sums = np.concatenate([counts @ columns for counts in _draw_resamples(len(rows), seed)])
        resampled_estimates, resampled_errors = _compute_estimate_and_error(sums, statistic, rows.shape)
        # If the rows of a resample have no variation, the standard error of the resample is 0, and its t value is infinite, or NaN for 0/0.
        shifts = np.where(np.abs(resampled_estimates - estimate) <= ROUNDING_ERROR * np.abs(estimate), 0, resampled_estimates - estimate)
        t_values = shifts / resampled_errors
    tail_probability = (1 - confidence) / 2
    t_quantile = student_quantile(1 - tail_probability, len(rows) - 1)
    low_quantile = float(np.quantile(np.where(np.isnan(t_values), -np.inf, t_values), tail_probability, method="lower"))
    high_quantile = float(np.quantile(np.where(np.isnan(t_values), np.inf, t_values), 1 - tail_probability, method="higher"))
    return float(estimate - max(high_quantile, t_quantile) * standard_error), float(estimate - min(low_quantile, -t_quantile) * standard_error)


def _compute_estimate_and_error(sums: FloatArray, statistic: MetricOfSums, shape: tuple[int, ...]) -> tuple[FloatArray, FloatArray]:
    """Return the statistic and its standard error by the delta method, for one or several sets of sums.

    `sums`: the sums of the k columns, then the sums of the products of each two columns. `shape`: (number of rows, k). The delta method
    uses the rows' linear contributions to the statistic. The variance of their sum over n rows is
    n/(n-1) * (sum of squares - square of the sum / n).
    """
    row_count, column_count = shape
    totals, products = sums[..., :column_count], sums[..., column_count:]
    first, second = np.triu_indices(column_count)
    gradient = _compute_gradient(statistic, totals, np.sqrt(products[..., first == second]))
    terms = gradient[..., first] * gradient[..., second] * products * np.where(first == second, 1, 2)
    scaled_square = (gradient * totals).sum(axis=-1) ** 2 / row_count
    variance = terms.sum(axis=-1) - scaled_square
    is_rounding_error = variance <= ROUNDING_ERROR * (np.abs(terms).sum(axis=-1) + scaled_square)
    return statistic(totals), np.sqrt(np.where(is_rounding_error, 0, variance) * row_count / (row_count - 1))


def _compute_gradient(statistic: MetricOfSums, totals: FloatArray, scales: FloatArray) -> FloatArray:
    """Return the derivative of the statistic with respect to each sum, by central differences. `scales`: the typical size of each sum."""
    gradient = np.empty_like(totals)
    for column in range(totals.shape[-1]):
        step = np.zeros_like(totals)
        scale = np.maximum(np.abs(totals[..., column]), scales[..., column])
        step[..., column] = RELATIVE_STEP * np.where(scale > 0, scale, 1.0)
        gradient[..., column] = (statistic(totals + step) - statistic(totals - step)) / (2 * step[..., column])
    return gradient


def _draw_resamples(row_count: int, seed: int) -> Iterator[FloatArray]:
    """Yield how often each row is drawn in each resample, in blocks of shape (resamples, rows)."""
    if row_count * RESAMPLE_COUNT <= MAX_COUNTS_IN_MEMORY:
        yield _draw_row_counts_cached(row_count, RESAMPLE_COUNT, seed, 0)
        return
    block_size = max(1, MAX_COUNTS_IN_MEMORY // row_count)
    for start in range(0, RESAMPLE_COUNT, block_size):
        yield _draw_row_counts(row_count, min(block_size, RESAMPLE_COUNT - start), seed, start)


def _draw_row_counts(row_count: int, resample_count: int, seed: int, start: int) -> FloatArray:
    drawn_rows = np.random.default_rng([seed, start]).integers(0, row_count, size=(resample_count, row_count))
    drawn_rows += np.arange(resample_count)[:, None] * row_count
    return np.bincount(drawn_rows.ravel(), minlength=resample_count * row_count).reshape(resample_count, row_count).astype(np.float64)


_draw_row_counts_cached = lru_cache(maxsize=2)(_draw_row_counts)
"""`_draw_row_counts` with a cache. All metrics of an evaluation have the same rows, so they can use the same resamples."""


@lru_cache(maxsize=64)
def student_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Return the quantile of Student's t distribution.

    With t = sqrt(df) * tan(angle), the density of the angle is proportional to cos(angle) ** (df - 1). This density is integrated
    numerically. The relative error of the quantile is below 1e-5 for probabilities up to 0.9999.
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees_of_freedom - 1)
    integral = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees_of_freedom) * math.tan(float(np.interp(probability, integral / integral[-1], angles)))


# Other intervals


def _compute_ends_with_few_changed_rows(
    row_count: int, changed_count: int, usual_difference: float, largest_difference: float, confidence: float
) -> tuple[float, float]:
    """Return both ends of the interval if almost all rows have the usual difference.

    With the given confidence, at most the fraction `changed_share` of all possible rows has another difference. The difference in these rows lies
    between -`largest_difference` and `largest_difference`. `changed_share` is the exact upper limit of Clopper and Pearson 1934.
    """
    changed_share = _find_highest_fraction(row_count, changed_count, (1 - confidence) / 2)
    middle, half_width = (1 - changed_share) * usual_difference, changed_share * largest_difference
    return middle - half_width, middle + half_width


def _find_highest_fraction(row_count: int, affected_count: int, tail_probability: float) -> float:
    """Return the highest plausible fraction of affected rows among all possible rows, if `affected_count` of `row_count` rows are affected.

    At this fraction, a sample would have at most `affected_count` affected rows with probability `tail_probability`. The fraction is computed by bisection.
    """
    if affected_count >= row_count:
        return 1.0
    coefficients = [math.lgamma(row_count + 1) - math.lgamma(k + 1) - math.lgamma(row_count - k + 1) for k in range(affected_count + 1)]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = (c + k * math.log(middle) + (row_count - k) * math.log1p(-middle) for k, c in enumerate(coefficients))
        if sum(map(math.exp, terms)) > tail_probability:
            low = middle
        else:
            high = middle
    return high


def _has_only_zeros_and_ones(scores: FloatArray) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _compare_fractions(base_values: FloatArray, trained_values: FloatArray, confidence: float) -> MetricComparison:
    wins, losses = int((trained_values > base_values).sum()), int((trained_values < base_values).sum())
    lowest_difference = _find_lowest_difference(wins, losses, len(base_values), confidence)
    highest_difference = -_find_lowest_difference(losses, wins, len(base_values), confidence)
    difference = (wins - losses) / len(base_values)
    return MetricComparison(len(base_values), float(base_values.mean()), float(trained_values.mean()), difference, lowest_difference, highest_difference)


def _find_lowest_difference(wins: int, losses: int, row_count: int, confidence: float) -> float:
    """Return the lowest difference of two paired fractions that the score test does not reject. This difference is computed by bisection."""
    critical_value = NormalDist().inv_cdf((1 + confidence) / 2)
    rejected_difference, accepted_difference = -1.0, (wins - losses) / row_count
    for _ in range(60):
        middle = (rejected_difference + accepted_difference) / 2
        if _compute_score_statistic(wins, losses, row_count, middle) > critical_value:
            rejected_difference = middle
        else:
            accepted_difference = middle
    return accepted_difference


def _compute_score_statistic(wins: int, losses: int, row_count: int, difference: float) -> float:
    """Return the score statistic for the hypothesis that the fractions differ by `difference`.

    A win is a row in which only the trained model is right; a loss, one in which only the base model is right. The probability of a loss
    is estimated under the hypothesis. Source: Tango 1998, Statistics in Medicine 17, 891-908.
    """
    b = -wins - losses + (2 * row_count - wins + losses) * difference
    c = -losses * difference * (1 - difference)
    loss_probability = (math.sqrt(max(0.0, b * b - 8 * row_count * c)) - b) / (4 * row_count)
    variance = row_count * (2 * loss_probability + difference * (1 - difference))
    distance = wins - losses - row_count * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)
