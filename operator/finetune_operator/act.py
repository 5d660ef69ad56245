"""Carries out a plan. Every step can be repeated: names are deterministic, and each delete request has the object's uid as precondition.
An existing object is used only if this FineTuneJob owns it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from finetune_api.errors import FineTuneError
from finetune_api.names import Label, Reason
from finetune_api.pod import RunConfig

from finetune_operator.builders.job import build_job, build_preparation_job, build_service
from finetune_operator.builders.run_config import build_run_config
from finetune_operator.facts import Facts
from finetune_operator.killpoints import KillPoint, kill_if_requested
from finetune_operator.kube import AlreadyExists, Forbidden, Invalid, KubeClient, KubeError, NotFound, OutcomeUnknown
from finetune_operator.objects import FINETUNEJOB, JOB, POD, SERVICE, Object
from finetune_operator.plan import ActionResult, Plan
from finetune_operator.policies.adaptations import original_values
from finetune_operator.policies.blocking import BlockingCondition, is_admission_refusal, reason_of_refusal
from finetune_operator.policies.rejection import rejected_user_fields
from finetune_operator.policies.verdict import AcceptedSpec, RefusedSpec
from finetune_operator.settings import OperatorConfig
from finetune_operator.text import clean
from finetune_operator.views import JobView, read_finetunejob, read_job, read_pod

logger = logging.getLogger(__name__)


class StaleFacts(Exception):
    """Raised when the objects on the API server have changed since the operator read them.

    The reconcile is repeated after the cache has received the newer state.
    """


class SpecRejected(Exception):
    """No Job can be created from the user's spec."""

    def __init__(self, refusal: RefusedSpec):
        super().__init__(refusal.message)
        self.refusal = refusal


class PlanExecutor:
    """Carries out plans against one API server."""

    def __init__(self, kube: KubeClient, config: OperatorConfig):
        self._kube = kube
        self._config = config
        self._service_seen_at: dict[str, float] = {}
        """When the operator last found or created a Job's Service (event loop time), by uid of the Job."""

    async def act(self, facts: Facts, plan: Plan) -> ActionResult:
        """Delete the plan's objects, then create the Job that it requests. Errors: KubeError, StaleFacts (reconcile again), SpecRejected."""
        deleted_count = 0
        for job in plan.delete_jobs:
            kill_if_requested(KillPoint.BEFORE_JOB_DELETE)
            deleted_count += await self._kube.delete(JOB, job.namespace, job.name, uid=job.uid)
            kill_if_requested(KillPoint.AFTER_JOB_DELETE)
        for pod in plan.delete_pods:
            deleted_count += await self._kube.delete(POD, pod.namespace, pod.name, uid=pod.uid)
        for pod in plan.force_delete_pods:
            logger.warning("force-deleting pod %s: its node is lost", pod.name)
            deleted_count += await self._kube.delete(POD, pod.namespace, pod.name, uid=pod.uid, grace_seconds=0)
            kill_if_requested(KillPoint.AFTER_POD_DELETE)
        if plan.create_attempt is not None:
            return await self._create_attempt(facts, plan.create_attempt, deleted_count)
        if plan.create_preparation is not None:
            result = await self._create_job(facts, 1, _build_preparation(facts, plan.create_preparation, self._config), deleted_count)
            return replace(result, created_job=None, created_preparation=result.created_job)
        current_job, blocking_condition = facts.current_job, None
        if current_job is not None and facts.nodes > 1 and not current_job.is_finished and not current_job.is_deleting:
            blocking_condition = await self._ensure_service(current_job)
        return ActionResult(blocking_condition=blocking_condition, deleted_count=deleted_count)

    async def _create_attempt(self, facts: Facts, attempt: int, deleted_count: int) -> ActionResult:
        """Create the Job of an attempt and its Service."""
        if attempt > 1:
            await self._ensure_facts_are_current(facts, attempt)
        result = await self._create_job(facts, attempt, _build_job_of_attempt(facts, attempt, self._config), deleted_count)
        if result.created_job is None or facts.nodes == 1:
            return result
        return replace(result, blocking_condition=await self._ensure_service(result.created_job))

    async def _create_job(self, facts: Facts, attempt: int, body: Object, deleted_count: int) -> ActionResult:
        """Create a Job unless it exists. `attempt`: number of the attempt; 1 for a preparation. Errors: KubeError, SpecRejected."""
        name = body["metadata"]["name"]
        kill_if_requested(KillPoint.BEFORE_JOB_CREATE)
        warnings: tuple[str, ...] = ()
        try:
            response = await self._kube.create(JOB, facts.job.namespace, body)
            job_body, warnings = response.body, response.warnings
        except (AlreadyExists, OutcomeUnknown) as error:
            try:
                job_body = await self._kube.get(JOB, facts.job.namespace, name)
            except NotFound:
                if is_admission_refusal(error.message):
                    return ActionResult(blocking_condition=_blocked_by_refusal(error), deleted_count=deleted_count)
                raise error from None
        except Invalid as error:
            return ActionResult(blocking_condition=_blocked_by_invalid_job(facts, attempt, error), deleted_count=deleted_count)
        except Forbidden as error:
            return ActionResult(blocking_condition=_blocked_by_refusal(error), deleted_count=deleted_count)
        kill_if_requested(KillPoint.AFTER_JOB_CREATE)
        created_job = read_job(job_body)
        if created_job is None or not created_job.is_owned or created_job.owner_uid != facts.job.uid:
            message = f"Job {name} exists and belongs to another object"
            return ActionResult(blocking_condition=BlockingCondition(Reason.CHILDREN_CONFLICT, message), deleted_count=deleted_count)
        return ActionResult(created_job, deleted_count=deleted_count, warnings=warnings)

    async def _ensure_facts_are_current(self, facts: Facts, attempt: int) -> None:
        """Compare the facts with the API server before creating any attempt after the first. Errors: StaleFacts.

        The cache may be older than the API server's state. Without this check, the operator could start an attempt although the user has
        just suspended the job, or while pods of an earlier attempt still run. An attempt's pods can outlive its Job.
        """
        live_job = read_finetunejob(await self._kube.get(FINETUNEJOB, facts.job.namespace, facts.job.name))
        if live_job.uid != facts.job.uid or live_job.status.attempt != attempt or live_job.is_deleting:
            raise StaleFacts(f"the current attempt on the API server is {live_job.status.attempt}, not {attempt}")
        if live_job.generation != facts.job.generation or _stop_requests(live_job.spec) != _stop_requests(facts.job.spec):
            raise StaleFacts("the spec on the API server has changed")
        listing = await self._kube.list(POD, facts.job.namespace, labels=f"{Label.JOB_UID}={facts.job.uid}")
        running_pods = [pod.name for body in listing.items if (pod := read_pod(body)) is not None and not pod.is_finished]
        if running_pods:
            raise StaleFacts(f"pods of an earlier attempt still run: {', '.join(running_pods)}")

    async def _ensure_service(self, job: JobView) -> BlockingCondition | None:
        """Create the Job's Service if it is missing. Return a blocking condition if the Service cannot be created.

        The operator does not watch Services, so it checks once per resync interval that the Service exists.
        """
        now = asyncio.get_running_loop().time()
        if now - self._service_seen_at.get(job.uid, float("-inf")) < self._config.resync_seconds:
            return None
        kill_if_requested(KillPoint.BEFORE_SERVICE_CREATE)
        try:
            await self._kube.create(SERVICE, job.namespace, build_service(job))
            kill_if_requested(KillPoint.AFTER_SERVICE_CREATE)
        except AlreadyExists:
            existing_service = await self._kube.get(SERVICE, job.namespace, job.name)
            owners = existing_service["metadata"].get("ownerReferences") or []
            if not any(owner.get("uid") == job.uid for owner in owners):
                message = f"Service {job.name} exists and belongs to another object: the pods cannot find each other"
                return BlockingCondition(Reason.CHILDREN_CONFLICT, message)
        except (Forbidden, Invalid) as error:
            return _blocked_by_refusal(error)
        self._service_seen_at = {uid: at for uid, at in self._service_seen_at.items() if now - at < self._config.resync_seconds}
        self._service_seen_at[job.uid] = now
        return None


def _build_job_of_attempt(facts: Facts, attempt: int, config: OperatorConfig) -> Object:
    """Build the Job of an attempt. Errors: SpecRejected if a value of the spec cannot be used."""
    accepted_spec = _accepted_spec(facts)
    with _spec_rejected_on_error(facts, attempt):
        return build_job(facts.job, _build_run(facts, accepted_spec, attempt), accepted_spec.pool, config)


def _build_preparation(facts: Facts, number: int, config: OperatorConfig) -> Object:
    """Build the Job of a preparation. Its pod gets the run configuration of the first attempt. Errors: SpecRejected."""
    with _spec_rejected_on_error(facts, 1):
        return build_preparation_job(facts.job, _build_run(facts, _accepted_spec(facts), 1), number, facts.spec.prepare.resources, config)


def _accepted_spec(facts: Facts) -> AcceptedSpec:
    assert isinstance(facts.acceptance, AcceptedSpec)  # noqa: S101 -- `decide` creates Jobs of accepted specs only
    return facts.acceptance


def _build_run(facts: Facts, accepted_spec: AcceptedSpec, attempt: int) -> RunConfig:
    return build_run_config(
        facts.job, facts.spec, attempt, defaults=accepted_spec.defaults,
        committed_step=facts.newest_committed_step, max_step=facts.max_start_step, rolled_back_attempt=facts.rolled_back_attempt,
        before_adaptation=original_values(accepted_spec.spec, facts.job.status.adaptations),
    )  # fmt: skip


@contextmanager
def _spec_rejected_on_error(facts: Facts, attempt: int) -> Iterator[None]:
    """Convert a FineTuneError to SpecRejected. The refusal is final if it concerns the first attempt."""
    try:
        yield
    except FineTuneError as error:
        refusal = RefusedSpec(Reason.REJECTED, clean(error.message), clean(error.hint or ""), attempt == 1, facts.spec)
        raise SpecRejected(refusal) from error


def _stop_requests(spec: Object) -> tuple[bool, bool]:
    return spec.get("suspend") is True, spec.get("cancel") is True


def _blocked_by_invalid_job(facts: Facts, attempt: int, error: Invalid) -> BlockingCondition:
    """Return the blocking condition for a Job that the API server found invalid.

    Errors: SpecRejected if a value that the user wrote makes the Job of the first attempt invalid. If the Job of a later attempt is
    invalid, the spec is not the cause, because the API server accepted the Job of the first attempt.
    """
    if is_admission_refusal(error.message):
        return _blocked_by_refusal(error)
    fields = rejected_user_fields(error.message, facts.job.spec)
    if attempt == 1 and fields:
        message = f"the API server rejects the Job because of {', '.join(fields)}: {error.message}"
        raise SpecRejected(RefusedSpec(Reason.REJECTED, clean(message), spec=facts.spec))
    message = f"the API server rejects the Job, probably because of the operator's configuration: {error.message}"
    return BlockingCondition(Reason.JOB_REJECTED, clean(message))


def _blocked_by_refusal(error: KubeError) -> BlockingCondition:
    message = f"the API server refused to create {error.kind.kind} {error.name}: {error.message}"
    return BlockingCondition(reason_of_refusal(error.message), clean(message))
