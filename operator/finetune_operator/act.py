"""Carrying out a plan. Every step may be repeated: names are certain, deletes carry a uid, and what exists is adopted only if
it is ours.
"""

from __future__ import annotations

import asyncio
import logging

from finetune_api.names import Reason

from finetune_operator.builders.job import build_job, build_service
from finetune_operator.builders.run_config import build_run_config
from finetune_operator.facts import Facts
from finetune_operator.killpoints import Point, reach
from finetune_operator.kube import AlreadyExists, Forbidden, Invalid, Kube, KubeError, NotFound, OutcomeUnknown
from finetune_operator.objects import FINETUNEJOB, JOB, POD, SERVICE
from finetune_operator.plan import ActionResult, Plan
from finetune_operator.policies.acceptance import Accepted
from finetune_operator.policies.adaptations import original_values
from finetune_operator.policies.blocking import BlockingCondition, is_admission_refusal, reason_of_refusal
from finetune_operator.settings import OperatorConfig
from finetune_operator.text import clean
from finetune_operator.views import JobView, read_finetunejob, read_job

logger = logging.getLogger(__name__)


class StaleFacts(Exception):
    """The cache lags behind the server; look again when it has caught up."""


class Actor:
    """Carries out plans against one API server."""

    def __init__(self, kube: Kube, config: OperatorConfig):
        self._kube = kube
        self._config = config
        self._services: dict[str, float] = {}
        """When a Job's Service was last known to exist, by the Job's uid, in loop time."""

    async def act(self, facts: Facts, plan: Plan) -> ActionResult:
        """Deletes first, then creates. Errors: KubeError and StaleFacts; the plan is made again then."""
        deleted = 0
        for job in plan.delete_jobs:
            reach(Point.BEFORE_JOB_DELETE)
            deleted += await self._kube.delete(JOB, job.namespace, job.name, uid=job.uid)
            reach(Point.AFTER_JOB_DELETE)
        for pod in plan.delete_pods:
            deleted += await self._kube.delete(POD, pod.namespace, pod.name, uid=pod.uid)
        for pod in plan.force_delete_pods:
            logger.warning("pod %s of a lost node is removed by force", pod.name)
            deleted += await self._kube.delete(POD, pod.namespace, pod.name, uid=pod.uid, grace=0)
            reach(Point.AFTER_POD_DELETE)
        if plan.create_attempt is not None:
            return await self._create(facts, plan.create_attempt, deleted)
        obstacle = None
        if facts.current_job is not None and facts.nodes > 1 and not facts.current_job.is_finished and not facts.current_job.is_deleting:
            obstacle = await self._service(facts.current_job)
        return ActionResult(blocking=obstacle, deleted_count=deleted)

    async def _create(self, facts: Facts, attempt: int, deleted: int) -> ActionResult:
        assert isinstance(facts.acceptance, Accepted)  # noqa: S101 -- decide creates only for accepted specs
        if attempt > 1:
            await self._confirm(facts, attempt)
        run = build_run_config(
            facts.job, facts.spec, attempt, defaults=facts.acceptance.defaults,
            committed_step=facts.newest_committed_step, max_step=facts.max_start_step,
            before_adaptation=original_values(facts.acceptance.spec, facts.job.status.adaptations),
        )  # fmt: skip
        body = build_job(facts.job, run, facts.acceptance.pool, self._config)
        namespace, name = facts.job.namespace, body["metadata"]["name"]
        reach(Point.BEFORE_JOB_CREATE)
        warnings: tuple[str, ...] = ()
        try:
            created = await self._kube.create(JOB, namespace, body)
            found, warnings = created.body, created.warnings
        except (AlreadyExists, OutcomeUnknown) as error:
            try:
                found = await self._kube.get(JOB, namespace, name)
            except NotFound:
                if is_admission_refusal(error.message):
                    return ActionResult(blocking=_refused(error), deleted_count=deleted)
                raise error from None
        except (Forbidden, Invalid) as error:
            if isinstance(error, Invalid) and not is_admission_refusal(error.message):
                raise
            return ActionResult(blocking=_refused(error), deleted_count=deleted)
        reach(Point.AFTER_JOB_CREATE)
        view = read_job(found)
        if view is None or not view.is_owned or view.owner_uid != facts.job.uid:
            message = f"Job {name} exists and belongs to something else"
            return ActionResult(blocking=BlockingCondition(Reason.CHILDREN_CONFLICT, message), deleted_count=deleted)
        obstacle = await self._service(view) if facts.nodes > 1 else None
        return ActionResult(view, obstacle, deleted_count=deleted, warnings=warnings)

    async def _confirm(self, facts: Facts, attempt: int) -> None:
        """A later attempt is only made of what the server itself says: a cache that lags must not revive an old one."""
        live = read_finetunejob(await self._kube.get(FINETUNEJOB, facts.job.namespace, facts.job.name))
        if live.uid != facts.job.uid or live.status.attempt != attempt or live.is_deleting:
            raise StaleFacts(f"attempt {attempt} is not what the server says ({live.status.attempt})")

    async def _service(self, job: JobView) -> BlockingCondition | None:
        """See that the Service exists, and again at every resync, since nobody watches Services. Why it cannot be, if it cannot."""
        now = asyncio.get_running_loop().time()
        if now - self._services.get(job.uid, float("-inf")) < self._config.resync_seconds:
            return None
        reach(Point.BEFORE_SERVICE_CREATE)
        try:
            await self._kube.create(SERVICE, job.namespace, build_service(job))
            reach(Point.AFTER_SERVICE_CREATE)
        except AlreadyExists:
            found = await self._kube.get(SERVICE, job.namespace, job.name)
            owners = found["metadata"].get("ownerReferences") or []
            if not any(owner.get("uid") == job.uid for owner in owners):
                message = f"Service {job.name} exists and belongs to something else: the pods cannot find each other"
                return BlockingCondition(Reason.CHILDREN_CONFLICT, message)
        except (Forbidden, Invalid) as error:
            return _refused(error)
        self._services = {uid: at for uid, at in self._services.items() if now - at < 2 * self._config.resync_seconds}
        self._services[job.uid] = now
        return None


def _refused(error: KubeError) -> BlockingCondition:
    words = f"the API server refused to create {error.kind.kind} {error.name}: {error.message}"
    return BlockingCondition(reason_of_refusal(error.message), clean(words))
