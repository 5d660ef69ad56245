"""Reconciles jobs in four steps: 1. observe, 2. decide, 3. act, 4. report.

The result depends only on the facts, not on the events that led to them. A failed reconcile is repeated after a growing pause. If a
reconcile writes a decision to the status, the next reconcile starts at once and carries out the decision.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime

from finetune_api.names import PREPARATION_ATTEMPT

from finetune_operator import logs
from finetune_operator.act import PlanExecutor, SpecRejected, StaleFacts
from finetune_operator.attempt_secrets import AttemptSecrets
from finetune_operator.blocking_conditions import BlockingConditionReader
from finetune_operator.cache import JobCache
from finetune_operator.deadlines import find_waiting_start
from finetune_operator.decide import decide
from finetune_operator.events import EventRecorder
from finetune_operator.facts import Facts
from finetune_operator.kube import Conflict, KubeClient, KubeError, NamespaceTerminating, NotFound
from finetune_operator.lease import LeaseLost
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB
from finetune_operator.observe import JobObserver
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.retry import compute_blocked_retry_seconds
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.scrape import ProgressScraper, ScrapeTarget
from finetune_operator.settings import OperatorConfig
from finetune_operator.status_writer import StatusWriter
from finetune_operator.views import JobView
from finetune_operator.workqueue import JobKey, WorkQueue

logger = logging.getLogger(__name__)

MIN_WAKE_SECONDS = 0.05
"""Shortest delay until a scheduled reconcile. Without this limit, a scheduled time in the past would cause a busy loop."""


class Reconciler:
    """Reconciles jobs. All workers can share one instance, because the queue gives a key to only one worker at a time."""

    def __init__(
        self, *, kube: KubeClient, cache: JobCache, queue: WorkQueue, recorder: EventRecorder, scraper: ProgressScraper, metrics: Metrics,
        config: OperatorConfig, secrets: AttemptSecrets | None = None,
    ):  # fmt: skip
        self._cache, self._queue, self._scraper, self._metrics = cache, queue, scraper, metrics
        self._blocking_reader = BlockingConditionReader(kube)
        self._observer = JobObserver(kube=kube, cache=cache, scraper=scraper, blocking_condition_reader=self._blocking_reader, config=config)
        self._secrets = secrets or AttemptSecrets(config.isolation)
        self._executor = PlanExecutor(kube, config, self._secrets)
        self._writer = StatusWriter(
            kube=kube, cache=cache, queue=queue, recorder=recorder, metrics=metrics, progress_seconds=config.progress_seconds
        )
        self._reconcile_count = 0

    async def work(self) -> None:
        """Take keys from the queue and reconcile their jobs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            key, waited_seconds = await self._queue.take()
            self._metrics.queue_wait.observe(waited_seconds)
            started_at, result_label = loop.time(), "error"
            try:
                result_label = await self.reconcile_one(key)
            finally:
                self._queue.done(key)
                self._metrics.reconcile_seconds.labels(result_label).observe(loop.time() - started_at)
            # A reconcile without a request never yields to the event loop. Without this line, other tasks could not run before all queued keys are done.
            await asyncio.sleep(0)

    async def reconcile_one(self, key: JobKey) -> str:
        """Reconcile one job once. After an error, queue its key again. Returns the value of the metric label `result`."""
        self._reconcile_count += 1
        logs.current_job.set(str(key))
        logs.current_attempt.set(0)
        logs.reconcile_number.set(self._reconcile_count)
        if self._writer.is_first_status_deferred(key, self._observer.states.get(key)):
            return "ok"
        try:
            await self.reconcile(key)
        except LeaseLost:
            raise
        except (Conflict, StaleFacts, NotFound) as error:
            if isinstance(error, NotFound) and error.kind is FINETUNEJOB and error.is_object_missing:
                self._drop_deleted_job(key)
                return "gone"
            logger.debug("the cached state is out of date: %s", error)
            self._queue.add_after_failure(key)
            return "stale"
        except NamespaceTerminating as error:
            # The FineTuneJob is deleted together with its namespace, and the watch then reports the deletion.
            logger.info("the namespace is terminating; no Job is created: %s", error)
            self._scraper.stop(key)
        except KubeError as error:
            logger.warning("retrying in %.1f s: %s", self._queue.add_after_failure(key), error)
            return "unavailable"
        except Exception:
            # If one job triggers a bug in the operator, the other jobs must continue.
            logger.exception("retrying in %.1f s", self._queue.add_after_failure(key))
            return "error"
        self._queue.reset_failures(key)
        return "ok"

    async def reconcile(self, key: JobKey) -> None:
        """Carry out the four steps, then schedule scraping and the next reconcile. Errors: KubeError, StaleFacts."""
        # 1. Observe
        facts = await self._observer.observe(key)
        if facts is None:
            self._drop_state(key)
            return
        logs.current_attempt.set(facts.job.status.attempt or 0)
        # 2. Decide
        plan = decide(facts)
        # 3. Act. If the plan ends the attempt, this decision is first written to the status, so this reconcile does not act.
        result = ActionResult()
        if plan.termination is None:
            try:
                result = await self._executor.act(facts, plan)
            except SpecRejected as error:
                logger.warning("no Job can be created from the spec: %s", error)
                self._observer.states[key].acceptance = error.refusal
                self._queue.add(key)
                return
        if result.created_preparation is not None:
            self._cache_created_job(result.created_preparation, result)
        if result.created_job is not None and self._record_created(key, result):
            return
        # 4. Report
        await self._writer.write(key, facts, plan, result, self._observer.states[key])
        self._schedule_next(key, facts, plan, result)

    def _record_created(self, key: JobKey, result: ActionResult) -> bool:
        """Put the created Job into the cache. Returns whether the job's first status is deferred because other FineTuneJobs still wait for their Jobs."""
        assert result.created_job is not None  # noqa: S101 -- the caller checks
        self._cache_created_job(result.created_job, result)
        return self._writer.defer_first_status(key, self._observer.states[key])

    def _cache_created_job(self, job: JobView, result: ActionResult) -> None:
        self._cache.put_job(job)
        logger.info("created Job %s", job.name)
        for warning in result.warnings:
            logger.warning("API server warning: %s", warning)

    def _schedule_next(self, key: JobKey, facts: Facts, plan: Plan, result: ActionResult) -> None:
        """Start or stop reading the job's progress reports, and queue the next reconcile."""
        self._schedule_scrape(key, facts, plan)
        if plan.writes_decision:
            self._queue.add(key)
        elif result.blocking_condition is not None:
            blocked_seconds = seconds_between(find_waiting_start(facts), facts.now)
            self._queue.add_after(key, compute_blocked_retry_seconds(blocked_seconds))
        due_at = self._observer.states[key].event_read.due_at
        if due_at is not None:
            self._queue.add_after(key, max(MIN_WAKE_SECONDS, due_at - asyncio.get_running_loop().time()))
        if plan.reconcile_at is not None:
            self._queue.add_after(key, seconds_until(plan.reconcile_at, facts.now))

    def _schedule_scrape(self, key: JobKey, facts: Facts, plan: Plan) -> None:
        if plan.pod_to_scrape is not None:
            pod = plan.pod_to_scrape
            url = self._scraper.build_progress_url(pod.namespace, pod.name, pod.ip)
            attempt = PREPARATION_ATTEMPT if plan.situation is Situation.PREPARING else facts.attempt
            token = self._secrets.derive_progress_token(facts.job.uid, attempt)
            self._scraper.watch(key, ScrapeTarget(facts.job.uid, attempt, pod.uid, url, token))
        elif plan.situation in (Situation.FINISHED, Situation.SUSPENDED, Situation.DELETING):
            self._scraper.drop(key)
            self._blocking_reader.release(key)
            self._cache.drop_deleted_pods(key, before_attempt=facts.attempt + 1)
            if plan.situation is Situation.FINISHED:
                self._observer.release_resources_of_finished_job(key)
        else:
            self._scraper.stop(key)
        if plan.situation is Situation.STARTING:
            self._cache.drop_deleted_pods(key, before_attempt=facts.attempt)

    def _drop_deleted_job(self, key: JobKey) -> None:
        """Drop a deleted job from the cache before the watch reports the deletion."""
        state = self._observer.states.get(key)
        if state is not None:
            self._cache.drop_finetunejob(key, state.uid)
        self._queue.reset_failures(key)
        self._drop_state(key)

    def _drop_state(self, key: JobKey) -> None:
        state = self._observer.drop_state(key)
        if state is not None:
            self._writer.drop_state(state.uid)
        self._scraper.drop(key)


def seconds_until(moment: datetime, now: datetime) -> float:
    """Return the seconds until `moment`, but at least `MIN_WAKE_SECONDS`."""
    return max(MIN_WAKE_SECONDS, (moment - now).total_seconds() + 0.01)
