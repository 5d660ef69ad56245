"""Step 4 of a reconcile: if the status changed, emits events and writes the status once. During a burst of changes, writes that are not urgent
are deferred."""

from __future__ import annotations

import asyncio
import logging

from finetune_api.names import Condition as ConditionType
from finetune_api.names import Reason
from finetune_api.status import FineTuneJobStatus, ResolvedConfig, select_immediate_fields

from finetune_operator.blocking_conditions import all_pods_ended
from finetune_operator.cache import JobCache
from finetune_operator.events import EventDraft, EventRecorder, draft_events
from finetune_operator.facts import Facts
from finetune_operator.job_state import JobState, StoredStatus
from finetune_operator.killpoints import KillPoint, kill_if_requested
from finetune_operator.kube import Invalid, KubeClient
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB, Object
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.report import compute_status, reduce_status, remove_rejected_fields
from finetune_operator.throttle import StatusThrottle
from finetune_operator.views import FineTuneJobView, read_finetunejob
from finetune_operator.workqueue import JobKey, WorkQueue

logger = logging.getLogger(__name__)

FIRST_STATUS_RECHECK_SECONDS = 1.0
"""During a burst of new jobs: time between two checks whether the burst continues."""
START_EVENTS = (Reason.ACCEPTED, Reason.ATTEMPT_STARTED)
"""Reasons of events that may be deferred together with the first status of a job."""


class StatusWriter:
    """Writes the statuses of all jobs. All jobs share one instance, because a burst consists of changes of several jobs."""

    def __init__(
        self, *, kube: KubeClient, cache: JobCache, queue: WorkQueue, recorder: EventRecorder, metrics: Metrics, progress_seconds: float
    ):
        self._kube, self._cache, self._queue = kube, cache, queue
        self._recorder, self._metrics = recorder, metrics
        self._throttle = StatusThrottle(progress_seconds)

    async def write(self, key: JobKey, facts: Facts, plan: Plan, result: ActionResult, state: JobState) -> None:
        """Compute the new status and write it. If the write is deferred, queue the job for a later reconcile instead.

        Errors: Conflict if the FineTuneJob has changed since this reconcile read it; other KubeErrors.
        """
        old_status, new_status = facts.job.status, compute_status(facts, plan, result)
        if new_status is old_status:
            self._throttle.record_reverted_change(state.pending_changes)
            return
        old_status_json, new_status_json = _get_stored_status(facts.job, state), new_status.to_wire()
        if old_status_json == new_status_json or state.pruned_status_write == (facts.job.resource_version, new_status_json):
            self._throttle.record_reverted_change(state.pending_changes)
            return
        drafts = draft_events(old_status, new_status)
        is_transition = select_immediate_fields(old_status_json) != select_immediate_fields(new_status_json)
        delay_seconds = self._compute_delay_seconds(facts, plan, new_status, drafts, state, is_transition=is_transition)
        if delay_seconds > 0:
            self._queue.add_after(key, delay_seconds)
            return
        now = asyncio.get_running_loop().time()
        await self._recorder.emit(facts.job, drafts)
        kill_if_requested(KillPoint.BEFORE_STATUS_WRITE)
        written_job = await self._replace_status(facts.job, new_status, new_status_json, state)
        kill_if_requested(KillPoint.AFTER_STATUS_WRITE)
        # The interval until the next write starts when the progress was received. If the interval started at the write, one late write would delay
        # all later writes.
        report_age_seconds = seconds_between(facts.last_report.received_at, facts.now) if facts.last_report else 0.0
        self._throttle.record_write(state.pending_changes, now - report_age_seconds)
        self._cache.put_finetunejob(written_job)
        self._recorder.record_status_write(facts.job.uid)
        self._record_metrics(facts, old_status, new_status, plan)

    async def _replace_status(self, job: FineTuneJobView, new_status: FineTuneJobStatus, new_status_json: Object, state: JobState) -> FineTuneJobView:
        """Write the status, whose JSON is `new_status_json`. If the API server rejects the status, write it without the values from pods, so that
        suspend, cancel and deadlines still work."""
        try:
            body = await self._send_status(job, new_status_json)
        except Invalid as error:
            await self._report_rejection(job, error, state)
        else:
            written_job = read_finetunejob(body)
            # The comparison of the JSON is fast, but can find a difference without meaning, for example another format of a time. So the parsed
            # values are compared, too.
            is_pruned = body.get("status") != new_status_json and written_job.status.to_wire() != new_status_json
            state.pruned_status_write = (written_job.resource_version, new_status_json) if is_pruned else None
            state.stored_status = None if is_pruned else StoredStatus.store(written_job.resource_version, new_status_json)
            return written_job
        status_json_without_reports = reduce_status(new_status, job.status).to_wire()
        if status_json_without_reports == job.status.to_wire():
            return job
        try:
            return read_finetunejob(await self._send_status(job, status_json_without_reports))
        except Invalid as error:
            # A newer CRD may reject values that were stored under an older CRD.
            logger.warning("the API server also rejects the values of the stored status: %s", error)
        minimal_status = reduce_status(new_status, FineTuneJobStatus())
        try:
            return read_finetunejob(await self._send_status(job, minimal_status.to_wire()))
        except Invalid as error:
            # A CRD that is older than the operator lacks some phases and conditions that the operator writes.
            return read_finetunejob(await self._send_status(job, remove_rejected_fields(minimal_status, error.message).to_wire()))

    async def _send_status(self, job: FineTuneJobView, status: Object) -> Object:
        return await self._kube.replace(FINETUNEJOB, job.namespace, build_status_body(job, status), subresource="status")

    async def _report_rejection(self, job: FineTuneJobView, error: Invalid, state: JobState) -> None:
        if error.message == state.status_rejection:
            return
        state.status_rejection = error.message
        logger.warning("the API server rejects the status; the operator writes it without the values from the pods: %s", error)
        message = f"the API server rejects the status; the operator writes it without the values from the pods: {error.message}"
        await self._recorder.emit(job, [EventDraft(Reason.STATUS_REJECTED, message, "Warning", "Report")])

    def _compute_delay_seconds(
        self, facts: Facts, plan: Plan, new_status: FineTuneJobStatus, drafts: list[EventDraft], state: JobState, *, is_transition: bool
    ) -> float:
        """Return the seconds to wait before the write. If the result is 0 or negative, the status must be written now."""
        now, is_update_burst = asyncio.get_running_loop().time(), self._queue.is_update_burst
        if not is_transition:
            has_steps = bool(new_status.steps_done)
            return self._throttle.compute_progress_delay(state.pending_changes, now, has_steps=has_steps, is_update_burst=is_update_burst)
        if may_defer(plan, facts.job.status, new_status, drafts):
            pods_ended = all_pods_ended(facts)
            return self._throttle.compute_transition_delay(state.pending_changes, pods_ended=pods_ended, now=now, is_update_burst=is_update_burst)
        return 0.0

    def defer_first_status(self, key: JobKey, state: JobState) -> bool:
        """Defer the first status of a new job if other FineTuneJobs wait for their Jobs. Returns whether the status is deferred."""
        if self._queue.is_burst:
            state.is_first_status_deferred = True
            self._throttle.defer_first_status(state.pending_changes, asyncio.get_running_loop().time())
            self._queue.add_after(key, FIRST_STATUS_RECHECK_SECONDS)
        elif len(self._queue):
            self._queue.add(key)
        else:
            return False
        return True

    def is_first_status_deferred(self, key: JobKey, state: JobState | None) -> bool:
        """Whether this reconcile can be skipped: the job's first status write is deferred, and the burst continues or the job still has no pods."""
        if state is None or not state.is_first_status_deferred:
            return False
        due_at = self._throttle.compute_first_status_due_at(state.pending_changes)
        now, cached_objects = asyncio.get_running_loop().time(), self._cache.get(key)
        job = cached_objects.finetunejob
        is_unchanged = job is not None and not job.is_deleting and (job.uid, job.generation) == (state.uid, state.generation)
        can_wait = self._queue.is_burst or not cached_objects.pods
        if not is_unchanged or not can_wait or now >= due_at:
            state.is_first_status_deferred = False
            return False
        self._queue.add_after(key, min(FIRST_STATUS_RECHECK_SECONDS, due_at - now))
        return True

    def drop_state(self, uid: str) -> None:
        """Drop the stored event hashes of a deleted job."""
        self._recorder.record_status_write(uid)

    def _record_metrics(self, facts: Facts, old_status: FineTuneJobStatus, new_status: FineTuneJobStatus, plan: Plan) -> None:
        if plan.attempt_end is not None:
            self._metrics.attempts_ended.labels(plan.attempt_end.reason.value).inc()
            self._metrics.record_model_fetch(new_status.resolved or ResolvedConfig())
            record = next((attempt for attempt in new_status.attempts if attempt.number == facts.attempt), None)
            if record is not None and record.last_step:
                self._metrics.steps_done.inc(max(0, record.last_step - (record.resumed_from_step or 0)))
        self._metrics.record_attempt_time(old_status.goodput, new_status.goodput, facts.attempt if plan.attempt_end is not None else None)
        recorded_steps_lost = {attempt.number: attempt.steps_lost for attempt in old_status.attempts}
        for attempt in new_status.attempts:
            if attempt.steps_lost and not recorded_steps_lost.get(attempt.number):
                self._metrics.steps_lost.inc(attempt.steps_lost)
        if plan.job_end is not None:
            self._metrics.jobs_finished.labels(plan.job_end.outcome.value).inc()
            logger.info("%s: %s", plan.job_end.outcome.value, plan.job_end.reason)
        new_quota_condition, old_quota_condition = new_status.condition(ConditionType.QUOTA_RESERVED), old_status.condition(ConditionType.QUOTA_RESERVED)
        if (
            new_quota_condition is not None
            and old_quota_condition is not None
            and (old_quota_condition.status, new_quota_condition.status) == ("False", "True")
        ):
            admitted_at = new_quota_condition.last_transition_time or facts.now
            self._metrics.quota_wait.observe(seconds_between(old_quota_condition.last_transition_time, admitted_at))
        if new_status.steps_done and not old_status.steps_done:
            self._metrics.time_to_running.observe((facts.now - facts.job.created_at).total_seconds())


def _get_stored_status(job: FineTuneJobView, state: JobState) -> Object:
    """Return the job's stored status as JSON objects.

    The JSON text of the status is created once per version of the job, because several reconciles can see the same version.
    """
    if state.stored_status is None or state.stored_status.resource_version != job.resource_version:
        state.stored_status = StoredStatus.store(job.resource_version, job.status.to_wire())
    return state.stored_status.read()


def may_defer(plan: Plan, old_status: FineTuneJobStatus, new_status: FineTuneJobStatus, drafts: list[EventDraft]) -> bool:
    """Whether a transition may be deferred and written together with the next transition.

    A transition may be deferred if no attempt ends, the reasons of all new events are in `START_EVENTS`, and no step is done yet. A change of the
    running time is written at once, because the deadline is computed from it.
    """
    has_urgent_event = any(draft.reason not in START_EVENTS for draft in drafts)
    is_urgent_change = plan.situation is not Situation.ACTIVE or plan.termination or old_status.active_seconds != new_status.active_seconds
    return not has_urgent_event and not new_status.steps_done and not is_urgent_change


def build_status_body(job: FineTuneJobView, status: Object) -> Object:
    """Return the request body of a status write. The server rejects the write if the job's resourceVersion has changed."""
    return {
        "apiVersion": FINETUNEJOB.api_version,
        "kind": FINETUNEJOB.kind,
        "metadata": {"name": job.name, "namespace": job.namespace, "resourceVersion": job.resource_version},
        "spec": job.spec,
        "status": status,
    }

