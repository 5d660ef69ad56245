"""Carrying out a plan: checks against the API server before an attempt, existing objects, and causes of rejected Jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
from finetune_api.errors import ConfigError
from finetune_api.names import MANAGER_NAME, Label, Reason
from finetune_operator import act as act_module
from finetune_operator.act import PlanExecutor, SpecRejected, StaleFacts
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.kube import Invalid, KubeClient
from finetune_operator.objects import FINETUNEJOB, JOB, POD, SERVICE, Kind, Object
from finetune_operator.plan import ActionResult, Plan
from finetune_operator.policies.rejection import rejected_user_fields

from tests.unit.operator.fake_cluster import Process, Server, new_server
from tests.unit.operator.samples import CONFIG, T0, UID, at, facts, finetunejob, job, spec, status

SUSPENDED_ATTEMPT = {"number": 1, "startTime": T0.isoformat(), "endTime": T0.isoformat(), "reason": "Suspended"}
SECOND_ATTEMPT_STATUS = status(attempt=2, attempts=[SUSPENDED_ATTEMPT])


@pytest.fixture
def server() -> Server:
    """A server whose FineTuneJob is about to start its second attempt."""
    found = new_server()
    found.put(FINETUNEJOB, {**found.finetunejob, "status": SECOND_ATTEMPT_STATUS.to_wire()})
    return found


def second_attempt(**fields: Any) -> tuple[Facts, Plan]:
    observed = facts(status=SECOND_ATTEMPT_STATUS, jobs=[job(1, failed_at=T0)], now=at(100), **fields)
    plan = decide(observed)
    assert plan.create_attempt == 2
    return observed, plan


async def carry_out(server: Server, observed: Facts, plan: Plan) -> ActionResult:
    return await PlanExecutor(cast("KubeClient", server), CONFIG).act(observed, plan)


# Before a later attempt


async def test_second_attempt_is_created_if_the_facts_match_the_server(server: Server) -> None:
    result = await carry_out(server, *second_attempt())
    assert result.created_job is not None and result.created_job.name == "run-2"


@pytest.mark.parametrize(
    "changed_parts",
    [
        {"metadata": {"uid": "another"}},
        {"metadata": {"generation": 2}},
        {"metadata": {"deletionTimestamp": "2026-11-21T12:00:00Z"}},
        {"spec": {"suspend": True}},
        {"spec": {"cancel": True}},
        {"status": {"attempt": 3}},
    ],
    ids=["other uid", "other generation", "deleting", "suspended", "cancelled", "other attempt"],
)
async def test_second_attempt_is_not_created_if_the_facts_differ_from_the_server(server: Server, changed_parts: dict[str, Object]) -> None:
    """The API server has stored a change that the watch has not delivered yet."""
    body = server.finetunejob
    server.put(FINETUNEJOB, {**body, **{part: {**body[part], **values} for part, values in changed_parts.items()}})
    with pytest.raises(StaleFacts):
        await carry_out(server, *second_attempt())
    assert (JOB.plural, "run-2") not in server.objects


def pod_body(phase: str, uid: str = UID, attempt: int = 1) -> Object:
    labels = {Label.MANAGED_BY.value: MANAGER_NAME, Label.JOB_NAME.value: "run", Label.JOB_UID.value: uid, Label.ATTEMPT.value: str(attempt)}
    meta = {"name": "run-1-0-x", "namespace": "team", "labels": labels}
    return {"metadata": meta, "status": {"phase": phase}}


@pytest.mark.parametrize("phase", ["Pending", "Running"])
async def test_second_attempt_waits_for_a_pod_that_the_cache_lacks(server: Server, phase: str) -> None:
    """The pod's Job is gone, so the operator can find the pod only by its label."""
    server.put(POD, pod_body(phase))
    with pytest.raises(StaleFacts, match="run-1-0-x"):
        await carry_out(server, *second_attempt())
    assert (JOB.plural, "run-2") not in server.objects


@pytest.mark.parametrize("body", [pod_body("Failed"), pod_body("Running", uid="another")], ids=["finished", "other job"])
async def test_second_attempt_does_not_wait_for_other_pods(server: Server, body: Object) -> None:
    server.put(POD, body)
    assert (await carry_out(server, *second_attempt())).created_job is not None


# Objects that exist already


def first_attempt(written: Object | None = None) -> tuple[Facts, Plan]:
    observed = facts(spec=written)
    return observed, decide(observed)


async def put_existing_job(server: Server, uid: str) -> None:
    """Store a Job with the first attempt's name whose controller has this uid."""
    result = await carry_out(server, *first_attempt())
    assert result.created_job is not None
    body = server.objects[JOB.plural, "run-1"]
    owners = [{**owner, "uid": uid} for owner in body["metadata"]["ownerReferences"]]
    server.put(JOB, {**body, "metadata": {**body["metadata"], "ownerReferences": owners}})


async def test_existing_own_job_is_adopted(server: Server) -> None:
    """The response to the first create was lost, so the operator creates the Job again."""
    await put_existing_job(server, UID)
    result = await carry_out(server, *first_attempt())
    assert result.created_job is not None and result.blocking_condition is None


async def test_job_of_another_owner_is_not_adopted(server: Server) -> None:
    await put_existing_job(server, "another")
    result = await carry_out(server, *first_attempt())
    assert result.created_job is None
    assert result.blocking_condition is not None and result.blocking_condition.reason is Reason.CHILDREN_CONFLICT


@pytest.mark.parametrize(("owner", "adopted"), [("uid-run-1", True), ("another", False)])
async def test_service_is_adopted_only_if_the_job_owns_it(server: Server, owner: str, adopted: bool) -> None:
    server.put(SERVICE, {"metadata": {"name": "run-1", "namespace": "team", "ownerReferences": [{"uid": owner}]}})
    result = await carry_out(server, *first_attempt(spec(resources={"nodes": 2, "gpusPerNode": 0})))
    assert result.created_job is not None
    assert (result.blocking_condition is None) is adopted
    assert adopted or (result.blocking_condition is not None and result.blocking_condition.reason is Reason.CHILDREN_CONFLICT)


# Jobs that the API server rejects

PLATFORM_ERROR = 'Job.batch "run-1" is invalid: spec.template.spec.containers[0].env[9].name: Invalid value: "a b": a valid name'
USER_ERROR = 'Job.batch "run-1" is invalid: spec.template.labels: Invalid value: "red green": a valid label must be'
SPEC_WITH_INVALID_LABEL = spec(placement={"labels": {"color": "red green"}})


def reject_jobs(message: str, code: int) -> Any:
    def before(verb: str, kind: Kind) -> None:
        if (verb, kind) == ("create", JOB):
            raise Invalid(verb, kind, "run-1", code, "Invalid", message)

    return before


def accepted_before(written: Object, observed: Facts) -> Facts:
    """Replace the spec in the facts by one that the acceptance check would refuse now."""
    return replace(observed, job=finetunejob(written, observed.job.status))


@pytest.mark.parametrize("code", [400, 422])
async def test_finetunejob_waits_if_platform_values_make_its_job_invalid(server: Server, code: int) -> None:
    """Only the platform team can correct the chart's values; the user's job must not fail."""
    server.before_request = reject_jobs(PLATFORM_ERROR, code)
    process = Process(server)
    server.put(FINETUNEJOB, {**server.finetunejob, "status": {}})
    process.refresh()
    await process.work()
    ready = server.condition("PodsReady")
    assert (ready["reason"], server.finetunejob["status"]["phase"]) == (Reason.JOB_REJECTED, "Pending")
    assert "env[9].name" in ready["message"]
    assert process.queue.seconds_until_due() is not None


async def test_spec_is_rejected_if_the_users_value_makes_the_first_job_invalid(server: Server) -> None:
    server.before_request = reject_jobs(USER_ERROR, 422)
    found, plan = first_attempt()
    with pytest.raises(SpecRejected) as caught:
        await carry_out(server, accepted_before(SPEC_WITH_INVALID_LABEL, found), plan)
    assert caught.value.refusal.is_final
    assert "spec.placement.labels" in caught.value.refusal.message


async def test_finetunejob_waits_if_a_later_job_is_invalid(server: Server) -> None:
    """The API server accepted the Job of the first attempt with the same spec, so the spec is not the cause."""
    server.before_request = reject_jobs(USER_ERROR, 422)
    found, plan = second_attempt()
    result = await carry_out(server, accepted_before(SPEC_WITH_INVALID_LABEL, found), plan)
    assert result.blocking_condition is not None and result.blocking_condition.reason is Reason.JOB_REJECTED


async def test_value_that_cannot_be_built_rejects_the_first_attempt_and_blocks_later_ones(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("SourceInvalid", "dataset.train: `..` is not allowed", hint="write pvc://claim/path")

    monkeypatch.setattr(act_module, "build_job", fail)
    for (found, plan), is_final in ((first_attempt(), True), (second_attempt(), False)):
        with pytest.raises(SpecRejected) as caught:
            await carry_out(server, found, plan)
        assert caught.value.refusal.is_final is is_final
        assert (caught.value.refusal.message, caught.value.refusal.hint) == (
            "dataset.train: `..` is not allowed", "write pvc://claim/path",
        )  # fmt: skip


async def test_rejected_spec_fails_with_its_message_in_status(server: Server) -> None:
    server.put(FINETUNEJOB, {**server.finetunejob, "spec": SPEC_WITH_INVALID_LABEL, "status": {}})
    await Process(server).work()
    written = server.finetunejob["status"]
    assert (written["phase"], written["failure"]["class"]) == ("Failed", "User")
    assert "spec.placement.labels.color" in written["failure"]["message"]


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
    assert rejected_user_fields(f'Job.batch "run-1" is invalid: {message}', spec(placement=placement)) == fields
