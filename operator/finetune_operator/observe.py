"""Step 1 of a reconcile: collects the facts about one job from the cache. The cache may lack an object that exists, so before a decision
depends on a missing object, the operator asks the API server for it."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.names import PREPARATION_ATTEMPT, Label, attempt_job_name
from finetune_api.names import Condition as ConditionType

from finetune_operator.blocking_conditions import BlockingConditionReader
from finetune_operator.cache import JobCache
from finetune_operator.facts import Facts
from finetune_operator.job_state import SPEC_NOT_NEEDED, JobState
from finetune_operator.kube import KubeClient, NotFound
from finetune_operator.objects import JOB, POD
from finetune_operator.policies.acceptance import FirstAttempt, RefusedSpec, accept, read_first_attempt
from finetune_operator.policies.choices import get_chosen_values
from finetune_operator.scrape import ProgressScraper
from finetune_operator.settings import OperatorConfig
from finetune_operator.views import FineTuneJobView, JobView, read_job, read_pod
from finetune_operator.workqueue import JobKey


class JobObserver:
    """Collects facts, and keeps the in-process state of all jobs."""

    def __init__(
        self, *, kube: KubeClient, cache: JobCache, scraper: ProgressScraper, blocking_condition_reader: BlockingConditionReader, config: OperatorConfig
    ):
        self._kube, self._cache, self._scraper = kube, cache, scraper
        self._blocking_reader, self._config = blocking_condition_reader, config
        self.states: dict[JobKey, JobState] = {}

    async def observe(self, key: JobKey) -> Facts | None:
        """Return the facts about a job, or None if the job does not exist. Errors: KubeError."""
        facts = self._read_facts_from_cache(key)
        for read in (self._read_job, self._read_pods, self._read_blocking_events):
            if facts is None or facts.is_finished or facts.job.is_deleting:
                return facts
            # The cache may change during each read. For example, the job may be deleted or replaced.
            if await read(key, facts):
                facts = self._read_facts_from_cache(key)
        return facts

    def _read_facts_from_cache(self, key: JobKey) -> Facts | None:
        cached_objects = self._cache.get(key)
        job = cached_objects.finetunejob
        if job is None:
            return None
        has_job = any(view.is_owned and view.owner_uid == job.uid and view.attempt > 0 for view in cached_objects.jobs.values())
        state = self._update_state(key, job, has_job=has_job)
        facts = Facts(
            job=job,
            acceptance=state.acceptance,
            now=self._kube.clock.now(),
            config=self._config,
            jobs=tuple(cached_objects.jobs.values()),
            pods=tuple(cached_objects.pods.values()),
            crd_has_preparation_field=not state.crd_lacks_preparation_field,
            blocking_condition=state.event_read.blocking_condition,
            preparation_report=self._scraper.last_report(key, job.uid, PREPARATION_ATTEMPT),
        )
        last_report = self._scraper.last_report(key, job.uid, facts.attempt)
        return replace(facts, last_report=last_report) if last_report else facts

    def _update_state(self, key: JobKey, job: FineTuneJobView, *, has_job: bool) -> JobState:
        state = self.states.get(key)
        if state is None or state.uid != job.uid:
            state = self.states[key] = JobState(job.uid)
        is_finished = job.status.is_true(ConditionType.FINISHED)
        # If an older CRD lacks a field of the spec, the API server removes the field. The spec then changes, but the generation does not.
        choices = get_chosen_values(job.status.plan)
        spec_changed = (state.generation, state.spec, state.choices) != (job.generation, job.spec, choices)
        state.generation, state.spec, state.choices = job.generation, job.spec, choices
        # If the operator stopped just after it created the first Job, the status lacks the attempt. The job has started nevertheless, so
        # the rules for new jobs do not apply.
        first_attempt = read_first_attempt(job.status) or (FirstAttempt() if has_job else None)
        was_refused_as_new = isinstance(state.acceptance, RefusedSpec) and state.acceptance.is_final and first_attempt is not None
        # If a user emptied the status of a finished job, the job starts again, and its spec is needed again.
        if spec_changed or ((was_refused_as_new or state.acceptance is SPEC_NOT_NEEDED) and not is_finished):
            state.acceptance = SPEC_NOT_NEEDED if is_finished else accept(
                job.spec, self._config, first_attempt, namespace=job.namespace, was_accepted=job.status.is_true(ConditionType.ACCEPTED), choices=choices
            )  # fmt: skip
        return state

    async def _read_job(self, key: JobKey, facts: Facts) -> bool:
        """Read the Job of a running attempt from the API server if the cache lacks it. Returns whether a request was sent."""
        record = facts.attempt_record
        is_running = record is not None and record.start_time is not None and record.end_time is None
        if facts.current_job is not None or not is_running:
            return False
        try:
            body = await self._kube.get(JOB, key.namespace, attempt_job_name(key.name, facts.attempt))
        except NotFound:
            return True
        view = read_job(body)
        if view is not None:
            self._cache.put_job(view)
        return True

    async def _read_pods(self, key: JobKey, facts: Facts) -> bool:
        """Read the pods of a finished Job from the API server if the cache does not show their end. Returns whether a request was sent."""
        job = find_finished_job_with_unfinished_pods(facts)
        if job is None:
            return False
        selector = f"{Label.JOB_UID}={facts.job.uid},{Label.ATTEMPT}={job.attempt}"
        listing = await self._kube.list(POD, key.namespace, label_selector=selector)
        listed_uids = set()
        for body in listing.items:
            view = read_pod(body)
            if view is not None:
                listed_uids.add(view.uid)
                self._cache.put_pod(view)
        for pod in facts.owned_pods:
            if pod.attempt == job.attempt and pod.uid not in listed_uids and not pod.is_deleted:
                self._cache.mark_pod_deleted(pod)
        return True

    async def _read_blocking_events(self, key: JobKey, facts: Facts) -> bool:
        return await self._blocking_reader.read(key, facts, self.states[key].event_read)

    def drop_state(self, key: JobKey) -> JobState | None:
        """Drop and return the in-process state of a deleted job. Returns None if there is none."""
        self._blocking_reader.release(key)
        return self.states.pop(key, None)

    def release_resources_of_finished_job(self, key: JobKey) -> None:
        """Release what a finished job no longer needs: its resolved spec, the JSON of its status, and its reservation in the rate limiter."""
        self._blocking_reader.release(key)
        self.states[key].stored_status = None
        self.states[key].acceptance = SPEC_NOT_NEEDED


def find_finished_job_with_unfinished_pods(facts: Facts) -> JobView | None:
    """Return the current Job (of the attempt or of the preparation) if it is finished, but the cache does not show the end of all its pods."""
    candidates = ((facts.current_job, facts.newest_pods, facts.pod_count), (facts.preparation_job, facts.preparation_pods, 1))
    for job, pods, pod_count in candidates:
        if job is not None and job.is_finished and (len(pods) < pod_count or any(not pod.is_finished for pod in pods)):
            return job
    return None
