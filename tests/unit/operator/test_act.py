"""How the operator carries out a plan: it compares its cache with the API server before an attempt, and handles existing objects and rejected Jobs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from finetune_api.errors import ConfigError
from finetune_api.names import MANAGER_NAME, Label, Reason
from finetune_operator import act as act_module
from finetune_operator.act import PlanExecutor, SpecRejected, StaleFacts
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.kube import Forbidden, Invalid, KubeClient, KubeError, OutcomeUnknown
from finetune_operator.objects import FINETUNEJOB, JOB, POD, SERVICE, Kind, Object
from finetune_operator.plan import ActionResult, Plan, Situation
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.policies.rejection import find_rejected_user_fields
from finetune_operator.policies.verdict import RefusedSpec
from finetune_operator.views import JobView

from tests.unit.operator.fake_cluster import FakeApiServer, OperatorProcess, new_server
from tests.unit.operator.samples import CONFIG, T0, UID, at, facts, finetunejob, job, pod, spec, status
from tests.unit.operator.virtual import run

SUSPENDED_ATTEMPT = {"number": 1, "startTime": T0.isoformat(), "endTime": T0.isoformat(), "reason": "Suspended"}
SECOND_ATTEMPT_STATUS = status(attempt=2, attempts=[SUSPENDED_ATTEMPT])


def copy_as_response(body: Object) -> Object:
    """Return a copy of the object that was encoded as JSON and decoded, like a response. The copy shares no Python object with the original."""
    return cast("Object", json.loads(json.dumps(body)))


@pytest.fixture
def server() -> FakeApiServer:
    """A server with a FineTuneJob whose second attempt must be created next."""
    api_server = new_server()
    api_server.put(FINETUNEJOB, copy_as_response({**api_server.finetunejob, "status": SECOND_ATTEMPT_STATUS.to_wire()}))
    return api_server


def plan_second_attempt(**fields: Any) -> tuple[Facts, Plan]:
    job_facts = facts(status=SECOND_ATTEMPT_STATUS, jobs=[job(1, failed_at=T0)], now=at(100), **fields)
    plan = decide(job_facts)
    assert plan.attempt_to_create == 2
    return job_facts, plan


async def carry_out(server: FakeApiServer, job_facts: Facts, plan: Plan) -> ActionResult:
    return await PlanExecutor(cast("KubeClient", server), CONFIG).act(job_facts, plan)


# Deletions


@dataclass
class RecordingServer(FakeApiServer):
    """A server that records the name, uid and grace period of each deletion."""

    deletions: list[tuple[str, str, int | None]] = field(default_factory=list)

    async def delete(self, kind: Kind, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None) -> bool:
        """Record the request and delete the object."""
        self.deletions.append((name, uid, grace_seconds))
        return await super().delete(kind, namespace, name, uid=uid, grace_seconds=grace_seconds)


DELETED_JOBS = (job(1, name="job-a", uid="1"), job(1, name="job-b", uid="2"))
DELETED_PODS = (pod(name="pod-a", uid="3"), pod(name="pod-b", uid="4"))
LOST_PODS = (pod(name="lost-a", uid="5"), pod(name="lost-b", uid="6"))


@pytest.mark.parametrize("attempt_to_create", [None, 1])
@pytest.mark.parametrize(("missing_names", "count"), [((), 6), (("job-b", "pod-b", "lost-b"), 3), (("job-a", "pod-a"), 4), (("lost-a",), 5)])
async def test_planned_objects_are_deleted_by_uid_and_counted_if_they_existed(
    missing_names: tuple[str, ...], count: int, attempt_to_create: int | None
) -> None:
    """Only pods of lost nodes are deleted without a grace period."""
    server = RecordingServer(new_server().objects)
    for kind, views in ((JOB, DELETED_JOBS), (POD, DELETED_PODS + LOST_PODS)):
        for view in views:
            if view.name not in missing_names:
                server.put(kind, {"metadata": {"name": view.name}})
    plan = Plan(
        Situation.STARTING, attempt_to_create=attempt_to_create, jobs_to_delete=DELETED_JOBS, pods_to_delete=DELETED_PODS, pods_to_force_delete=LOST_PODS
    )
    result = await carry_out(server, facts(), plan)
    assert (result.deleted_count, result.created_job is not None) == (count, attempt_to_create is not None)
    deletions_with_grace_period = [(view.name, view.uid, None) for view in (*DELETED_JOBS, *DELETED_PODS)]
    assert server.deletions == [*deletions_with_grace_period, *((view.name, view.uid, 0) for view in LOST_PODS)]


# Before a later attempt


async def test_second_attempt_is_created_if_the_facts_match_the_server(server: FakeApiServer) -> None:
    result = await carry_out(server, *plan_second_attempt())
    assert result.created_job is not None and result.created_job.name == "run-2"


@pytest.mark.parametrize(
    "changed_fields",
    [
        {"metadata": {"uid": "another"}},
        {"metadata": {"uid": "0"}},
        {"metadata": {"generation": 2}},
        {"metadata": {"generation": 0}},
        {"metadata": {"deletionTimestamp": "2026-11-21T12:00:00Z"}},
        {"spec": {"suspend": True}},
        {"spec": {"cancel": True}},
        {"status": {"attempt": 3}},
        {"status": {"attempt": 1}},
    ],
    ids=["other uid", "lower uid", "newer spec", "older spec", "deleting", "suspended", "cancelled", "later attempt", "earlier attempt"],
)
async def test_second_attempt_is_not_created_if_the_facts_differ_from_the_server(server: FakeApiServer, changed_fields: dict[str, Object]) -> None:
    """The API server has stored a change that is not in the operator's cache, because the watch has not delivered the change yet."""
    body = server.finetunejob
    server.put(FINETUNEJOB, {**body, **{part: {**body[part], **new_values} for part, new_values in changed_fields.items()}})
    with pytest.raises(StaleFacts):
        await carry_out(server, *plan_second_attempt())
    assert (JOB.plural, "run-2") not in server.objects


def make_pod_body(phase: str, uid: str = UID, attempt: int = 1) -> Object:
    labels = {Label.MANAGED_BY.value: MANAGER_NAME, Label.JOB_NAME.value: "run", Label.JOB_UID.value: uid, Label.ATTEMPT.value: str(attempt)}
    meta = {"name": "run-1-0-x", "namespace": "team", "labels": labels}
    return {"metadata": meta, "status": {"phase": phase}}


@pytest.mark.parametrize("phase", ["Pending", "Running"])
async def test_second_attempt_waits_for_a_pod_that_the_cache_lacks(server: FakeApiServer, phase: str) -> None:
    """The Job that created the pod was deleted, so the operator can find the pod only by its label."""
    server.put(POD, make_pod_body(phase))
    with pytest.raises(StaleFacts, match="run-1-0-x"):
        await carry_out(server, *plan_second_attempt())
    assert (JOB.plural, "run-2") not in server.objects


@pytest.mark.parametrize("body", [make_pod_body("Failed"), make_pod_body("Running", uid="another")], ids=["finished", "other job"])
async def test_second_attempt_does_not_wait_for_finished_pods_or_pods_of_other_jobs(server: FakeApiServer, body: Object) -> None:
    server.put(POD, body)
    assert (await carry_out(server, *plan_second_attempt())).created_job is not None


async def test_warnings_of_the_api_server_about_a_new_job_are_returned(server: FakeApiServer) -> None:
    server.warnings = ("violates a policy",)
    assert (await carry_out(server, *plan_second_attempt())).warnings == ("violates a policy",)


# Objects that exist already


def plan_first_attempt(raw_spec: Object | None = None) -> tuple[Facts, Plan]:
    job_facts = facts(spec=raw_spec)
    return job_facts, decide(job_facts)


async def put_existing_job(server: FakeApiServer, uid: str) -> None:
    """Store a Job that has the name of the first attempt's Job and whose owner has this uid."""
    result = await carry_out(server, *plan_first_attempt())
    assert result.created_job is not None
    body = server.objects[JOB.plural, "run-1"]
    owners = [{**owner, "uid": uid} for owner in body["metadata"]["ownerReferences"]]
    server.put(JOB, copy_as_response({**body, "metadata": {**body["metadata"], "ownerReferences": owners}}))


async def test_existing_own_job_is_adopted(server: FakeApiServer) -> None:
    """The Job exists because the response to the first create request was lost, and the operator sends the request again."""
    await put_existing_job(server, UID)
    result = await carry_out(server, *plan_first_attempt())
    assert result.created_job is not None and result.blocking_condition is None


@pytest.mark.parametrize("uid", ["another", "0"])
@pytest.mark.parametrize("metadata", [{}, {"ownerReferences": []}, {"ownerReferences": [], "labels": {}}], ids=["other owner", "only labels", "nothing"])
async def test_job_of_another_owner_is_not_adopted(server: FakeApiServer, uid: str, metadata: Object) -> None:
    await put_existing_job(server, uid)
    body = server.objects[JOB.plural, "run-1"]
    server.put(JOB, {**body, "metadata": {**body["metadata"], **metadata}})
    conflict = BlockingCondition(Reason.CHILDREN_CONFLICT, "Job run-1 exists and belongs to another object")
    assert await carry_out(server, *plan_first_attempt()) == ActionResult(blocking_condition=conflict)


@pytest.mark.parametrize(("owner", "is_adopted"), [("uid-run-1", True), ("another", False), ("zzz", False)])
async def test_service_is_adopted_only_if_the_job_owns_it(server: FakeApiServer, owner: str, is_adopted: bool) -> None:
    server.put(SERVICE, {"metadata": {"name": "run-1", "namespace": "team", "ownerReferences": [{"uid": owner}]}})
    result = await carry_out(server, *plan_first_attempt(spec(resources={"nodes": 2, "gpusPerNode": 0})))
    assert result.created_job is not None
    assert (result.blocking_condition is None) is is_adopted
    assert is_adopted or (result.blocking_condition is not None and result.blocking_condition.reason is Reason.CHILDREN_CONFLICT)


# The Service of a gang

GANG = spec(resources={"nodes": 2, "gpusPerNode": 0})


@pytest.mark.parametrize(
    ("current_job", "service_count"),
    [
        (job(pod_count=1), 0),
        (job(pod_count=2), 1),
        (job(pod_count=2, failed_at=T0), 0),
        (job(pod_count=2, completed_at=T0), 0),
        (job(pod_count=2, is_deleting=True), 0),
        (None, 0),
    ],
    ids=["one pod", "two pods", "failed", "completed", "being deleted", "no Job"],
)
async def test_only_a_running_job_with_several_pods_gets_a_service(server: FakeApiServer, current_job: JobView | None, service_count: int) -> None:
    job_facts = facts(spec=GANG, jobs=[current_job] if current_job else [])
    assert await carry_out(server, job_facts, Plan(Situation.ACTIVE)) == ActionResult()
    assert server.requests == [("create", SERVICE.plural)] * service_count


@pytest.mark.parametrize("nodes", [1, 2, 3])
async def test_first_attempt_is_created_at_once_with_a_service_for_several_pods(server: FakeApiServer, nodes: int) -> None:
    """The operator compares its cache with the API server only before later attempts."""
    await carry_out(server, *plan_first_attempt(spec(resources={"nodes": nodes, "gpusPerNode": 0})))
    assert server.requests == [("create", JOB.plural), ("create", SERVICE.plural)][: 1 + (nodes > 1)]


def test_service_is_checked_again_after_the_resync_interval() -> None:
    """For each Job, the operator records separately when it last found the Service of this Job."""

    async def check() -> None:
        server, create_counts = new_server(), []
        executor = PlanExecutor(cast("KubeClient", server), CONFIG)
        for wait_seconds, uid in ((0, "a"), (1, "b"), (0, "a"), (298, "a"), (1, "b"), (0, "a"), (1, "b"), (299, "b"), (0, "a"), (1, "b"), (0, "a")):
            await asyncio.sleep(wait_seconds)
            job_facts = facts(spec=GANG, jobs=[job(pod_count=2, uid=uid, name="run-1")])
            server.objects.pop((SERVICE.plural, "run-1"), None)
            await executor.act(job_facts, Plan(Situation.ACTIVE))
            create_counts.append(server.count("create", SERVICE))
        assert create_counts == [1, 2, 2, 2, 2, 3, 4, 4, 5, 6, 6]

    assert CONFIG.resync_seconds == 300
    run(check())


@pytest.mark.parametrize("error", [Forbidden, Invalid])
async def test_refused_service_is_a_blocking_condition_and_is_created_later(server: FakeApiServer, error: type[KubeError]) -> None:
    executor, job_facts = PlanExecutor(cast("KubeClient", server), CONFIG), facts(spec=GANG, jobs=[job(pod_count=2)])
    server.before_request = make_refusing_hook("create", SERVICE, error, "exceeded quota: services")
    message = "the API server refused to create Service run-1: exceeded quota: services"
    refused_result = ActionResult(blocking_condition=BlockingCondition(Reason.QUOTA_EXCEEDED, message))
    assert [await executor.act(job_facts, Plan(Situation.ACTIVE)) for _ in range(2)] == [refused_result, refused_result]
    server.before_request = lambda verb, kind: None
    assert await executor.act(job_facts, Plan(Situation.ACTIVE)) == ActionResult()
    assert (SERVICE.plural, "run-1") in server.objects


# Jobs that the API server rejects


def make_refusing_hook(verb: str, kind: Kind, error: type[KubeError], message: str, code: int = 403) -> Any:
    """Return a function that raises `error` for all requests with this verb and kind."""

    def refuse_request(request_verb: str, request_kind: Kind) -> None:
        if (request_verb, request_kind) == (verb, kind):
            raise error(verb, kind, "run-1", code, "", message)

    return refuse_request


ADMISSION_MESSAGE = 'admission webhook "policy" denied the request: spec.template.labels: Invalid value: "red green"'


@pytest.mark.parametrize("error", [Forbidden, Invalid, OutcomeUnknown])
async def test_refusal_of_a_job_by_an_admission_policy_is_a_blocking_condition(server: FakeApiServer, error: type[KubeError]) -> None:
    """The message of the policy has the form of an API error about the user's label, but the label is not the cause of the refusal."""
    server.before_request = make_refusing_hook("create", JOB, error, ADMISSION_MESSAGE)
    job_facts, plan = plan_first_attempt()
    result = await carry_out(server, replace_accepted_spec(SPEC_WITH_INVALID_LABEL, job_facts), plan)
    message = f"the API server refused to create Job run-1: {ADMISSION_MESSAGE}"
    assert result == ActionResult(blocking_condition=BlockingCondition(Reason.FORBIDDEN_BY_POLICY, message))


async def test_job_is_adopted_if_the_answer_to_its_create_was_lost(server: FakeApiServer) -> None:
    await put_existing_job(server, UID)
    server.before_request = make_refusing_hook("create", JOB, OutcomeUnknown, "no answer", 0)
    result = await carry_out(server, *plan_first_attempt())
    assert result.created_job is not None and result.created_job.name == "run-1"


async def test_create_without_an_answer_is_an_error_if_the_job_does_not_exist(server: FakeApiServer) -> None:
    server.before_request = make_refusing_hook("create", JOB, OutcomeUnknown, "no answer", 0)
    with pytest.raises(OutcomeUnknown, match="no answer"):
        await carry_out(server, *plan_first_attempt())

PLATFORM_ERROR = 'Job.batch "run-1" is invalid: spec.template.spec.containers[0].env[9].name: Invalid value: "a b": a valid name'
USER_ERROR = 'Job.batch "run-1" is invalid: spec.template.labels: Invalid value: "red green": a valid label must be'
SPEC_WITH_INVALID_LABEL = spec(placement={"labels": {"color": "red green"}})


def replace_accepted_spec(raw_spec: Object, job_facts: Facts) -> Facts:
    """Return the facts with this spec as an already accepted spec, although the operator would refuse a new job with this spec."""
    return replace(job_facts, job=finetunejob(raw_spec, job_facts.job.status))


@pytest.mark.parametrize("code", [400, 422])
async def test_finetunejob_waits_if_platform_values_make_its_job_invalid(server: FakeApiServer, code: int) -> None:
    """Only the platform team can correct the chart's values; the user's job must not fail."""
    server.before_request = make_refusing_hook("create", JOB, Invalid, PLATFORM_ERROR, code)
    process = OperatorProcess(server)
    server.put(FINETUNEJOB, {**server.finetunejob, "status": {}})
    process.refresh()
    await process.work()
    ready = server.condition("PodsReady")
    assert (ready["reason"], server.finetunejob["status"]["phase"]) == (Reason.JOB_REJECTED, "Pending")
    assert "env[9].name" in ready["message"]
    assert process.queue.seconds_until_due() is not None


async def test_spec_is_rejected_if_the_users_value_makes_the_first_job_invalid(server: FakeApiServer) -> None:
    server.before_request = make_refusing_hook("create", JOB, Invalid, USER_ERROR, 422)
    job_facts, plan = plan_first_attempt()
    with pytest.raises(SpecRejected) as caught:
        await carry_out(server, replace_accepted_spec(SPEC_WITH_INVALID_LABEL, job_facts), plan)
    assert caught.value.refusal.is_final
    assert "spec.placement.labels" in caught.value.refusal.message


async def test_finetunejob_waits_if_a_later_job_is_invalid(server: FakeApiServer) -> None:
    """The Job of the first attempt had the same spec, and the API server accepted it. So the spec is not the cause of the refusal."""
    server.before_request = make_refusing_hook("create", JOB, Invalid, USER_ERROR, 422)
    job_facts, plan = plan_second_attempt()
    result = await carry_out(server, replace_accepted_spec(SPEC_WITH_INVALID_LABEL, job_facts), plan)
    assert result.blocking_condition is not None and result.blocking_condition.reason is Reason.JOB_REJECTED


async def test_unusable_value_rejects_the_first_attempt_and_blocks_later_ones(
    server: FakeApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hint in ("write pvc://claim/path", None):

        def fail(*args: Any, error: Exception = ConfigError("SourceInvalid", "`..` is not allowed", hint=hint), **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(act_module, "build_job", fail)
        for (job_facts, plan), is_final in ((plan_first_attempt(), True), (plan_second_attempt(), False)):
            with pytest.raises(SpecRejected) as caught:
                await carry_out(server, job_facts, plan)
            assert caught.value.refusal == RefusedSpec(Reason.REJECTED, "`..` is not allowed", hint or "", is_final, job_facts.spec)


async def test_rejected_spec_fails_with_its_message_in_status(server: FakeApiServer) -> None:
    server.put(FINETUNEJOB, {**server.finetunejob, "spec": SPEC_WITH_INVALID_LABEL, "status": {}})
    await OperatorProcess(server).work()
    new_status = server.finetunejob["status"]
    assert (new_status["phase"], new_status["failure"]["class"]) == ("Failed", "User")
    assert "spec.placement.labels.color" in new_status["failure"]["message"]


@pytest.mark.parametrize(
    ("message", "placement", "fields"),
    [
        ('spec.template.labels: Invalid value: "b c": x', {"labels": {"a": "b c"}}, ["spec.placement.labels"]),
        ('spec.template.labels: Invalid value: "b c": x', {"labels": {"a": "d"}}, []),
        ('spec.template.labels: Invalid value: "b c": x', {}, []),
        ("spec.template.spec.tolerations[0].operator: Invalid value: core.Toleration{}: x", {"tolerations": [{"key": "a"}]}, ["spec.placement.tolerations"]),
        ("spec.template.spec.priority: Invalid value", {"labels": {"a": "b"}}, []),
        (
            '[spec.template.spec.nodeSelector: Invalid value: "x y": z, spec.priority: Required value]',
            {"nodeSelector": {"a": "x y"}}, ["spec.placement.nodeSelector"],
        ),
    ],
)  # fmt: skip
def test_rejected_fields_are_traced_to_the_users_spec(message: str, placement: Object, fields: list[str]) -> None:
    assert find_rejected_user_fields(f'Job.batch "run-1" is invalid: {message}', spec(placement=placement)) == fields
