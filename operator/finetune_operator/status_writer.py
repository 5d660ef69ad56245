"""Step 4 of a reconcile: emits events, and writes the status if the status changed. There is at most one write per reconcile. During a
burst of changes, writes that are not urgent are deferred."""

from __future__ import annotations

import asyncio
import logging

from finetune_api.names import Condition as Kind
from finetune_api.names import Reason
from finetune_api.status import FineTuneJobStatus, ResolvedConfig, prompt_part

from finetune_operator.blocking_conditions import all_pods_ended
from finetune_operator.cache import Cache
from finetune_operator.events import EventDraft, EventRecorder, draft_events
from finetune_operator.facts import Facts
from finetune_operator.job_state import JobState
from finetune_operator.killpoints import KillPoint, kill_if_requested
from finetune_operator.kube import Invalid, KubeClient
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB, Object
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.report import compute_status, reduced_status, without_rejected_fields
from finetune_operator.throttle import MAX_DEFER_SECONDS, StatusThrottle
from finetune_operator.views import JobObject, read_finetunejob
from finetune_operator.workqueue import Key, WorkQueue

logger = logging.getLogger(__name__)

FIRST_STATUS_DEFER_SECONDS, FIRST_STATUS_RECHECK_SECONDS = MAX_DEFER_SECONDS, 1.0
"""Maximum delay of a job's first status write during a burst of new jobs, and seconds between two checks whether the burst continues."""
START_EVENTS = (Reason.ACCEPTED, Reason.ATTEMPT_STARTED)
"""These events may be deferred together with the first status of a job."""


class StatusWriter:
    """Writes statuses. All jobs share one instance, because bursts are detected across jobs."""

    def __init__(
        self, *, kube: KubeClient, cache: Cache, queue: WorkQueue, recorder: EventRecorder, metrics: Metrics, progress_seconds: float
    ):
        self._kube, self._cache, self._queue = kube, cache, queue
        self._recorder, self._metrics = recorder, metrics
        self._throttle = StatusThrottle(progress_seconds)

    async def write(self, key: Key, facts: Facts, plan: Plan, result: ActionResult, state: JobState) -> None:
        """Compute the new status and write it. If the write is deferred, queue the job for a later reconcile instead.

        Errors: Conflict if the FineTuneJob has changed since it was observed; other KubeErrors.
        """
        old_status, new_status = facts.job.status, compute_status(facts, plan, result)
        if new_status is old_status:
            return
        old_wire, new_wire = _stored_status(facts.job, state), new_status.to_wire()
        if old_wire == new_wire or state.pruned_write == (facts.job.resource_version, new_wire):
            state.pending_changes.transition_at = None
            return
        drafts = draft_events(old_status, new_status)
        delay_seconds = self._delay_seconds(facts, plan, new_status, drafts, state, is_transition=prompt_part(old_wire) != prompt_part(new_wire))
        if delay_seconds > 0:
            self._queue.add_after(key, delay_seconds)
            return
        now = asyncio.get_running_loop().time()
        await self._recorder.emit(facts.job, drafts)
        kill_if_requested(KillPoint.BEFORE_STATUS_WRITE)
        written_job = await self._replace_status(facts.job, new_status, new_wire, state)
        kill_if_requested(KillPoint.AFTER_STATUS_WRITE)
        # The next interval starts when the progress was received. If it started at the write, one late write would delay all later writes.
        received_ago = seconds_between(facts.last_report.time, facts.now) if facts.last_report else 0.0
        self._throttle.record_write(state.pending_changes, now - received_ago)
        self._cache.put_finetunejob(written_job)
        self._recorder.record_status_write(facts.job.uid)
        self._record_metrics(facts, old_status, new_status, plan)

    async def _replace_status(self, job: JobObject, new_status: FineTuneJobStatus, new_wire: Object, state: JobState) -> JobObject:
        """Write the status, whose JSON is `new_wire`. If the API server rejects it, omit values from pods, so that suspend, cancel and
        deadlines still work."""
        try:
            body = await self._send_status(job, new_wire)
        except Invalid as error:
            await self._report_rejection(job, error, state)
        else:
            written_job = read_finetunejob(body)
            # The comparison of the JSON is fast. It may find a difference that has no meaning, for example a changed form of a time.
            is_pruned = body.get("status") != new_wire and written_job.status.to_wire() != new_wire
            state.pruned_write = (written_job.resource_version, new_wire) if is_pruned else None
            state.stored_status = None if is_pruned else (written_job.resource_version, new_wire)
            return written_job
        wire_without_reports = reduced_status(new_status, job.status).to_wire()
        if wire_without_reports == job.status.to_wire():
            return job
        try:
            return read_finetunejob(await self._send_status(job, wire_without_reports))
        except Invalid as error:
            # A newer CRD may reject values that were stored under an older CRD.
            logger.warning("the API server also rejects the values of the stored status: %s", error)
        minimal_status = reduced_status(new_status, FineTuneJobStatus())
        try:
            return read_finetunejob(await self._send_status(job, minimal_status.to_wire()))
        except Invalid as error:
            # A CRD that is older than the operator lacks some phases and conditions that the operator writes.
            return read_finetunejob(await self._send_status(job, without_rejected_fields(minimal_status, error.message).to_wire()))

    async def _send_status(self, job: JobObject, status: Object) -> Object:
        return await self._kube.replace(FINETUNEJOB, job.namespace, status_body(job, status), subresource="status")

    async def _report_rejection(self, job: JobObject, error: Invalid, state: JobState) -> None:
        if error.message == state.status_rejection:
            return
        state.status_rejection = error.message
        logger.warning("the API server rejects the status; the operator writes it without the values from the pods: %s", error)
        text = f"the API server rejects the status; the operator writes it without the values from the pods: {error.message}"
        await self._recorder.emit(job, [EventDraft(Reason.STATUS_REJECTED, text, "Warning", "Report")])

    def _delay_seconds(
        self, facts: Facts, plan: Plan, new_status: FineTuneJobStatus, drafts: list[EventDraft], state: JobState, *, is_transition: bool
    ) -> float:
        """Return the seconds to wait before the write. If the result is not positive, the status must be written now."""
        now = asyncio.get_running_loop().time()
        if not is_transition:
            return self._throttle.progress_delay(state.pending_changes, now, 0.0 if new_status.steps_done else MAX_DEFER_SECONDS)
        if may_defer(plan, facts.job.status, new_status, drafts):
            return self._throttle.transition_delay(state.pending_changes, pods_ended=all_pods_ended(facts), now=now)
        return 0.0

    def defer_first_status(self, key: Key, state: JobState) -> bool:
        """Defer the first status of a new job if other FineTuneJobs wait for their Jobs. Returns False if no other FineTuneJob waits."""
        if self._queue.is_burst:
            now = asyncio.get_running_loop().time()
            state.first_status_due = now + FIRST_STATUS_DEFER_SECONDS
            state.pending_changes.created_at = now
            self._queue.add_after(key, FIRST_STATUS_RECHECK_SECONDS)
        elif len(self._queue):
            self._queue.add(key)
        else:
            return False
        return True

    def is_first_status_deferred(self, key: Key, state: JobState | None) -> bool:
        """Whether this reconcile can be skipped: the job's first status write is deferred, and the burst continues or the job has no pods."""
        if state is None or state.first_status_due is None:
            return False
        now, entry = asyncio.get_running_loop().time(), self._cache.get(key)
        job = entry.finetunejob
        is_unchanged = job is not None and not job.is_deleting and (job.uid, job.generation) == (state.uid, state.generation)
        can_wait = self._queue.is_burst or not entry.pods
        if not is_unchanged or not can_wait or now >= state.first_status_due:
            state.first_status_due = None
            return False
        self._queue.add_after(key, min(FIRST_STATUS_RECHECK_SECONDS, state.first_status_due - now))
        return True

    def drop_state(self, uid: str) -> None:
        """Drop the state of a deleted job."""
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
        new_quota, old_quota = new_status.condition(Kind.QUOTA_RESERVED), old_status.condition(Kind.QUOTA_RESERVED)
        if new_quota is not None and old_quota is not None and (old_quota.status, new_quota.status) == ("False", "True"):
            admitted_at = new_quota.last_transition_time or facts.now
            self._metrics.quota_wait.observe(seconds_between(old_quota.last_transition_time, admitted_at))
        if new_status.steps_done and not old_status.steps_done:
            self._metrics.time_to_running.observe((facts.now - facts.job.created_at).total_seconds())


def _stored_status(job: JobObject, state: JobState) -> Object:
    """Return the JSON of the job's stored status. It is kept, because several reconciles see the same version of the job."""
    if state.stored_status is None or state.stored_status[0] != job.resource_version:
        state.stored_status = (job.resource_version, job.status.to_wire())
    return state.stored_status[1]


def may_defer(plan: Plan, old_status: FineTuneJobStatus, new_status: FineTuneJobStatus, drafts: list[EventDraft]) -> bool:
    """Whether a transition may be deferred and written together with the next transition.

    A transition may be deferred if no attempt ends, all new events are in `START_EVENTS`, and no step is done. A change of the running time
    is written at once, because the deadline is computed from the running time.
    """
    needs_event = any(draft.reason not in START_EVENTS for draft in drafts)
    ends_period = plan.situation is not Situation.ACTIVE or plan.termination or old_status.active_seconds != new_status.active_seconds
    return not needs_event and not new_status.steps_done and not ends_period


def status_body(job: JobObject, status: Object) -> Object:
    """Return the request body of a status write. The server rejects the write if the job's resourceVersion has changed."""
    return {
        "apiVersion": FINETUNEJOB.api_version,
        "kind": FINETUNEJOB.kind,
        "metadata": {"name": job.name, "namespace": job.namespace, "resourceVersion": job.resource_version},
        "spec": job.spec,
        "status": status,
    }

