"""Computes time limits from times that the API server wrote, so that neither a restart of the operator nor a wrong local clock affects them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_api.pod import ProgressReport
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Stage

from finetune_operator.views import PodView

SHORTEST_STALL_SECONDS = 600.0
"""Minimum of the default stall timeout, which depends on the step time of the run."""
STALL_STEP_COUNT = 20
"""The default stall timeout is this many times the median step time."""
REPORT_VALID_SECONDS = 120.0
"""A progress report that is older than this is ignored: only the readiness of the pods then shows whether the run is stalled."""
LONGEST_RECONCILE_INTERVAL = timedelta(hours=1)
"""Longest time between two reconciles of a job that waits for a time limit. A jump of the clock delays the job at most this long."""


def seconds_between(start: datetime | None, end: datetime) -> float:
    """Return the seconds from `start` to `end`, or 0 if `start` is None or after `end`."""
    return max(0.0, (end - start).total_seconds()) if start else 0.0


def compute_deadline(limit_seconds: int | None, earlier_seconds: float, running_since: datetime | None) -> datetime | None:
    """Return when `policy.activeDeadlineSeconds` passes, or None if there is no limit or the job does not run.

    `earlier_seconds` is the running time before `running_since`.
    """
    if limit_seconds is None or running_since is None:
        return None
    return running_since + timedelta(seconds=max(0.0, limit_seconds - earlier_seconds))


def compute_ttl_end(ttl_seconds: int | None, completed_at: datetime | None) -> datetime | None:
    """Return when the Jobs and pods of a finished job must be removed, or None if they are kept."""
    return completed_at + timedelta(seconds=ttl_seconds) if ttl_seconds is not None and completed_at is not None else None


def compute_stall_limit_seconds(spec: FineTuneJobSpec, report: ProgressReport | None) -> float:
    """Return the stall timeout in seconds: a run is stalled if it has sent no heartbeat for this time."""
    if spec.policy.stall_timeout_seconds is not None:
        return float(spec.policy.stall_timeout_seconds)
    median_step_seconds = (report.health.median_step_seconds if report else None) or 0.0
    return max(SHORTEST_STALL_SECONDS, STALL_STEP_COUNT * median_step_seconds)


def describe_stall(
    spec: FineTuneJobSpec, report: ProgressReport | None, reported_at: datetime | None, pods: Sequence[PodView], now: datetime,
    unready_since: datetime | None = None,
) -> str:  # fmt: skip
    """Return why the run counts as stalled, or an empty string if the run is not stalled.

    A run is stalled if its pod reports no heartbeat for too long during training. The limit for heartbeats does not apply to stages before and after
    training, because these stages have no steps. A run is also stalled if its pods have sent no report for too long and their readiness probes fail. The
    probes are considered because a healthy run must continue if a network policy blocks the operator's requests to its pods. A pod that is being deleted
    does not count as stalled, because `find_pods_of_lost_nodes` handles such pods.

    `reported_at` is the time of the last report. After a restart of the operator, `report` is None and `reported_at` comes from the
    status. `unready_since` is the time at which the pods became unready.
    """
    if reported_at is None:
        return ""
    limit_seconds = compute_stall_limit_seconds(spec, report)
    report_age_seconds = seconds_between(reported_at, now)
    seconds_without_heartbeat = _compute_seconds_without_heartbeat(report) if report is not None and report.stage is Stage.TRAINING else None
    is_report_valid = report_age_seconds < min(limit_seconds, REPORT_VALID_SECONDS)
    if seconds_without_heartbeat is not None and is_report_valid and seconds_without_heartbeat + report_age_seconds > limit_seconds:
        return f"no rank has reported progress for {seconds_without_heartbeat + report_age_seconds:.0f} s; the stall timeout is {limit_seconds:.0f} s"
    unfinished_pods = [pod for pod in pods if not pod.is_finished]
    seconds_without_answer = seconds_between(max(reported_at, unready_since) if unready_since else reported_at, now)
    if seconds_without_answer > limit_seconds and unfinished_pods and not any(pod.is_ready or pod.deletion_timestamp for pod in unfinished_pods):
        return f"the pods have not answered for {seconds_without_answer:.0f} s and are not ready; the stall timeout is {limit_seconds:.0f} s"
    return ""


def _compute_seconds_without_heartbeat(report: ProgressReport) -> float | None:
    """Return the seconds from the last heartbeat to the report, or None before the first step."""
    health = report.health
    return health.seconds_since_step if health.seconds_since_heartbeat is None else health.seconds_since_heartbeat


def find_pods_of_lost_nodes(pods: Sequence[PodView], lost_after_seconds: float, now: datetime) -> list[PodView]:
    """Return the pods that still exist `lost_after_seconds` after their deletion grace period, because their node does not answer."""
    return [
        pod for pod in pods
        if not pod.is_deleted and pod.deletion_timestamp and seconds_between(pod.deletion_timestamp, now) > lost_after_seconds
    ]  # fmt: skip


def compute_next_reconcile(now: datetime, *moments: datetime | None) -> datetime | None:
    """Return the earliest future moment, but at most an hour from now, or None if all moments are None.

    Moments in the past are ignored, because this reconcile has already considered them.
    """
    known_moments = [moment for moment in moments if moment is not None]
    return min([*(moment for moment in known_moments if moment > now), now + LONGEST_RECONCILE_INTERVAL]) if known_moments else None
