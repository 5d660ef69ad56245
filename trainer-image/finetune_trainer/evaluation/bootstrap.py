"""Compares two models on the same rows: the difference of a metric and its confidence interval.

The rows are a sample of all possible rows, so another test set would give another difference. Both models answer the same rows. Each
resample therefore draws whole rows, with the results of both models (paired bootstrap). The module needs only numpy, and equal inputs
give equal results.

Three kinds of data have different methods:

* Scores that are all 0 or 1 (accuracy): Tango's score interval. Such scores have too few different values for a bootstrap: if the models
  never differ, every resample has a difference of exactly 0.
* All other scores of rows, and metrics of sums over rows: the studentised bootstrap (Efron and Tibshirani 1993, section 12.5) and
  Student's t interval. The result contains both. If most rows have equal scores, the bootstrap alone is too narrow; if the
  differences are skewed, the t interval alone is too narrow.
* Models that differ in no row or in very few rows: the exact interval for the fraction of rows in which they differ. A bootstrap only uses
  differences that occurred in the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
MetricOfSums = Callable[[Numbers], Numbers]
"""Computes a metric from sums over rows: shape (..., number of sums) -> (...). The function must be smooth and accept several sets of sums."""

RESAMPLES = 2000
"""Number of bootstrap resamples. The 5 % quantile of 2000 resamples is exact to 0.5 percentage points (one standard deviation)."""
SEED = 42
MAX_COUNTS = 4_000_000
"""Maximum number of counts (rows x resamples) in memory, 32 MB. If there are more, the resamples are drawn in several parts."""
RELATIVE_STEP = 1e-5
"""Step of the numerical derivatives, relative to the sum. The error of central differences is about the square of this number."""
ROUNDING_ERROR = 1e-11
"""Variances below this fraction of their terms are rounding errors and count as 0."""

TOO_FEW_ROWS = "a confidence interval needs at least 2 rows"
NOT_FINITE = "a score is not a finite number"


@dataclass(frozen=True)
class Comparison:
    """The values of both models on the same rows, their difference, and its two-sided confidence interval."""

    rows: int
    """Number of compared rows."""
    base: float | None
    trained: float | None
    difference: float | None
    """Value of the trained model minus value of the base model. None: a value could not be computed."""
    low: float | None = None
    """Lower end of the confidence interval. None: there is no interval, and `reason` says why."""
    high: float | None = None
    reason: str | None = None


def compare_rows(base: Sequence[float], trained: Sequence[float], *, confidence: float = 0.95, seed: int = SEED) -> Comparison:
    """Compare the mean scores of two models. `base[i]` and `trained[i]` are the scores of row i.

    Errors: ValueError if the lists have different lengths.
    """
    base_scores, trained_scores = np.asarray(base, dtype=np.float64), np.asarray(trained, dtype=np.float64)
    if base_scores.shape != trained_scores.shape or base_scores.ndim != 1:
        raise ValueError(f"both models need one score per row, but the shapes are {base_scores.shape} and {trained_scores.shape}")
    if _are_zero_or_one(base_scores) and _are_zero_or_one(trained_scores) and len(base_scores) > 1:
        return _compare_fractions(base_scores, trained_scores, confidence)
    ones, differences = np.ones_like(base_scores), trained_scores - base_scores
    usual = float(np.median(differences)) if len(differences) else 0.0
    changes = _Changes(int((np.abs(differences - usual) > ROUNDING_ERROR).sum()), usual, float(np.max(np.abs([base_scores, trained_scores]), initial=0.0)))
    return _compare(np.column_stack([base_scores, ones]), np.column_stack([trained_scores, ones]), ratio_of_sums, confidence, seed, changes)


def compare_sums(base: Numbers, trained: Numbers, metric: MetricOfSums, *, confidence: float = 0.95, seed: int = SEED) -> Comparison:
    """Compare a metric that is computed from sums over all rows, such as the loss per token.

    `base` and `trained` have shape (rows, number of sums): row i contains what row i adds to the sums. Errors: ValueError if the shapes
    differ.
    """
    base, trained = np.asarray(base, dtype=np.float64), np.asarray(trained, dtype=np.float64)
    if base.shape != trained.shape or base.ndim != 2:
        raise ValueError(f"both models need the same sums for each row, but the shapes are {base.shape} and {trained.shape}")
    return _compare(base, trained, metric, confidence, seed, _Changes(int((base != trained).any(axis=1).sum())))


@dataclass(frozen=True)
class _Changes:
    """The rows in which the difference between the models is not the usual one, which is mostly 0."""

    count: int
    usual_difference: float = 0.0
    largest: float | None = None
    """Largest possible difference of one row. None: use the larger of the two models' metric values."""


def _compare(base: Numbers, trained: Numbers, metric: MetricOfSums, confidence: float, seed: int, changes: _Changes) -> Comparison:
    rows = len(base)
    if not np.isfinite(base).all() or not np.isfinite(trained).all():
        return Comparison(rows, None, None, None, reason=NOT_FINITE)
    if rows == 0:
        return Comparison(rows, None, None, None, reason=TOO_FEW_ROWS)
    with np.errstate(all="ignore"):
        base_value, trained_value = float(metric(base.sum(axis=0))), float(metric(trained.sum(axis=0)))
    if not math.isfinite(base_value) or not math.isfinite(trained_value):
        return Comparison(rows, None, None, None, reason="the metric of the rows is not a finite number")
    difference = trained_value - base_value
    if rows == 1:
        return Comparison(rows, base_value, trained_value, difference, reason=TOO_FEW_ROWS)
    ends = _studentised_ends(np.hstack([base, trained - base]), _difference_of(metric, base.shape[1]), confidence, seed)
    if not math.isfinite(ends[0]) or not math.isfinite(ends[1]):
        largest = max(abs(base_value), abs(trained_value)) if changes.largest is None else changes.largest
        exact_ends = _ends_with_few_changes(rows, changes.count, changes.usual_difference, largest, confidence)
        ends = (ends[0] if math.isfinite(ends[0]) else exact_ends[0], ends[1] if math.isfinite(ends[1]) else exact_ends[1])
    return Comparison(rows, base_value, trained_value, difference, *ends)


# Metrics of sums


def ratio_of_sums(sums: Numbers) -> Numbers:
    """Return sum 0 / sum 1: a mean for the sums (score, 1), the loss per token for the sums (negative log-likelihood, tokens)."""
    return sums[..., 0] / sums[..., 1]


def perplexity_of_sums(sums: Numbers) -> Numbers:
    """Return exp(sum 0 / sum 1) for the sums (negative log-likelihood in nats, tokens)."""
    return np.exp(sums[..., 0] / sums[..., 1])


def bleu_of_sums(sums: Numbers) -> Numbers:
    """Return the corpus BLEU from 0 to 100, with the smoothing `exp` that sacrebleu uses by default.

    The ten sums are the lengths of answer and reference in tokens, then the numbers of matching n-grams and the numbers of all n-grams
    of the answer, for n = 1 to 4. These are the statistics of sacrebleu. Source: Papineni et al. 2002, Post 2018.
    """
    answer_length, reference_length = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2:6], sums[..., 6:10]
    smoothed_matches = np.where(matches > 0, matches, 1 / 2.0 ** np.cumsum(matches <= 0, axis=-1))
    log_precisions = np.log(100 * smoothed_matches / np.maximum(totals, 1e-300))
    brevity_penalty = np.exp(np.minimum(0, 1 - reference_length / np.maximum(answer_length, 1e-300)))
    has_score = (matches > 0).any(axis=-1) & (totals > 0).all(axis=-1)
    return np.where(has_score, brevity_penalty * np.exp(log_precisions.mean(axis=-1)), 0.0)


def _difference_of(metric: MetricOfSums, count: int) -> MetricOfSums:
    """Return a function that computes the difference between the models' metrics. Its input: the base model's `count` sums, then the
    differences between the models' sums.

    With differences as input, the result stays precise if both models are almost equal.
    """
    return lambda sums: metric(sums[..., :count] + sums[..., count:]) - metric(sums[..., :count])


# Studentised bootstrap


def _studentised_ends(rows: Numbers, statistic: MetricOfSums, confidence: float, seed: int) -> tuple[float, float]:
    """Return the ends of the interval for `statistic(rows.sum(axis=0))`. An end is infinite if too many resamples have no variation."""
    first, second = np.triu_indices(rows.shape[1])
    columns = np.hstack([rows, rows[:, first] * rows[:, second]])
    with np.errstate(all="ignore"):
        estimate, error = _estimate_and_error(columns.sum(axis=0), statistic, rows.shape)
        if error == 0:
            return -math.inf, math.inf
        sums = np.concatenate([counts @ columns for counts in _resample(len(rows), seed)])
        resampled, resampled_errors = _estimate_and_error(sums, statistic, rows.shape)
        # A resample whose rows have no variation has an error of 0, and its t value is infinite. 0/0 has no known value.
        shift = np.where(np.abs(resampled - estimate) <= ROUNDING_ERROR * np.abs(estimate), 0, resampled - estimate)
        t_values = shift / resampled_errors
    tail = (1 - confidence) / 2
    student = student_quantile(1 - tail, len(rows) - 1)
    low_quantile = float(np.quantile(np.where(np.isnan(t_values), -np.inf, t_values), tail, method="lower"))
    high_quantile = float(np.quantile(np.where(np.isnan(t_values), np.inf, t_values), 1 - tail, method="higher"))
    return float(estimate - max(high_quantile, student) * error), float(estimate - min(low_quantile, -student) * error)


def _estimate_and_error(sums: Numbers, statistic: MetricOfSums, shape: tuple[int, ...]) -> tuple[Numbers, Numbers]:
    """Return the statistic and its standard error by the delta method, for one or several sets of sums.

    `sums` contains the sums of the k columns, then the sums of the products of two columns. The variance of a sum over n rows is
    n/(n-1) * (sum of squares - square of the sum / n), here of the rows' linear contributions to the statistic.
    """
    count, width = shape
    totals, products = sums[..., :width], sums[..., width:]
    first, second = np.triu_indices(width)
    gradient = _gradient(statistic, totals, np.sqrt(products[..., first == second]))
    terms = gradient[..., first] * gradient[..., second] * products * np.where(first == second, 1, 2)
    square = (gradient * totals).sum(axis=-1) ** 2 / count
    variance = terms.sum(axis=-1) - square
    is_rounding_error = variance <= ROUNDING_ERROR * (np.abs(terms).sum(axis=-1) + square)
    return statistic(totals), np.sqrt(np.where(is_rounding_error, 0, variance) * count / (count - 1))


def _gradient(statistic: MetricOfSums, totals: Numbers, scales: Numbers) -> Numbers:
    """Return the derivatives of the statistic with respect to each sum, by central differences. `scales` are typical sizes of the sums."""
    gradient = np.empty_like(totals)
    for column in range(totals.shape[-1]):
        step = np.zeros_like(totals)
        size = np.maximum(np.abs(totals[..., column]), scales[..., column])
        step[..., column] = RELATIVE_STEP * np.where(size > 0, size, 1.0)
        gradient[..., column] = (statistic(totals + step) - statistic(totals - step)) / (2 * step[..., column])
    return gradient


def _resample(rows: int, seed: int) -> Iterator[Numbers]:
    """Yield how often each row is drawn in each resample, in parts of shape (resamples, rows)."""
    if rows * RESAMPLES <= MAX_COUNTS:
        yield _draw_once(rows, RESAMPLES, seed, 0)
        return
    part = max(1, MAX_COUNTS // rows)
    for start in range(0, RESAMPLES, part):
        yield _draw(rows, min(part, RESAMPLES - start), seed, start)


def _draw(rows: int, resamples: int, seed: int, start: int) -> Numbers:
    drawn = np.random.default_rng([seed, start]).integers(0, rows, size=(resamples, rows))
    drawn += np.arange(resamples)[:, None] * rows
    return np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)


_draw_once = lru_cache(maxsize=2)(_draw)
"""Keeps the last results: all metrics of an evaluation have the same rows and can use the same resamples."""


@lru_cache(maxsize=64)
def student_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Return the quantile of Student's t distribution.

    With t = sqrt(df) * tan(angle), the density of the angle is proportional to cos(angle) ** (df - 1). The function integrates this
    density numerically. The relative error is below 1e-5 for probabilities up to 0.9999.
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 200_001)
    density = np.cos(angles) ** (degrees_of_freedom - 1)
    integral = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees_of_freedom) * math.tan(float(np.interp(probability, integral / integral[-1], angles)))


# Other intervals


def _ends_with_few_changes(rows: int, changed: int, usual: float, largest: float, confidence: float) -> tuple[float, float]:
    """Return the interval if all rows but a few have the usual difference.

    With the given confidence, at most a fraction `share` of all possible rows has a different difference, which is between -`largest` and
    `largest`. `share` is the exact upper limit of Clopper and Pearson 1934 for `changed` of n rows.
    """
    share = _highest_fraction(rows, changed, (1 - confidence) / 2)
    return (1 - share) * usual - share * largest, (1 - share) * usual + share * largest


def _highest_fraction(rows: int, events: int, tail: float) -> float:
    """Return the fraction at which `events` or fewer of n rows occur with probability `tail`. Computed by bisection."""
    if events >= rows:
        return 1.0
    coefficients = [math.lgamma(rows + 1) - math.lgamma(k + 1) - math.lgamma(rows - k + 1) for k in range(events + 1)]
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = (c + k * math.log(middle) + (rows - k) * math.log1p(-middle) for k, c in enumerate(coefficients))
        if sum(map(math.exp, terms)) > tail:
            low = middle
        else:
            high = middle
    return high


def _are_zero_or_one(scores: Numbers) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())


def _compare_fractions(base: Numbers, trained: Numbers, confidence: float) -> Comparison:
    wins, losses = int((trained > base).sum()), int((trained < base).sum())
    low = _lowest_difference(wins, losses, len(base), confidence)
    high = -_lowest_difference(losses, wins, len(base), confidence)
    return Comparison(len(base), float(base.mean()), float(trained.mean()), (wins - losses) / len(base), low, high)


def _lowest_difference(wins: int, losses: int, rows: int, confidence: float) -> float:
    """Return the lowest difference of two paired fractions that the score test does not reject, by bisection."""
    critical = NormalDist().inv_cdf((1 + confidence) / 2)
    rejected, accepted = -1.0, (wins - losses) / rows
    for _ in range(60):
        middle = (rejected + accepted) / 2
        if _score(wins, losses, rows, middle) > critical:
            rejected = middle
        else:
            accepted = middle
    return accepted


def _score(wins: int, losses: int, rows: int, difference: float) -> float:
    """Return the score statistic for the hypothesis that the fractions differ by `difference`.

    The probability of a loss is estimated under the hypothesis. Source: Tango 1998, Statistics in Medicine 17, 891-908.
    """
    b = -wins - losses + (2 * rows - wins + losses) * difference
    c = -losses * difference * (1 - difference)
    loss_probability = (math.sqrt(max(0.0, b * b - 8 * rows * c)) - b) / (4 * rows)
    variance = rows * (2 * loss_probability + difference * (1 - difference))
    distance = wins - losses - rows * difference
    return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)
