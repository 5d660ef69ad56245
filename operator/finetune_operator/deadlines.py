"""Computes when the time limits of a job pass: start timeout, stall timeout, backoff, and the deletion of pods on lost nodes."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_api.names import Condition
from finetune_api.pod import ProgressReport

from finetune_operator.facts import Facts
from finetune_operator.policies import timeouts
from finetune_operator.policies.retry import compute_backoff_seconds
from finetune_operator.policies.verdict import RefusedSpec
from finetune_operator.views import PodView

DEFAULT_START_TIMEOUT_SECONDS = 1800
"""Default of `policy.startTimeoutSeconds`, for a spec in which the defaults are not filled in yet."""
FORCE_DELETE_REPEAT_SECONDS = 30.0
"""Seconds between two forced deletions of a pod. A finalizer can keep the pod after a forced deletion."""


def get_start_timeout_seconds(facts: Facts) -> int:
    """Return `policy.startTimeoutSeconds`, or its default if the spec does not set it."""
    return facts.spec.policy.start_timeout_seconds or DEFAULT_START_TIMEOUT_SECONDS


def compute_start_timeout_end(facts: Facts) -> datetime | None:
    """Return when a job that waits for its pods starts to count as stalled, or None if the job does not wait for pods."""
    waiting_since = find_waiting_start(facts)
    return add_seconds(waiting_since, get_start_timeout_seconds(facts)) if waiting_since else None


def find_waiting_start(facts: Facts) -> datetime | None:
    """Return when the job began to wait for its pods or for the Job that creates them.

    Return None if the job does not wait, because it is queued or suspended.
    """
    ready_condition = facts.condition(Condition.PODS_READY)
    if facts.running_since is not None:
        # If the status still shows the pods as ready, they became unready just now.
        unready_since = facts.now if ready_condition and ready_condition.status == "True" else ready_condition.last_transition_time if ready_condition else None
        return max(facts.running_since, unready_since) if unready_since else facts.running_since
    accepted_condition = facts.condition(Condition.ACCEPTED)
    if isinstance(facts.acceptance, RefusedSpec) and accepted_condition is not None and accepted_condition.status == "False":
        return accepted_condition.last_transition_time
    if facts.current_job is not None or ready_condition is None or ready_condition.status == "True" or ready_condition.last_transition_time is None:
        return None
    if facts.is_true(Condition.SUSPENDED):
        return None  # this reconcile resumes the job, and the time of the suspension does not count as waiting
    suspended_condition, (_, backoff_end) = facts.condition(Condition.SUSPENDED), compute_backoff_interval(facts)
    preparation = facts.job.status.preparation
    earliest_starts = [
        suspended_condition.last_transition_time if suspended_condition else None, backoff_end, preparation.end_time if preparation else None
    ]  # fmt: skip
    return max([ready_condition.last_transition_time, *(start for start in earliest_starts if start is not None)])


def compute_backoff_interval(facts: Facts) -> tuple[datetime | None, datetime | None]:
    """Return the start and the end of the backoff after the last attempt, or (None, None) if no attempt has ended."""
    attempts = facts.job.status.attempts
    ended_at = attempts[-1].end_time if attempts else None
    return ended_at, add_seconds(ended_at, compute_backoff_seconds(attempts, facts.config.retry, facts.job.uid)) if ended_at else None


def describe_stall(facts: Facts) -> str:
    """Return why the running attempt counts as stalled, or an empty string if the attempt is not stalled."""
    report, reported_at = _find_last_report(facts)
    return timeouts.describe_stall(facts.spec, report, reported_at, facts.active_pods, facts.now, _find_unready_since(facts))


def compute_stall_check_time(facts: Facts) -> datetime | None:
    """Return the time at which the attempt counts as stalled unless a new report arrives or a pod becomes ready."""
    report, reported_at = _find_last_report(facts)
    unready_since = _find_unready_since(facts)
    silence_starts = [time for time in (reported_at, unready_since) if time is not None and time <= facts.now]
    limit_seconds = timeouts.compute_stall_limit_seconds(facts.spec, report)
    return add_seconds(max(silence_starts), limit_seconds + 1) if reported_at and silence_starts else None


def _find_last_report(facts: Facts) -> tuple[ProgressReport | None, datetime | None]:
    """Return the last report of the attempt's active pods, and the time of this report.

    If this process has received no report, the report is None and the time comes from the status.
    """
    live_report = facts.live_report
    return (live_report.report, live_report.received_at) if live_report else (None, _read_last_report_time(facts))


def _read_last_report_time(facts: Facts) -> datetime | None:
    """Return the time of the active pods' last report according to the status. The operator uses this time after a restart.

    Return None if the pods are ready, do not run, or have never trained. If a queue replaced rank 0's pod within the attempt, the result is not
    earlier than the start of the new pod. The time of a report comes from the clock of the pod's node. If this clock is ahead of the API server's
    clock, the stall timeout passes later.
    """
    record, progress, pods_ready = facts.attempt_record, facts.job.status.progress, facts.condition(Condition.PODS_READY)
    rank0_pod = facts.rank0_pod
    if record is None or not record.last_step or rank0_pod is None or rank0_pod.phase != "Running":
        return None
    if pods_ready is None or pods_ready.status == "True" or pods_ready.last_transition_time is None:
        return None
    started_at, reported_at = rank0_pod.running_since or rank0_pod.created_at, progress.update_time if progress else None
    return max(started_at, reported_at) if reported_at else started_at


def _find_unready_since(facts: Facts) -> datetime | None:
    """Return when the pods became unready according to the status. If the status shows the pods as ready, return the current time."""
    ready_condition = facts.condition(Condition.PODS_READY)
    return facts.now if ready_condition is not None and ready_condition.status == "True" else ready_condition.last_transition_time if ready_condition else None


def compute_force_delete_time(facts: Facts, pods: tuple[PodView, ...]) -> datetime | None:
    """Return when the next pod must be force-deleted, because its deletion takes so long that its node counts as lost.

    If a pod has already reached this time, this reconcile force-deletes it, and the result is `FORCE_DELETE_REPEAT_SECONDS` from now.
    """
    deletion_times = [pod.deletion_timestamp for pod in pods if pod.deletion_timestamp and not pod.is_deleted]
    if timeouts.find_pods_of_lost_nodes(pods, facts.config.lost_node_seconds, facts.now):
        return add_seconds(facts.now, FORCE_DELETE_REPEAT_SECONDS)
    return add_seconds(min(deletion_times), facts.config.lost_node_seconds + 1) if deletion_times else None


def add_seconds(moment: datetime, seconds: float) -> datetime:
    """Return the time `seconds` after `moment`."""
    return moment + timedelta(seconds=seconds)
