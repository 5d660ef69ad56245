"""One look at one job, in four steps: observe, decide, act, report.

Whatever happened since the last look, the same facts lead to the same end. A look that fails is repeated with a growing pause; a
look that changed something is followed by another at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from finetune_api.names import Condition as Kind
from finetune_api.names import Label, Reason, attempt_job_name
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

from finetune_operator import logs
from finetune_operator.act import Actor, StaleFacts
from finetune_operator.cache import Cache
from finetune_operator.decide import decide
from finetune_operator.events import Note, Recorder, transitions
from finetune_operator.facts import Facts
from finetune_operator.killpoints import Point, reach
from finetune_operator.kube import Conflict, Forbidden, Invalid, Kube, KubeError, NamespaceTerminating, NotFound
from finetune_operator.lease import LeaseLost
from finetune_operator.metrics import Metrics
from finetune_operator.objects import CORE_EVENT, FINETUNEJOB, JOB, POD, Object
from finetune_operator.pace import LATEST, Pace, Turns, Untold
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.acceptance import Accepted, Refused, accept
from finetune_operator.policies.blocking import (
    BlockingCondition,
    blocking_condition_of_events,
    blocking_condition_of_pods,
)
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.report import report
from finetune_operator.scrape import Scraper, Target
from finetune_operator.settings import OperatorConfig
from finetune_operator.text import clean
from finetune_operator.views import JobObject, read_finetunejob, read_job, read_pod
from finetune_operator.workqueue import Key, WorkQueue

logger = logging.getLogger(__name__)

NO_PODS_AFTER, STUCK_AFTER = 10.0, 20.0
"""Age in seconds of a Job without pods, and time since a pod got its node and does not run, at which events about it are read."""
FIRST_READ, LONGEST_READ = 15.0, 300.0
"""Seconds between two reads of those events; it doubles, and jobs take turns, since the server goes through all of a namespace's for each."""
REST, REST_STEP = LATEST, 1.0
"""Seconds that a job whose Job was just made may have to wait with its first status while new jobs rush in, and how often it asks."""
BEGINNING = (Reason.ACCEPTED, Reason.ATTEMPT_STARTED)
"""Events that may wait for the status of a new job."""
RETRY_OBSTACLE = 15.0
"""Seconds after which a refused create is tried again."""
UNREAD = Accepted(FineTuneJobSpec())
"""Stands for the spec of a finished job: nobody reads it any more."""


@dataclass
class Memory:
    """What a job's looks remember; nothing in here is needed to be right, only to be sparing."""

    uid: str = ""
    generation: int = 0
    acceptance: Accepted | Refused = UNREAD
    obstacle: BlockingCondition | None = None
    obstacle_due: float | None = None
    """When events are to be read next, in loop time; None: nothing waits."""
    obstacle_pause: float = FIRST_READ
    untold: Untold = field(default_factory=Untold)
    rest_until: float | None = None
    """Until when the first status may wait for a rush to be over, in loop time."""


class Reconciler:
    """Looks at jobs. One instance a process; safe for several workers, since the queue keeps a key to one of them."""

    def __init__(
        self, *, kube: Kube, cache: Cache, queue: WorkQueue, recorder: Recorder, scraper: Scraper, metrics: Metrics,
        config: OperatorConfig,
    ):  # fmt: skip
        self._kube, self._cache, self._queue = kube, cache, queue
        self._recorder, self._scraper, self._metrics = recorder, scraper, metrics
        self._config = config
        self._actor = Actor(kube, config)
        self._pace, self._reads = Pace(config.progress_seconds), Turns()
        self._memories: dict[Key, Memory] = {}
        self._count = 0

    async def work(self) -> None:
        """Take keys from the queue until cancelled."""
        while True:
            key, waited = await self._queue.take()
            self._metrics.queue_wait.observe(waited)
            started = asyncio.get_running_loop().time()
            result = "error"
            try:
                result = await self._look(key)
            finally:
                self._queue.done(key)
                self._metrics.reconcile_seconds.labels(result).observe(asyncio.get_running_loop().time() - started)
            # A look that asked nothing of the server did not let go of the event loop, and there may be a thousand of them.
            await asyncio.sleep(0)

    async def _look(self, key: Key) -> str:
        """One look, its errors turned into another one."""
        self._count += 1
        logs.job.set(str(key))
        logs.attempt.set(0)
        logs.reconcile.set(self._count)
        if self._rests(key):
            return "ok"
        try:
            await self.reconcile(key)
        except LeaseLost:
            raise
        except (Conflict, StaleFacts, NotFound) as error:
            if isinstance(error, NotFound) and error.kind is FINETUNEJOB and error.object_missing:
                self._bury(key)
                return "gone"
            logger.debug("what was known is old: %s", error)
            self._queue.failed(key)
            return "stale"
        except NamespaceTerminating as error:
            # The FineTuneJob goes with it, and its deletion is an event: there is nothing to try again for.
            logger.info("nothing is started in a namespace that goes: %s", error)
            self._scraper.stop(key)
        except KubeError as error:
            logger.warning("again in %.1f s: %s", self._queue.failed(key), error)
            return "unavailable"
        except Exception:
            # One job that cannot be handled must not stop the others; it is tried again, ever more rarely.
            logger.exception("again in %.1f s", self._queue.failed(key))
            return "error"
        self._queue.forget(key)
        return "ok"

    async def reconcile(self, key: Key) -> None:
        """Observe, decide, act, report."""
        facts = await self._observe(key)
        if facts is None:
            self._forget(key)
            return
        logs.attempt.set(facts.job.status.attempt or 0)
        plan = decide(facts)
        acted = ActionResult()
        if plan.termination is None:
            try:
                acted = await self._actor.act(facts, plan)
            except Invalid as error:
                self._refuse(key, facts, error)
                return
        if acted.created_job is not None:
            self._cache.put_job(acted.created_job)
            logger.info("created Job %s", acted.created_job.name)
        for warning in acted.warnings:
            logger.warning("the API server warns: %s", warning)
        if acted.created_job is not None and self._others_first(key):
            return
        await self._report(key, facts, plan, acted)
        self._follow(key, facts, plan, acted)

    def _others_first(self, key: Key) -> bool:
        """Whether others wait for their Jobs: those come before what there is to tell of this one, whose next look finds its Job."""
        if self._queue.rush:
            memory, now = self._memories[key], asyncio.get_running_loop().time()
            memory.rest_until, memory.untold.begun = now + REST, now
            self._queue.add_after(key, REST_STEP)
        elif len(self._queue):
            self._queue.add(key)
        else:
            return False
        return True

    def _rests(self, key: Key) -> bool:
        """Whether there can be no more to see than the first pods of a Job made in a rush, and the rush goes on or they are not there."""
        memory, job = self._memories.get(key), self._cache.get(key).finetunejob
        if memory is None or memory.rest_until is None:
            return False
        now = asyncio.get_running_loop().time()
        same = job is not None and not job.is_deleting and (job.uid, job.generation) == (memory.uid, memory.generation)
        busy = self._queue.rush or not self._cache.get(key).pods
        if not same or not busy or now >= memory.rest_until:
            memory.rest_until = None
            return False
        self._queue.add_after(key, min(REST_STEP, memory.rest_until - now))
        return True

    # Observe

    async def _observe(self, key: Key) -> Facts | None:
        """Facts from the cache, read live where a decision would stand on something's absence; None: there is no such job."""
        facts = self._known(key)
        for read in (self._read_job, self._read_pods, self._read_obstacle):
            if facts is None or facts.is_finished or facts.job.is_deleting:
                return facts
            # While it is read the world goes on: the job may be another one, or gone, when the answer is there.
            if await read(key, facts):
                facts = self._known(key)
        return facts

    def _known(self, key: Key) -> Facts | None:
        """What the cache, the scraper and this process' memory say now."""
        entry = self._cache.get(key)
        job = entry.finetunejob
        if job is None:
            return None
        memory = self._memory(key, job)
        facts = Facts(
            job=job,
            acceptance=memory.acceptance,
            now=self._kube.clock.now(),
            config=self._config,
            jobs=tuple(entry.jobs.values()),
            pods=tuple(entry.pods.values()),
            blocking=memory.obstacle,
        )
        heard = self._scraper.heard(key, job.uid, facts.attempt)
        return replace(facts, last_report=heard) if heard else facts

    def _memory(self, key: Key, job: JobObject) -> Memory:
        memory = self._memories.get(key)
        if memory is None or memory.uid != job.uid:
            memory = self._memories[key] = Memory(job.uid)
        over = job.status.holds(Kind.FINISHED)
        # A status that somebody emptied makes a finished job a new one, whose spec must be read again.
        if memory.generation != job.generation or (memory.acceptance is UNREAD and not over):
            memory.generation = job.generation
            memory.acceptance = UNREAD if over else accept(job.spec, self._config, _kept(job.status))
        return memory

    async def _read_job(self, key: Key, facts: Facts) -> bool:
        """Read the Job that status says there is, if the cache has none. True: it was read."""
        record = facts.attempt_record
        begun = record is not None and record.start_time is not None and record.end_time is None
        if facts.current_job is not None or not begun:
            return False
        try:
            body = await self._kube.get(JOB, key.namespace, attempt_job_name(key.name, facts.attempt))
        except NotFound:
            return True
        view = read_job(body)
        if view is not None:
            self._cache.put_job(view)
        return True

    def _pods_behind(self, facts: Facts) -> bool:
        """The Job is over and not all of its pods are, as far as the cache knows: their events are still under way."""
        current = facts.current_job
        if current is None or not current.is_finished:
            return False
        pods = facts.newest_pods
        return len(pods) < facts.nodes or any(not pod.is_finished for pod in pods)

    async def _read_pods(self, key: Key, facts: Facts) -> bool:
        """Read the pods of an attempt that is over if they are behind. True: they were read."""
        if not self._pods_behind(facts):
            return False
        selector = f"{Label.UID}={facts.job.uid},{Label.ATTEMPT}={facts.attempt}"
        listing = await self._kube.list(POD, key.namespace, labels=selector)
        seen = set()
        for body in listing.items:
            view = read_pod(body)
            if view is not None:
                seen.add(view.uid)
                self._cache.put_pod(view)
        for pod in facts.attempt_pods:
            if pod.uid not in seen and not pod.is_deleted:
                self._cache.mark_pod_deleted(pod)
        return True

    async def _read_obstacle(self, key: Key, facts: Facts) -> bool:
        """Read what the cluster says about pods that do not come up. True: the answer changed."""
        memory = self._memories[key]
        waits = _pods_missing(facts)
        if waits is None:
            changed = memory.obstacle is not None
            memory.obstacle, memory.obstacle_due, memory.obstacle_pause = None, None, FIRST_READ
            self._reads.leave(key)
            return changed
        uid, since, patience = waits
        now = asyncio.get_running_loop().time()
        if memory.obstacle_due is None:
            memory.obstacle_due = now + max(0.0, patience - seconds_between(since, facts.now))
        if now >= memory.obstacle_due and key not in self._reads:
            memory.obstacle_due = self._reads.book(key, now)
        if now < memory.obstacle_due:
            return False
        memory.obstacle_due = now + memory.obstacle_pause
        memory.obstacle_pause = min(2 * memory.obstacle_pause, LONGEST_READ)
        try:
            listing = await self._kube.list(
                CORE_EVENT, key.namespace, fields=f"involvedObject.uid={uid},type=Warning"
            )
        except Forbidden as error:
            logger.info("events cannot be read: %s", error)
            return False
        finally:
            self._reads.leave(key)
            self._reads.took(now, asyncio.get_running_loop().time())
        found = blocking_condition_of_events(listing.items)
        changed = found != memory.obstacle
        memory.obstacle = found
        return changed

    # Report

    def _refuse(self, key: Key, facts: Facts, error: Invalid) -> None:
        """The API server does not accept what was made from the spec: only another spec can mend it."""
        logger.warning("the Job is refused: %s", error)
        message = clean(f"the API server refuses what was made from the spec: {error.message}")
        self._memories[key].acceptance = Refused(Reason.REJECTED, message, spec=facts.spec)
        self._queue.add(key)

    async def _report(self, key: Key, facts: Facts, plan: Plan, acted: ActionResult) -> None:
        """Tell what happened and write the status, if it changed."""
        old, new = facts.job.status, report(facts, plan, acted)
        before, after = old.to_wire(), new.to_wire()
        untold = self._memories[key].untold
        now = asyncio.get_running_loop().time()
        if before == after:
            untold.news = None
            return
        notes, wait = transitions(old, new), 0.0
        if transition(before) == transition(after):
            wait = self._pace.figures(untold, now, 0.0 if new.steps_done else LATEST)
        elif _may_wait(plan, old, new, notes):
            wait = self._pace.transition(untold, pods_over=_all_ended(facts), now=now)
        if wait > 0:
            self._queue.add_after(key, wait)
            return
        await self._recorder.tell(facts.job, notes)
        reach(Point.BEFORE_STATUS_WRITE)
        written = await self._kube.replace(FINETUNEJOB, key.namespace, _status_body(facts.job, after), subresource="status")
        reach(Point.AFTER_STATUS_WRITE)
        # Counted from when it was heard, not from when its turn came: otherwise a burst's delay would stay in every later write.
        self._pace.written(untold, now - (seconds_between(facts.last_report.time, facts.now) if facts.last_report else 0.0))
        self._cache.put_finetunejob(read_finetunejob(written))
        self._recorder.settle(facts.job.uid)
        self._count_transitions(facts, old, new, plan)

    def _count_transitions(self, facts: Facts, old: FineTuneJobStatus, new: FineTuneJobStatus, plan: Plan) -> None:
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

    def _follow(self, key: Key, facts: Facts, plan: Plan, acted: ActionResult) -> None:
        """What has to happen before anything else happens: scraping, another look, a look in time."""
        if plan.scrape_pod is not None:
            pod = plan.scrape_pod
            url = self._scraper.url(pod.namespace, pod.name, pod.ip)
            self._scraper.watch(key, Target(facts.job.uid, facts.attempt, pod.uid, url))
        elif plan.situation in (Situation.FINISHED, Situation.SUSPENDED, Situation.DELETING):
            self._scraper.forget(key)
            self._reads.leave(key)
            self._cache.drop_deleted_pods(key, before_attempt=facts.attempt + 1)
            if plan.situation is Situation.FINISHED:
                self._memories[key].acceptance = UNREAD
        else:
            self._scraper.stop(key)
        if plan.termination is not None or plan.attempt_end is not None or plan.finish is not None:
            self._queue.add(key)
        elif acted.blocking is not None:
            self._queue.add_after(key, RETRY_OBSTACLE)
        due = self._memories[key].obstacle_due
        if due is not None:
            self._queue.add_after(key, max(0.05, due - asyncio.get_running_loop().time()))
        if plan.situation is Situation.STARTING:
            self._cache.drop_deleted_pods(key, before_attempt=facts.attempt)
        if plan.reconcile_at is not None:
            self._queue.add_after(key, _seconds_until(plan.reconcile_at, facts.now))

    def _bury(self, key: Key) -> None:
        """The server says that the job is gone, and no watch has told yet: nothing more is done for it."""
        memory = self._memories.get(key)
        if memory is not None:
            self._cache.drop_finetunejob(key, memory.uid)
        self._queue.forget(key)
        self._forget(key)

    def _forget(self, key: Key) -> None:
        memory = self._memories.pop(key, None)
        if memory is not None:
            self._recorder.settle(memory.uid)
        self._reads.leave(key)
        self._scraper.forget(key)


def _pods_missing(facts: Facts) -> tuple[str, datetime, float] | None:
    """What to ask about (uid), since when it waits, and how long it may; None: all pods are there and on their way.

    A pod without a node tells by itself what the scheduler thinks; one with a node tells of images and references, and only
    volumes that do not come are told by events alone.
    """
    current = facts.current_job
    if current is None or current.is_suspended or current.is_finished or current.is_deleting or facts.termination_reason is not None:
        return None
    if _all_ended(facts):
        return None
    if len(facts.active_pods) < facts.nodes:
        return current.uid, current.started_at or current.created_at, NO_PODS_AFTER
    stuck = [pod for pod in facts.active_pods if pod.phase == "Pending" and pod.node and not blocking_condition_of_pods([pod])]
    return (stuck[0].uid, stuck[0].scheduled_at or stuck[0].created_at, STUCK_AFTER) if stuck else None


def _may_wait(plan: Plan, old: FineTuneJobStatus, new: FineTuneJobStatus, notes: list[Note]) -> bool:
    """Whether what happened may be told with what happens next: nothing ends, nobody is to hear of it, and no step is done yet.

    What is done next may stand on what is written: that a stretch of running time ended, or that pods were ready for a while.
    """
    quiet = all(note.reason in BEGINNING for note in notes)
    ends = plan.situation is not Situation.ACTIVE or plan.termination or old.active_seconds != new.active_seconds
    return quiet and not new.steps_done and not ends


def _all_ended(facts: Facts) -> bool:
    """Every rank's pod ended and is still there, and the Job, which counts them, does not say so yet."""
    current, pods = facts.current_job, facts.newest_pods
    running = current is not None and not current.is_suspended and not current.is_finished
    return running and len(pods) == facts.nodes and all(pod.is_finished and not pod.is_deleted for pod in pods)


def _kept(status: FineTuneJobStatus) -> Mapping[str, Any]:
    """The defaults that a job began with; none before its first attempt."""
    return (status.resolved.defaults if status.attempts and status.resolved else None) or {}


def _seconds_until(moment: datetime, now: datetime) -> float:
    """At least a little: a time that has passed by the server's clock must not become a hot loop."""
    return max(0.05, (moment - now).total_seconds() + 0.01)


def _status_body(job: JobObject, status: Object) -> Object:
    return {
        "apiVersion": FINETUNEJOB.api_version,
        "kind": FINETUNEJOB.kind,
        "metadata": {"name": job.name, "namespace": job.namespace, "resourceVersion": job.resource_version},
        "spec": job.spec,
        "status": status,
    }


HARD = (
    "observedGeneration", "phase", "attempt", "restarts", "retriesUsed", "activeSeconds", "output", "failure", "adaptations",
    "startTime", "completionTime",
)  # fmt: skip
"""Status fields whose change is a transition."""


def transition(status: Object) -> Object:
    """The part of a status whose change is written at once; everything else waits its turn."""
    return {
        **{name: status.get(name) for name in HARD},
        "conditions": [(c["type"], c["status"], c.get("reason")) for c in status.get("conditions", [])],
        "attempts": [(a["number"], a.get("reason"), a.get("endTime")) for a in status.get("attempts", [])],
        "committed": bool(status.get("latestCheckpoint")),
    }
