"""Time limits, computed from times that servers wrote down: they survive our restarts and a clock that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_api.pod import ProgressReport
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, Stage

from finetune_operator.settings import RetrySettings
from finetune_operator.views import PodView

LEAST_STALL = 600.0
"""Shortest stall timeout that is derived from a run's own pace, in seconds."""
STALL_STEPS = 20
"""Steps that a run may be late by before it counts as stalled."""
FRESH = 120.0
"""Seconds for which a pod's answer still says how it is; after that only the kubelet's word counts."""
LONGEST_WAKE = timedelta(hours=1)
"""Longest time between two looks, whatever a deadline says: guards against a clock that jumped."""


def seconds_between(start: datetime | None, end: datetime) -> float:
    """Time from start to end, never negative."""
    return max(0.0, (end - start).total_seconds()) if start else 0.0


def deadline_at(spec: FineTuneJobSpec, active: float, running_since: datetime | None) -> datetime | None:
    """When `policy.activeDeadlineSeconds` will have passed; None: there is none, or nothing runs."""
    limit = spec.policy.active_deadline_seconds
    if limit is None or running_since is None:
        return None
    return running_since + timedelta(seconds=max(0.0, limit - active))


def ttl_expires_at(ttl: int | None, completed: datetime | None) -> datetime | None:
    """When Jobs and Pods of a finished job are to be removed."""
    return completed + timedelta(seconds=ttl) if ttl is not None and completed is not None else None


def backoff_seconds(attempts: Sequence[Attempt], settings: RetrySettings, unharmed: Sequence[str]) -> float:
    """Seconds to wait after the last of `attempts` before the next.

    The pause doubles with each attempt in a row that made no progress. Reasons in `unharmed` (a user's wish, a ladder that
    changed something) need no pause, and the first attempt that the cluster took needs none either.
    """
    idle = 0
    for attempt in reversed(attempts):
        if attempt.reason in unharmed or _progressed(attempt):
            break
        idle += 1
    if idle and not attempts[-1].counted:
        idle -= 1
    return min(settings.base_seconds * 2 ** min(idle - 1, 20), settings.max_seconds) if idle else 0.0


def _progressed(attempt: Attempt) -> bool:
    return attempt.committed_step is not None and attempt.committed_step > (attempt.resumed_from_step or 0)


def stall_limit_seconds(spec: FineTuneJobSpec, report: ProgressReport | None) -> float:
    """Seconds without a step after which a run counts as stalled."""
    if spec.policy.stall_timeout_seconds is not None:
        return float(spec.policy.stall_timeout_seconds)
    median = (report.health.median_step_seconds if report else None) or 0.0
    return max(LEAST_STALL, STALL_STEPS * median)


def stall_message(
    spec: FineTuneJobSpec, report: ProgressReport | None, heard: datetime | None, pods: Sequence[PodView], now: datetime,
    unready: datetime | None = None,
) -> str:  # fmt: skip
    """Why the run counts as stalled, in words; empty: it does not.

    Only training can stall: downloads have no steps. A batch of an evaluation is as good as a step. A pod that no longer answers
    counts only if the kubelet, too, finds it not ready (since `unready`, if that is known): a network policy must not kill a healthy
    run, nor one whose readiness flaps behind it. Nor is a pod missed that was told to go: of those that do not, `lost` speaks.
    `report` is None where nobody remembers one; `heard` is then when status says that the pod spoke last.
    """
    if heard is None:
        return ""
    limit = stall_limit_seconds(spec, report)
    silent = seconds_between(heard, now)
    late = _quiet(report) if report is not None and report.stage is Stage.TRAINING else None
    if late is not None and silent < min(limit, FRESH) and late + silent > limit:
        return f"no step for {late + silent:.0f} s, the limit is {limit:.0f} s"
    running = [pod for pod in pods if not pod.is_finished]
    silent = seconds_between(max(heard, unready) if unready else heard, now)
    if silent > limit and running and not any(pod.is_ready or pod.deletion_timestamp for pod in running):
        return f"the pods have not answered for {silent:.0f} s and are not ready, the limit is {limit:.0f} s"
    return ""


def _quiet(report: ProgressReport) -> float | None:
    """Seconds without a sign of life that a pod tells of itself; None before the first step."""
    health = report.health
    return health.seconds_since_step if health.seconds_since_heartbeat is None else health.seconds_since_heartbeat


def pods_of_lost_nodes(pods: Sequence[PodView], grace: float, now: datetime) -> list[PodView]:
    """Pods that should be gone and are not: their node does not answer. `grace` is in seconds, on top of the pod's own."""
    return [pod for pod in pods if not pod.is_deleted and pod.deletion_timestamp and seconds_between(pod.deletion_timestamp, now) > grace]


def next_reconcile_at(now: datetime, *moments: datetime | None) -> datetime | None:
    """The earliest of the moments that are still to come, but not later than in an hour; None: no time matters.

    One that has passed had its look: whoever looked then and did nothing waits for something else to happen.
    """
    wanted = [moment for moment in moments if moment is not None]
    return min([*(moment for moment in wanted if moment > now), now + LONGEST_WAKE]) if wanted else None
