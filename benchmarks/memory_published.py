"""The memory plan's estimates for published training runs.

    python benchmarks/memory_published.py

Method. PEFT's repository publishes the peak of reserved memory of runs on an L40S (`lib/published_runs.py`). The runs with methods of this trainer are
replayed. They have the same batches, but the length of the longest batch was not published. It is the only fitted number: for each run, it is
fitted to the other runs with other settings, by the smallest mean error. The plan's share for fragmentation is fixed.
"""

from __future__ import annotations

import statistics
from functools import cache

import record
from finetune_api.memory.plan import FRAGMENTATION, UPPER_MARGIN
from finetune_api.memory.replay import replay
from lib.published_runs import LARGEST_LENGTH, PUBLISHED_RUNS, SMALLEST_LENGTH, PublishedRun

LENGTHS = range(SMALLEST_LENGTH, LARGEST_LENGTH + 1, 12)


@cache
def _expected(weights_of: str, length: int) -> float:
    run = next(one for one in PUBLISHED_RUNS if one.name == weights_of)
    return replay(run.as_step(length)).total * (1 + FRAGMENTATION)


def expected_bytes(run: PublishedRun, length: int) -> float:
    """Expected peak of reserved memory. Runs with equal settings share the result."""
    return _expected(next(one.name for one in PUBLISHED_RUNS if one.weights == run.weights), length)


def fit_length(others: list[PublishedRun]) -> int:
    """The length of the longest row with the smallest mean error."""
    return min(LENGTHS, key=lambda length: statistics.mean(abs(expected_bytes(one, length) / one.reserved_bytes - 1) for one in others))


def main() -> None:
    """Replay all runs and write the result."""
    runs, errors, upper_ratios = {}, [], []
    for run in PUBLISHED_RUNS:
        length = fit_length([one for one in PUBLISHED_RUNS if one.weights != run.weights])
        expected = expected_bytes(run, length)
        errors.append(abs(expected / run.reserved_bytes - 1))
        upper_ratios.append(expected * (1 + UPPER_MARGIN) / run.reserved_bytes)
        runs[run.name] = {
            "measuredGiB": round(run.reserved_bytes / 2**30, 2), "expectedGiB": round(expected / 2**30, 2),
            "error": round(expected / run.reserved_bytes - 1, 4), "upperByMeasured": round(upper_ratios[-1], 4), "fittedTokens": length,
        }  # fmt: skip
        print(run.name, runs[run.name])
    figures = {
        "runs": len(errors), "medianError": round(statistics.median(errors), 4), "worstError": round(max(errors), 4),
        "smallestUpperByMeasured": round(min(upper_ratios), 4), "largestUpperByMeasured": round(max(upper_ratios), 4), "results": runs,
    }  # fmt: skip
    record.write_result("memory_published", figures, method=record.extract_method(__doc__), versions=record.package_versions(()))


if __name__ == "__main__":
    main()
