"""Carries out a plan: creates and deletes objects. Each step can safely run twice, because names are deterministic and each delete request has
the object's uid as precondition. An existing object is used only if this FineTuneJob owns it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from finetune_api.compatibility import read_spec
from finetune_api.errors import FineTuneError
from finetune_api.names import PREPARATION_ATTEMPT, Label, Reason, attempt_job_name, make_preparation_job_name
from finetune_api.pod import RunConfig

from finetune_operator.attempt_secrets import AttemptSecrets
from finetune_operator.builders.isolation import build_attempt_secret, build_network_policy
from finetune_operator.builders.job import build_job, build_preparation_job, build_service
from finetune_operator.builders.run_config import ON_EXISTING_RESULT_FIELD, build_run_config, convert_to_preparation_run
from finetune_operator.facts import Facts
from finetune_operator.killpoints import KillPoint, kill_if_requested
from finetune_operator.kube import AlreadyExists, Forbidden, Invalid, KubeClient, KubeError, NotFound, OutcomeUnknown
from finetune_operator.objects import FINETUNEJOB, JOB, NETWORK_POLICY, POD, SECRET, SERVICE, Kind, Object
from finetune_operator.plan import ActionResult, Plan
from finetune_operator.policies.adaptations import get_original_values
from finetune_operator.policies.blocking import BlockingCondition, choose_refusal_reason, is_admission_refusal
from finetune_operator.policies.choices import list_pools_to_choose
from finetune_operator.policies.rejection import find_rejected_user_fields
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
    """Raised when no Job can be created from the user's spec."""

    def __init__(self, refusal: RefusedSpec):
        super().__init__(refusal.message)
        self.refusal = refusal


class PlanExecutor:
    """Carries out plans against one API server."""

    def __init__(self, kube: KubeClient, config: OperatorConfig, secrets: AttemptSecrets | None = None):
        self._kube = kube
        self._config = config
        self._secrets = secrets or AttemptSecrets(config.isolation)
        self._children_seen_at: dict[str, float] = {}
        """Event loop time at which the operator last found or created the objects that belong to a Job. The key is the Job's uid."""

    async def act(self, facts: Facts, plan: Plan) -> ActionResult:
        """Delete the objects that the plan lists, then create the Job that it requests. Errors: KubeError, StaleFacts, SpecRejected."""
        deleted_count = 0
        for job in plan.jobs_to_delete:
            kill_if_requested(KillPoint.BEFORE_JOB_DELETE)
            deleted_count += await self._kube.delete(JOB, job.namespace, job.name, uid=job.uid)
            kill_if_requested(KillPoint.AFTER_JOB_DELETE)
        for pod in plan.pods_to_delete:
            deleted_count += await self._kube.delete(POD, pod.namespace, pod.name, uid=pod.uid)
        for pod in plan.pods_to_force_delete:
            logger.warning("force-deleting pod %s: its node is lost", pod.name)
            deleted_count += await self._kube.delete(POD, pod.namespace, pod.name, uid=pod.uid, grace_seconds=0)
            kill_if_requested(KillPoint.AFTER_POD_DELETE)
        if plan.attempt_to_create is not None:
            return await self._create_attempt(facts, plan.attempt_to_create, deleted_count)
        if plan.preparation_to_create is not None:
            preparation_result = await self._create_job(facts, 1, self._build_preparation(facts, plan.preparation_to_create), deleted_count)
            return replace(preparation_result, created_job=None, created_preparation=preparation_result.created_job)
        current_job, blocking_condition = facts.current_job or facts.preparation_job, None
        if current_job is not None and not current_job.is_finished and not current_job.is_deleting:
            blocking_condition = await self._ensure_children(current_job)
        return ActionResult(blocking_condition=blocking_condition, deleted_count=deleted_count)

    async def _create_attempt(self, facts: Facts, attempt: int, deleted_count: int) -> ActionResult:
        """Create the Job of an attempt and the objects that belong to the Job."""
        if attempt > 1:
            await self._ensure_facts_are_current(facts, attempt)
        return await self._create_job(facts, attempt, self._build_job_of_attempt(facts, attempt), deleted_count)

    async def _create_job(self, facts: Facts, attempt: int, body: Object, deleted_count: int) -> ActionResult:
        """Create a Job unless it exists, then the objects that belong to this Job. `attempt` is 1 for a preparation. Errors: KubeError, SpecRejected."""
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
                    return ActionResult(blocking_condition=_describe_refusal(error), deleted_count=deleted_count)
                raise error from None
        except Invalid as error:
            return ActionResult(blocking_condition=_describe_invalid_job(facts, attempt, error), deleted_count=deleted_count)
        except Forbidden as error:
            return ActionResult(blocking_condition=_describe_refusal(error), deleted_count=deleted_count)
        kill_if_requested(KillPoint.AFTER_JOB_CREATE)
        created_job = read_job(job_body)
        if created_job is None or not created_job.is_owned or created_job.owner_uid != facts.job.uid:
            message = f"Job {name} exists and belongs to another object"
            return ActionResult(blocking_condition=BlockingCondition(Reason.CHILDREN_CONFLICT, message), deleted_count=deleted_count)
        blocking_condition = await self._ensure_children(created_job)
        return ActionResult(created_job, blocking_condition=blocking_condition, deleted_count=deleted_count, warnings=warnings)

    async def _ensure_facts_are_current(self, facts: Facts, attempt: int) -> None:
        """Before each attempt except the first, check the facts against the API server. Errors: StaleFacts if the facts are outdated.

        The cache may be older than the API server's state. Without this check, the operator could start an attempt although the user has
        just suspended the job, or while pods of an earlier attempt still run. An attempt's pods can outlive its Job.
        """
        live_job = read_finetunejob(await self._kube.get(FINETUNEJOB, facts.job.namespace, facts.job.name))
        if live_job.uid != facts.job.uid or live_job.status.attempt != attempt or live_job.is_deleting:
            raise StaleFacts(f"the current attempt on the API server is {live_job.status.attempt}, not {attempt}")
        if live_job.generation != facts.job.generation or _read_stop_requests(live_job.spec) != _read_stop_requests(facts.job.spec):
            raise StaleFacts("the spec on the API server has changed")
        listing = await self._kube.list(POD, facts.job.namespace, label_selector=f"{Label.JOB_UID}={facts.job.uid}")
        unfinished_pod_names = [pod.name for body in listing.items if (pod := read_pod(body)) is not None and not pod.is_finished]
        if unfinished_pod_names:
            raise StaleFacts(f"pods of an earlier attempt have not ended: {', '.join(unfinished_pod_names)}")

    def _build_job_of_attempt(self, facts: Facts, attempt: int) -> Object:
        """Build the Job of an attempt. Errors: SpecRejected if a value of the spec cannot be used."""
        accepted_spec, name = _get_accepted_spec(facts), attempt_job_name(facts.job.name, attempt)
        with _reject_spec_on_error(facts, attempt):
            secret_name = self._secrets.derive_secret_name(name, facts.job.uid, attempt) if self._secrets.is_enabled else ""
            run, cache = _build_run(facts, accepted_spec, attempt), accepted_spec.spec.model.cache
            return build_job(facts.job, run, accepted_spec.pool, self._config, secret_name, model_cache=cache)

    def _build_preparation(self, facts: Facts, preparation_number: int) -> Object:
        """Build the Job of a preparation. The preparation pod gets the run configuration of the first attempt. Errors: SpecRejected as for an attempt."""
        accepted_spec, uid = _get_accepted_spec(facts), facts.job.uid
        with _reject_spec_on_error(facts, 1):
            name = make_preparation_job_name(facts.job.name, preparation_number)
            secret_name = self._secrets.derive_secret_name(name, uid, PREPARATION_ATTEMPT) if self._secrets.is_enabled else ""
            user_on_existing_result = None if ON_EXISTING_RESULT_FIELD in accepted_spec.defaults else facts.spec.policy.on_existing_result
            user_spec = read_spec(facts.job.spec)[0]
            pools = list_pools_to_choose(user_spec, accepted_spec, self._config, facts.job.namespace)
            # The first pod that mounts a volume claim can bind the claim to the zone of this pod. So the preparation pod mounts the claim only if
            # the plan cannot choose another pool.
            has_one_pool = len(pools) <= 1 or user_spec.resources.node_pool is not None
            run = convert_to_preparation_run(_build_run(facts, accepted_spec, 1), user_on_existing_result, pools)
            return build_preparation_job(
                facts.job, run, preparation_number, facts.spec.prepare.resources, accepted_spec.pool, self._config, secret_name,
                model_cache=accepted_spec.spec.model.cache if has_one_pool else None,
            )  # fmt: skip

    async def _ensure_children(self, job: JobView) -> BlockingCondition | None:
        """Create the objects of the Job that are missing. Return a blocking condition if one of them cannot be created.

        The operator does not watch the objects that belong to a Job, so it checks once per resync interval that they exist. The pods cannot start without the
        Secret, so the Secret is created after the NetworkPolicy: no pod starts before the policy exists.
        """
        now = asyncio.get_running_loop().time()
        if now - self._children_seen_at.get(job.uid, float("-inf")) < self._config.resync_seconds:
            return None
        isolation = self._config.isolation
        children: list[tuple[Kind, Object]] = []
        if isolation.network_policy and job.network_policy_name:
            children.append((NETWORK_POLICY, build_network_policy(job, isolation)))
        if self._secrets.is_enabled and job.attempt_secret_name:
            is_preparation = job.attempt == PREPARATION_ATTEMPT
            signing_key = self._secrets.derive_prepared_rows_key(job.namespace) if is_preparation else self._secrets.derive_checkpoint_key(job.owner_uid)
            children.append((SECRET, build_attempt_secret(job, self._secrets.derive_secret(job.owner_uid, job.attempt), signing_key)))
        if job.pod_count > 1:
            children.append((SERVICE, build_service(job)))
        for kind, body in children:
            blocking_condition = await self._ensure_child(job, kind, body)
            if blocking_condition is not None:
                return blocking_condition
        self._children_seen_at = {uid: seen_at for uid, seen_at in self._children_seen_at.items() if now - seen_at < self._config.resync_seconds}
        self._children_seen_at[job.uid] = now
        return None

    async def _ensure_child(self, job: JobView, kind: Kind, body: Object) -> BlockingCondition | None:
        kill_if_requested(KillPoint.BEFORE_CHILD_CREATE)
        name = body["metadata"]["name"]
        try:
            await self._kube.create(kind, job.namespace, body)
            kill_if_requested(KillPoint.AFTER_CHILD_CREATE)
        except AlreadyExists:
            if kind is SECRET:
                # The operator may not read this Secret. The digits in its name come from the operator's key, so it is the right Secret.
                return None
            existing_object = await self._kube.get(kind, job.namespace, name)
            owners = existing_object["metadata"].get("ownerReferences") or []
            if not any(owner.get("uid") == job.uid for owner in owners):
                return BlockingCondition(Reason.CHILDREN_CONFLICT, f"{kind.kind} {name} exists and belongs to another object: {_EFFECT_ON_PODS[kind.kind]}")
        except (Forbidden, Invalid) as error:
            return _describe_refusal(error)
        return None


def _get_accepted_spec(facts: Facts) -> AcceptedSpec:
    assert isinstance(facts.acceptance, AcceptedSpec)  # noqa: S101 -- `decide` requests Jobs only for accepted specs
    return facts.acceptance


def _build_run(facts: Facts, accepted_spec: AcceptedSpec, attempt: int) -> RunConfig:
    return build_run_config(
        facts.job, facts.spec, attempt, defaults=accepted_spec.defaults,
        committed_step=facts.newest_committed_step, max_step=facts.max_start_step, rolled_back_attempt=facts.rolled_back_attempt,
        choices=accepted_spec.choices, before_adaptation=get_original_values(accepted_spec.spec, facts.job.status.adaptations),
    )  # fmt: skip


@contextmanager
def _reject_spec_on_error(facts: Facts, attempt: int) -> Iterator[None]:
    """Convert a FineTuneError to SpecRejected. The refusal is final if `attempt` is 1."""
    try:
        yield
    except FineTuneError as error:
        refusal = RefusedSpec(Reason.REJECTED, clean(error.message), clean(error.hint or ""), attempt == 1, facts.spec)
        raise SpecRejected(refusal) from error


_EFFECT_ON_PODS = {
    SERVICE.kind: "the pods cannot find each other",
    NETWORK_POLICY.kind: "the pods would not be protected from other pods",
}
"""What happens to the pods if another object owns the Service or the NetworkPolicy. The keys are the kinds of these two objects."""


class _StopRequests(NamedTuple):
    """Whether the user's spec requests to suspend or to cancel the job."""

    suspends: bool
    cancels: bool


def _read_stop_requests(spec: Object) -> _StopRequests:
    return _StopRequests(suspends=spec.get("suspend") is True, cancels=spec.get("cancel") is True)


def _describe_invalid_job(facts: Facts, attempt: int, error: Invalid) -> BlockingCondition:
    """Return the blocking condition for a Job that the API server found invalid.

    Errors: SpecRejected if a value that the user wrote makes the Job of the first attempt invalid. If the Job of a later attempt is
    invalid, the spec is not the cause, because the API server accepted the Job of the first attempt.
    """
    if is_admission_refusal(error.message):
        return _describe_refusal(error)
    fields = find_rejected_user_fields(error.message, facts.job.spec)
    if attempt == 1 and fields:
        message = f"the API server rejects the Job because of {', '.join(fields)}: {error.message}"
        raise SpecRejected(RefusedSpec(Reason.REJECTED, clean(message), spec=facts.spec))
    message = f"the API server rejects the Job, probably because of the operator's configuration: {error.message}"
    return BlockingCondition(Reason.JOB_REJECTED, clean(message))


def _describe_refusal(error: KubeError) -> BlockingCondition:
    message = f"the API server refused to create {error.kind.kind} {error.name}: {error.message}"
    return BlockingCondition(choose_refusal_reason(error.message), clean(message))
