"""Reads events about a Job or a pod to find out why pods are missing.

The status of a pod without a node contains the scheduler's message. The status of a pod with a node contains the kubelet's message about
images and missing Secrets or ConfigMaps. Two problems appear only in events: the Job controller cannot create the pods, or the kubelet
cannot mount a volume. For each read, the API server scans all events of a namespace. So reads are rate limited and become less frequent.
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
from finetune_operator.policies.blocking import blocking_condition_of_events, blocking_condition_of_pods
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.throttle import RateLimiter
from finetune_operator.workqueue import Key

logger = logging.getLogger(__name__)

NO_PODS_SECONDS, NOT_RUNNING_SECONDS = 10.0, 20.0
"""Events are read after NO_PODS_SECONDS if a Job lacks pods, and after NOT_RUNNING_SECONDS if a pod has a node but does not start."""
MAX_READ_INTERVAL = 300.0


@dataclass(frozen=True)
class MissingPods:
    """The object whose events explain why pods are missing."""

    uid: str
    since: datetime
    grace_seconds: float
    """For this many seconds after `since`, missing pods are normal and no events are read."""


class BlockingConditionReader:
    """Reads events about missing pods, at most as often as the rate limiter allows."""

    def __init__(self, kube: KubeClient):
        self._kube = kube
        self._limiter = RateLimiter()

    async def read(self, key: Key, facts: Facts, state: EventReadState) -> bool:
        """Update `state.condition` if a read is due. Returns whether the condition changed. Errors: KubeError except Forbidden."""
        missing = find_missing_pods(facts)
        if missing is None:
            changed = state.condition is not None
            state.condition, state.due, state.interval = None, None, EventReadState.interval
            self._limiter.release(key)
            return changed
        now = asyncio.get_running_loop().time()
        if not self._is_due(key, missing, state, facts, now):
            return False
        state.due = now + state.interval
        state.interval = min(2 * state.interval, MAX_READ_INTERVAL)
        try:
            selector = f"involvedObject.uid={missing.uid},type=Warning"
            listing = await self._kube.list(CORE_EVENT, key.namespace, fields=selector)
        except Forbidden as error:
            logger.info("no permission to read events: %s", error)
            return False
        finally:
            self._limiter.release(key)
            self._limiter.record_read(now, asyncio.get_running_loop().time())
        condition = blocking_condition_of_events(listing.items)
        changed = condition != state.condition
        state.condition = condition
        return changed

    def _is_due(self, key: Key, missing: MissingPods, state: EventReadState, facts: Facts, now: float) -> bool:
        if state.due is None:
            state.due = now + max(0.0, missing.grace_seconds - seconds_between(missing.since, facts.now))
        if now >= state.due and key not in self._limiter:
            state.due = self._limiter.reserve(key, now)
        return now >= state.due

    def release(self, key: Key) -> None:
        """Give up the job's reservation in the rate limiter."""
        self._limiter.release(key)


def find_missing_pods(facts: Facts) -> MissingPods | None:
    """Return the object whose events explain missing pods. Return None if no needed pod is missing."""
    current = facts.current_job
    if current is None or current.is_suspended or current.is_finished or current.is_deleting or facts.termination_reason is not None:
        return None
    if all_pods_ended(facts):
        return None
    if len(facts.active_pods) < facts.nodes:
        return MissingPods(current.uid, current.started_at or current.created_at, NO_PODS_SECONDS)
    stuck = [pod for pod in facts.active_pods if pod.phase == "Pending" and pod.node and not blocking_condition_of_pods([pod])]
    return MissingPods(stuck[0].uid, stuck[0].scheduled_at or stuck[0].created_at, NOT_RUNNING_SECONDS) if stuck else None


def all_pods_ended(facts: Facts) -> bool:
    """Whether the pods of all ranks have ended and still exist, but the Job controller has not finished the Job yet."""
    current, pods = facts.current_job, facts.newest_pods
    running = current is not None and not current.is_suspended and not current.is_finished
    return running and len(pods) == facts.nodes and all(pod.is_finished and not pod.is_deleted for pod in pods)
