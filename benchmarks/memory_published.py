"""The memory plan's estimates for published training runs, compared with the published peaks.

    python benchmarks/memory_published.py

Method. PEFT's repository publishes the peak of reserved memory of runs on an L40S (`lib/published_runs.py`). This program estimates the peak of each run
whose method this trainer supports. All runs have the same batches, but the length of their longest row was not published. This length is the only number
that is fitted to the published peaks. To estimate a run, the program takes the length that gives the smallest mean error over all runs with other settings,
so a run's own peak has no influence on its estimate. The plan's share for fragmentation is not fitted.
"""

from __future__ import annotations

import statistics
from functools import cache

import record
from finetune_api.memory.plan import FRAGMENTATION, UPPER_MARGIN
from finetune_api.memory.replay import replay
from lib.published_runs import LARGEST_LENGTH, PUBLISHED_RUNS, SMALLEST_LENGTH, PublishedRun

ROW_LENGTHS = range(SMALLEST_LENGTH, LARGEST_LENGTH + 1, 12)


@cache
def _estimate_bytes_of_run(run_name: str, row_length: int) -> float:
    run = next(run for run in PUBLISHED_RUNS if run.name == run_name)
    return replay(run.as_step(row_length)).total_bytes * (1 + FRAGMENTATION)


def estimate_bytes(run: PublishedRun, row_length: int) -> float:
    """Return the expected peak of reserved memory in bytes. Runs with equal settings share the cached result."""
    return _estimate_bytes_of_run(next(published_run.name for published_run in PUBLISHED_RUNS if published_run.weights == run.weights), row_length)


def fit_length(runs: list[PublishedRun]) -> int:
    """Return the length of the longest row for which the estimates of these runs have the smallest mean error."""
    return min(ROW_LENGTHS, key=lambda length: statistics.mean(abs(estimate_bytes(run, length) / run.reserved_bytes - 1) for run in runs))


def main() -> None:
    """Estimate the peaks of all runs and write the result."""
    figures_by_run, errors, upper_ratios = {}, [], []
    for run in PUBLISHED_RUNS:
        row_length = fit_length([other_run for other_run in PUBLISHED_RUNS if other_run.weights != run.weights])
        expected_bytes = estimate_bytes(run, row_length)
        errors.append(abs(expected_bytes / run.reserved_bytes - 1))
        upper_ratios.append(expected_bytes * (1 + UPPER_MARGIN) / run.reserved_bytes)
        figures_by_run[run.name] = {
            "measuredGiB": round(run.reserved_bytes / 2**30, 2), "expectedGiB": round(expected_bytes / 2**30, 2),
            "error": round(expected_bytes / run.reserved_bytes - 1, 4), "upperByMeasured": round(upper_ratios[-1], 4), "fittedTokens": row_length,
        }  # fmt: skip
        print(run.name, figures_by_run[run.name])
    figures = {
        "runs": len(errors), "medianError": round(statistics.median(errors), 4), "worstError": round(max(errors), 4),
        "smallestUpperByMeasured": round(min(upper_ratios), 4), "largestUpperByMeasured": round(max(upper_ratios), 4), "results": figures_by_run,
    }  # fmt: skip
    record.write_result("memory_published", figures, method=record.extract_method(__doc__), versions=record.read_package_versions(()))


if __name__ == "__main__":
    main()
