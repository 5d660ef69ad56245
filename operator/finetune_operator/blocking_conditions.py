"""Reads events about a Job or a pod to find out why pods are missing.

The status of a pod without a node contains the scheduler's message. The status of a pod with a node contains the kubelet's message about
images and missing Secrets or ConfigMaps. Two problems appear only in events: the Job controller cannot create the pods, or the kubelet
cannot mount a volume. For each read, the API server scans all events of a namespace. So a rate limiter spreads the reads of all jobs,
and the interval between two reads for the same job grows.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from datetime import datetime

from finetune_operator.facts import Facts
from finetune_operator.job_state import EventReadState
from finetune_operator.kube import Forbidden, KubeClient
from finetune_operator.objects import CORE_EVENT
from finetune_operator.policies.blocking import find_blocking_condition_in_events, find_blocking_condition_in_pods
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.throttle import ReadTimeLimiter
from finetune_operator.views import JobView, PodView
from finetune_operator.workqueue import JobKey

logger = logging.getLogger(__name__)

NO_PODS_SECONDS, NOT_RUNNING_SECONDS = 10.0, 20.0
"""Events are read after NO_PODS_SECONDS if a Job lacks pods, and after NOT_RUNNING_SECONDS if a pod has a node but does not start."""
MAX_READ_INTERVAL_SECONDS = 300.0


@dataclass(frozen=True)
class EventSubject:
    """The Job or pod whose events explain why pods of a job do not run."""

    uid: str
    missing_since: datetime
    grace_seconds: float
    """No events are read for this many seconds after `missing_since`, because pods need some time to start."""


class BlockingConditionReader:
    """Reads the events that explain missing pods, at most as often as the rate limiter allows."""

    def __init__(self, kube: KubeClient):
        self._kube = kube
        self._limiter = ReadTimeLimiter()

    async def read(self, key: JobKey, facts: Facts, state: EventReadState) -> bool:
        """Read the events and update `state.blocking_condition`, if a read is due. Returns whether the condition changed.

        Errors: KubeError, except Forbidden, which is logged.
        """
        subject = find_event_subject(facts)
        if subject is None:
            has_changed = state.blocking_condition is not None
            state.blocking_condition, state.due_at, state.interval_seconds = None, None, EventReadState.interval_seconds
            self._limiter.release(key)
            return has_changed
        now = asyncio.get_running_loop().time()
        if not self._is_due(key, subject, state, facts, now):
            return False
        state.due_at = now + state.interval_seconds
        state.interval_seconds = min(2 * state.interval_seconds, MAX_READ_INTERVAL_SECONDS)
        try:
            field_selector = f"involvedObject.uid={subject.uid},type=Warning"
            listing = await self._kube.list(CORE_EVENT, key.namespace, field_selector=field_selector)
        except Forbidden as error:
            logger.info("no permission to read events: %s", error)
            return False
        finally:
            self._limiter.release(key)
            self._limiter.record_read(now, asyncio.get_running_loop().time())
        blocking_condition = find_blocking_condition_in_events(listing.items)
        has_changed = blocking_condition != state.blocking_condition
        state.blocking_condition = blocking_condition
        return has_changed

    def _is_due(self, key: JobKey, subject: EventSubject, state: EventReadState, facts: Facts, now: float) -> bool:
        if state.due_at is None:
            state.due_at = now + max(0.0, subject.grace_seconds - seconds_between(subject.missing_since, facts.now))
        if now >= state.due_at and key not in self._limiter:
            state.due_at = self._limiter.reserve_read(key, now)
        return now >= state.due_at

    def release(self, key: JobKey) -> None:
        """Give up the job's reservation in the rate limiter."""
        self._limiter.release(key)


def find_event_subject(facts: Facts) -> EventSubject | None:
    """Return the Job or pod whose events explain why pods do not run, or None if all pods run or the job needs no pods now."""
    preparation_job = facts.preparation_job
    if facts.current_job is None and preparation_job is not None:
        return _find_subject_of_preparation(preparation_job, facts.preparation_pods)
    current_job = facts.current_job
    if current_job is None or current_job.is_suspended or current_job.is_finished or current_job.is_deleting or facts.termination_reason is not None:
        return None
    if all_pods_ended(facts):
        return None
    if len(facts.active_pods) < facts.pod_count:
        return EventSubject(current_job.uid, current_job.started_at or current_job.created_at, NO_PODS_SECONDS)
    return _find_stuck_pod(facts.active_pods)


def _find_subject_of_preparation(job: JobView, pods: tuple[PodView, ...]) -> EventSubject | None:
    if job.is_finished or job.is_deleting:
        return None
    return _find_stuck_pod(pods) if pods else EventSubject(job.uid, job.created_at, NO_PODS_SECONDS)


def _find_stuck_pod(pods: tuple[PodView, ...]) -> EventSubject | None:
    """Return the first pod that has a node but does not start although its status shows no problem."""
    stuck_pods = [pod for pod in pods if pod.phase == "Pending" and pod.node and not find_blocking_condition_in_pods([pod])]
    return EventSubject(stuck_pods[0].uid, stuck_pods[0].scheduled_at or stuck_pods[0].created_at, NOT_RUNNING_SECONDS) if stuck_pods else None


def all_pods_ended(facts: Facts) -> bool:
    """Whether the pods of all ranks have ended, although the Job controller has not yet marked the Job as finished. Deleted pods do not count."""
    current_job, pods = facts.current_job, facts.newest_pods
    is_running = current_job is not None and not current_job.is_suspended and not current_job.is_finished
    return is_running and len(pods) == facts.pod_count and all(pod.is_finished and not pod.is_deleted for pod in pods)
