"""Time limits. All are computed from times that the API server wrote, so restarts of the operator and a wrong local clock do not affect them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_api.pod import ProgressReport
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Stage

from finetune_operator.views import PodView

SHORTEST_STALL_SECONDS = 600.0
"""Shortest stall timeout that is derived from a run's step time."""
STALL_STEPS = 20
"""Default stall timeout as a multiple of the median step time."""
REPORT_VALID_SECONDS = 120.0
"""Age up to which a progress report describes the pod; when it is older, only the pod's readiness counts."""
LONGEST_WAKE = timedelta(hours=1)
"""Longest time between two reconciles of a job that waits for a time limit; limits the effect of a clock jump."""


def seconds_between(start: datetime | None, end: datetime) -> float:
    """Seconds from start to end, never negative; 0 without a start."""
    return max(0.0, (end - start).total_seconds()) if start else 0.0


def deadline_at(limit_seconds: int | None, earlier_seconds: float, running_since: datetime | None) -> datetime | None:
    """Return when `policy.activeDeadlineSeconds` passes; None: no limit, or the job does not run.

    `earlier_seconds` is the running time before `running_since`.
    """
    if limit_seconds is None or running_since is None:
        return None
    return running_since + timedelta(seconds=max(0.0, limit_seconds - earlier_seconds))


def ttl_expires_at(ttl_seconds: int | None, completed_at: datetime | None) -> datetime | None:
    """Return when the Jobs and pods of a finished job are removed; None: never."""
    return completed_at + timedelta(seconds=ttl_seconds) if ttl_seconds is not None and completed_at is not None else None


def stall_limit_seconds(spec: FineTuneJobSpec, report: ProgressReport | None) -> float:
    """Seconds without a heartbeat after which a run is stalled."""
    if spec.policy.stall_timeout_seconds is not None:
        return float(spec.policy.stall_timeout_seconds)
    median = (report.health.median_step_seconds if report else None) or 0.0
    return max(SHORTEST_STALL_SECONDS, STALL_STEPS * median)


def stall_message(
    spec: FineTuneJobSpec, report: ProgressReport | None, reported_at: datetime | None, pods: Sequence[PodView], now: datetime,
    unready_since: datetime | None = None,
) -> str:  # fmt: skip
    """Return why the run counts as stalled, as a sentence; empty: it is not stalled.

    There are two kinds of stall. In the first, the pod reports that training has had no heartbeat for too long. Only the training
    stage counts, because downloads have no steps. In the second, the pods have not answered for too long and their readiness probes
    fail as well. Without the failed probes, a network policy between operator and pods would end a healthy run. A pod that is being
    deleted does not count as stalled; `pods_of_lost_nodes` handles it.

    `reported_at` is the time of the last report. After a restart of the operator `report` is None and `reported_at` comes from
    the status. `unready_since` is the transition time of PodsReady.
    """
    if reported_at is None:
        return ""
    limit = stall_limit_seconds(spec, report)
    report_age = seconds_between(reported_at, now)
    seconds_without_heartbeat = _seconds_without_heartbeat(report) if report is not None and report.stage is Stage.TRAINING else None
    if seconds_without_heartbeat is not None and report_age < min(limit, REPORT_VALID_SECONDS) and seconds_without_heartbeat + report_age > limit:
        return f"no step for {seconds_without_heartbeat + report_age:.0f} s, the limit is {limit:.0f} s"
    running = [pod for pod in pods if not pod.is_finished]
    seconds_without_answer = seconds_between(max(reported_at, unready_since) if unready_since else reported_at, now)
    if seconds_without_answer > limit and running and not any(pod.is_ready or pod.deletion_timestamp for pod in running):
        return f"the pods have not answered for {seconds_without_answer:.0f} s and are not ready, the limit is {limit:.0f} s"
    return ""


def _seconds_without_heartbeat(report: ProgressReport) -> float | None:
    """Seconds since the last heartbeat at the time of the report; None before the first step."""
    health = report.health
    return health.seconds_since_step if health.seconds_since_heartbeat is None else health.seconds_since_heartbeat


def pods_of_lost_nodes(pods: Sequence[PodView], margin_seconds: float, now: datetime) -> list[PodView]:
    """Pods that still exist `margin_seconds` after their deletion grace period, because their node does not answer."""
    return [
        pod for pod in pods
        if not pod.is_deleted and pod.deletion_timestamp and seconds_between(pod.deletion_timestamp, now) > margin_seconds
    ]  # fmt: skip


def next_reconcile_at(now: datetime, *moments: datetime | None) -> datetime | None:
    """Return the earliest future moment, but at most an hour from now; None if no moment is given.

    Moments in the past are skipped: this reconcile has already taken them into account.
    """
    known = [moment for moment in moments if moment is not None]
    return min([*(moment for moment in known if moment > now), now + LONGEST_WAKE]) if known else None
