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
    return _weighted_seconds(report, lambda _: 1)


def sum_gpu_seconds(report: RunReport) -> tuple[float, bool]:
    """Return the GPU seconds of all attempts together, and whether this sum is only a lower bound."""
    return _weighted_seconds(report, lambda one: one.gpus)


def _weighted_seconds(report: RunReport, weight: Callable[[AttemptRecord], int]) -> tuple[float, bool]:
    total, is_bound = 0.0, False
    for one in report.attempts:
        end, is_estimate = find_end_time(one, report)
        is_bound |= is_estimate
        total += weight(one) * max(0.0, ((end or one.started_at) - one.started_at).total_seconds())
    return total, is_bound


def merge_resolved_configs(report: RunReport) -> ResolvedConfig:
    """Return the effective configuration, merged from all attempts, because an attempt without training reports only some of its fields."""
    merged_config = ResolvedConfig()
    for one in report.attempts:
        merged_config = merged_config.model_copy(update={name: value for name, value in one.resolved if value is not None})
    return merged_config
