"""Computes the durations and the GPU time of the attempts of a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from finetune_api.lineage import AttemptRecord
from finetune_api.status import ResolvedConfig

from finetune_trainer.report.run_report import RunReport


def find_end_time(attempt: AttemptRecord, report: RunReport) -> tuple[datetime | None, bool]:
    """Return when an attempt ended, and whether this time is only a lower bound. If the pod was killed, the result is the time of the last logged line."""
    if attempt.ended_at is not None:
        return attempt.ended_at, False
    last_line = report.last_lines.get(attempt.incarnation)
    last_time = last_line.unix_time if last_line is not None else None
    return (None if last_time is None else datetime.fromtimestamp(last_time, UTC)), True


def sum_pod_seconds(report: RunReport) -> tuple[float, bool]:
    """Return the total duration of all attempts in seconds, and whether this sum is only a lower bound."""
    return _sum_weighted_seconds(report, lambda _: 1)


def sum_gpu_seconds(report: RunReport) -> tuple[float, bool]:
    """Return the GPU seconds of all attempts together, and whether this sum is only a lower bound."""
    return _sum_weighted_seconds(report, lambda attempt: attempt.gpus)


def _sum_weighted_seconds(report: RunReport, get_weight: Callable[[AttemptRecord], int]) -> tuple[float, bool]:
    total_seconds, is_lower_bound = 0.0, False
    for attempt in report.attempts:
        end_time, is_estimate = find_end_time(attempt, report)
        is_lower_bound |= is_estimate
        total_seconds += get_weight(attempt) * max(0.0, ((end_time or attempt.started_at) - attempt.started_at).total_seconds())
    return total_seconds, is_lower_bound


def merge_resolved_configs(report: RunReport) -> ResolvedConfig:
    """Return the effective configuration, merged from all attempts, because an attempt without training reports only some of its fields."""
    merged_config = ResolvedConfig()
    for attempt in report.attempts:
        merged_config = merged_config.model_copy(update={name: value for name, value in attempt.resolved if value is not None})
    return merged_config
