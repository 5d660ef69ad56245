"""Step 4 of a reconcile: emit events and write the status, if it changed; once, and deferred where nothing is lost by waiting."""

from __future__ import annotations

import asyncio
import logging

from finetune_api.names import Condition as Kind
from finetune_api.names import Reason
from finetune_api.status import FineTuneJobStatus

from finetune_operator.blocking_reader import all_pods_ended
from finetune_operator.cache import Cache
from finetune_operator.events import Note, Recorder, transitions
from finetune_operator.facts import Facts
from finetune_operator.job_state import JobState
from finetune_operator.killpoints import Point, reach
from finetune_operator.kube import Invalid, Kube
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB, Object
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.report import reduced_status, report
from finetune_operator.throttle import MAX_DEFER_SECONDS, StatusThrottle
from finetune_operator.views import JobObject, read_finetunejob
from finetune_operator.workqueue import Key, WorkQueue

logger = logging.getLogger(__name__)

FIRST_STATUS_DEFER_SECONDS, FIRST_STATUS_RECHECK_SECONDS = MAX_DEFER_SECONDS, 1.0
"""How long the first status of a job may be deferred during a burst of new jobs, and the seconds between two checks."""
START_EVENTS = (Reason.ACCEPTED, Reason.ATTEMPT_STARTED)
"""Events that may be deferred together with the first status of a job."""


class StatusWriter:
    """Writes statuses. One instance per process, since a burst concerns all jobs together."""

    def __init__(
        self, *, kube: Kube, cache: Cache, queue: WorkQueue, recorder: Recorder, metrics: Metrics, progress_seconds: float
    ):
        self._kube, self._cache, self._queue = kube, cache, queue
        self._recorder, self._metrics = recorder, metrics
        self._throttle = StatusThrottle(progress_seconds)

    async def write(self, key: Key, facts: Facts, plan: Plan, acted: ActionResult, state: JobState) -> None:
        """Write the status that follows from the facts, or queue the job for the time when it may be written.

        Errors: Conflict if the job changed since it was observed, other KubeErrors.
        """
        old, new = facts.job.status, report(facts, plan, acted)
        before, after = old.to_wire(), new.to_wire()
        if before == after:
            state.pending.transition_at = None
            return
        notes = transitions(old, new)
        delay = self._delay(facts, plan, new, notes, state, is_transition=old.prompt_part() != new.prompt_part())
        if delay > 0:
            self._queue.add_after(key, delay)
            return
        now = asyncio.get_running_loop().time()
        await self._recorder.emit(facts.job, notes)
        reach(Point.BEFORE_STATUS_WRITE)
        written = await self._replace_status(facts.job, new, state)
        reach(Point.AFTER_STATUS_WRITE)
        # The next interval starts when the progress was received. If it started at the write, one late write would delay all later ones.
        received_ago = seconds_between(facts.last_report.time, facts.now) if facts.last_report else 0.0
        self._throttle.record_write(state.pending, now - received_ago)
        self._cache.put_finetunejob(written)
        self._recorder.commit(facts.job.uid)
        self._record_metrics(facts, old, new, plan)

    async def _replace_status(self, job: JobObject, new: FineTuneJobStatus, state: JobState) -> JobObject:
        """Write the status; where the API server rejects it, without what pods reported, so that control goes on."""
        try:
            return await self._replace(job, new)
        except Invalid as error:
            await self._report_rejection(job, error, state)
        reduced = reduced_status(new, job.status)
        if reduced.to_wire() == job.status.to_wire():
            return job
        try:
            return await self._replace(job, reduced)
        except Invalid as error:
            # A newer CRD may reject values that an older one stored.
            logger.warning("the API server rejects the stored status, too: %s", error)
            return await self._replace(job, reduced_status(new, FineTuneJobStatus()))

    async def _replace(self, job: JobObject, status: FineTuneJobStatus) -> JobObject:
        body = status_body(job, status.to_wire())
        return read_finetunejob(await self._kube.replace(FINETUNEJOB, job.namespace, body, subresource="status"))

    async def _report_rejection(self, job: JobObject, error: Invalid, state: JobState) -> None:
        if error.message == state.status_rejection:
            return
        state.status_rejection = error.message
        logger.warning("the API server rejects the status, which is written without what pods reported: %s", error)
        text = f"the API server rejects the status, which is written without what the pods reported: {error.message}"
        await self._recorder.emit(job, [Note(Reason.STATUS_REJECTED, text, "Warning", "Report")])

    def _delay(
        self, facts: Facts, plan: Plan, new: FineTuneJobStatus, notes: list[Note], state: JobState, *, is_transition: bool
    ) -> float:
        """Seconds to wait before the write; zero or less: none."""
        now = asyncio.get_running_loop().time()
        if not is_transition:
            return self._throttle.progress_delay(state.pending, now, 0.0 if new.steps_done else MAX_DEFER_SECONDS)
        if may_defer(plan, facts.job.status, new, notes):
            return self._throttle.transition_delay(state.pending, pods_ended=all_pods_ended(facts), now=now)
        return 0.0

    def defer_first_status(self, key: Key, state: JobState) -> bool:
        """Queue a job whose Job was just created behind the jobs that wait for theirs; returns False if none waits."""
        if self._queue.is_burst:
            now = asyncio.get_running_loop().time()
            state.first_status_due = now + FIRST_STATUS_DEFER_SECONDS
            state.pending.created_at = now
            self._queue.add_after(key, FIRST_STATUS_RECHECK_SECONDS)
        elif len(self._queue):
            self._queue.add(key)
        else:
            return False
        return True

    def is_first_status_deferred(self, key: Key, state: JobState | None) -> bool:
        """Whether a reconcile can be skipped: nothing but the first pods can be new, and the burst goes on or they are missing."""
        if state is None or state.first_status_due is None:
            return False
        now, entry = asyncio.get_running_loop().time(), self._cache.get(key)
        job = entry.finetunejob
        same = job is not None and not job.is_deleting and (job.uid, job.generation) == (state.uid, state.generation)
        can_wait = self._queue.is_burst or not entry.pods
        if not same or not can_wait or now >= state.first_status_due:
            state.first_status_due = None
            return False
        self._queue.add_after(key, min(FIRST_STATUS_RECHECK_SECONDS, state.first_status_due - now))
        return True

    def drop(self, uid: str) -> None:
        """Drop what is kept about a job that no longer exists."""
        self._recorder.commit(uid)

    def _record_metrics(self, facts: Facts, old: FineTuneJobStatus, new: FineTuneJobStatus, plan: Plan) -> None:
        if plan.attempt_end is not None:
            self._metrics.attempts_ended.labels(plan.attempt_end.reason.value).inc()
            record = next((one for one in new.attempts if one.number == facts.attempt), None)
            if record is not None and record.last_step:
                self._metrics.steps_done.inc(max(0, record.last_step - (record.resumed_from_step or 0)))
        lost = {one.number: one.steps_lost for one in old.attempts}
        for one in new.attempts:
            if one.steps_lost and not lost.get(one.number):
                self._metrics.steps_lost.inc(one.steps_lost)
        if plan.finish is not None:
            self._metrics.jobs_finished.labels(plan.finish.outcome.value).inc()
            logger.info("%s: %s", plan.finish.outcome.value, plan.finish.reason)
        quota, had = new.condition(Kind.QUOTA_RESERVED), old.condition(Kind.QUOTA_RESERVED)
        if quota is not None and had is not None and (had.status, quota.status) == ("False", "True"):
            self._metrics.quota_wait.observe(seconds_between(had.last_transition_time, quota.last_transition_time or facts.now))
        if new.steps_done and not old.steps_done:
            self._metrics.time_to_running.observe((facts.now - facts.job.created_at).total_seconds())


def may_defer(plan: Plan, old: FineTuneJobStatus, new: FineTuneJobStatus, notes: list[Note]) -> bool:
    """Whether a transition may be written together with the next one.

    It must not end anything or need an event, and no step may be done. Running time is written at once: the deadline
    is computed from it.
    """
    needs_event = any(note.reason not in START_EVENTS for note in notes)
    ends = plan.situation is not Situation.ACTIVE or plan.termination or old.active_seconds != new.active_seconds
    return not needs_event and not new.steps_done and not ends


def status_body(job: JobObject, status: Object) -> Object:
    """The request body of a status write; the server refuses it if the job has another resourceVersion by now."""
    return {
        "apiVersion": FINETUNEJOB.api_version,
        "kind": FINETUNEJOB.kind,
        "metadata": {"name": job.name, "namespace": job.namespace, "resourceVersion": job.resource_version},
        "spec": job.spec,
        "status": status,
    }

