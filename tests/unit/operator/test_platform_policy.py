"""How the operator applies the platform's `policy`: the policy can refuse new jobs and limit their running time, but does not affect accepted jobs."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import Condition, Reason
from finetune_operator.decide import decide
from finetune_operator.objects import FINETUNEJOB, JOB, Object
from finetune_operator.plan import ActionResult, Termination
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept
from finetune_operator.report import compute_status
from finetune_operator.settings import OperatorConfig, parse_config

from tests.unit.operator.fake_cluster import KEY, FakeApiServer, OperatorProcess, new_server, start_attempt
from tests.unit.operator.samples import at, condition, facts, iso_time, job, pod, spec, status

FORBIDDEN_IMAGE = {"placement": {"image": "docker.io/own:1"}}
MESSAGE = (
    "spec.placement.image: 'docker.io/own:1' is refused by the platform's rule policy.images for namespace team; "
    "write a value that the rule allows: registry.example.com/*"
)


def make_config(**policy: Any) -> OperatorConfig:
    return parse_config({"trainer": {"image": "t"}, "policy": {"images": ["registry.example.com/*"], **policy}}, "test")


def accept_in_team(raw_spec: Object, config: OperatorConfig, first_attempt: FirstAttempt | None = None, **options: Any) -> AcceptedSpec | RefusedSpec:
    return accept(raw_spec, config, first_attempt, namespace="team", **options)


def test_new_job_is_finally_refused_with_the_field_and_the_rule() -> None:
    refusal = accept_in_team(spec(**FORBIDDEN_IMAGE), make_config())
    assert isinstance(refusal, RefusedSpec)
    assert (refusal.reason, refusal.message, refusal.is_final) == (Reason.FORBIDDEN_BY_POLICY, MESSAGE, True)
    assert refusal.spec is not None and refusal.spec.policy.retries == 3


@pytest.mark.parametrize("options", [{"first_attempt": FirstAttempt()}, {"was_accepted": True}], ids=["started", "accepted"])
def test_new_rule_does_not_affect_a_job_that_was_accepted(options: dict[str, Any]) -> None:
    acceptance = accept_in_team(spec(**FORBIDDEN_IMAGE), make_config(maxDurationSeconds=60), **options)
    assert isinstance(acceptance, AcceptedSpec)
    assert f"a new job would be refused: {MESSAGE}" in acceptance.notes
    assert acceptance.max_duration_seconds is None


def test_job_gets_the_rules_of_its_namespace() -> None:
    config = make_config(namespaces=[{"names": ["team"], "images": ["*"]}])
    assert isinstance(accept(spec(**FORBIDDEN_IMAGE), config, namespace="team"), AcceptedSpec)
    assert isinstance(accept(spec(**FORBIDDEN_IMAGE), config, namespace="other"), RefusedSpec)


def test_forbidden_pool_is_refused_before_an_unknown_pool_makes_the_job_wait() -> None:
    refusal = accept_in_team(spec(resources={"nodePool": "a100"}), make_config(nodePools=["h100"]))
    assert isinstance(refusal, RefusedSpec) and refusal.reason is Reason.FORBIDDEN_BY_POLICY


def write_spec_with_forbidden_image(server: FakeApiServer) -> None:
    server.put(FINETUNEJOB, {**server.finetunejob, "spec": spec(**FORBIDDEN_IMAGE)})


async def test_refused_job_fails_without_a_pod() -> None:
    server = new_server()
    write_spec_with_forbidden_image(server)
    process = OperatorProcess(server, make_config())
    for _ in range(2):
        await process.reconcile()
    new_status = server.finetunejob["status"]
    assert (new_status["phase"], new_status["reason"]) == ("Failed", "ForbiddenByPolicy")
    assert (new_status["failure"]["class"], new_status["failure"]["code"], new_status["failure"]["message"]) == ("User", "ForbiddenByPolicy", MESSAGE)
    accepted_condition = server.condition(Condition.ACCEPTED)
    assert (accepted_condition["status"], accepted_condition["reason"], accepted_condition["message"]) == ("False", "ForbiddenByPolicy", MESSAGE)
    assert server.count("create", JOB) == 0


async def test_job_that_waits_while_suspended_may_start_after_a_new_rule() -> None:
    server = new_server()
    server.put(FINETUNEJOB, {**server.finetunejob, "spec": {**spec(**FORBIDDEN_IMAGE), "suspend": True}})
    await OperatorProcess(server).reconcile()
    assert server.condition(Condition.ACCEPTED)["status"] == "True"
    restarted_operator = OperatorProcess(server, make_config())
    server.write_spec(spec(**FORBIDDEN_IMAGE))
    restarted_operator.refresh()
    await restarted_operator.reconcile()
    assert server.count("create", JOB) == 1


async def test_next_attempt_of_a_started_job_starts_after_a_new_rule() -> None:
    server = new_server()
    write_spec_with_forbidden_image(server)
    process, first_job = await start_attempt(server)
    restarted_operator = OperatorProcess(server, make_config())
    restarted_operator.cache.put_job(first_job)
    await restarted_operator.reconcile()
    acceptance = restarted_operator.reconciler._observer.states[KEY].acceptance
    assert isinstance(acceptance, AcceptedSpec) and acceptance.spec.placement.image == "docker.io/own:1"
    assert server.finetunejob["status"]["phase"] != "Failed"


# --- the longest running time ---------------------------------------------------------------------------------------

STARTED_ATTEMPT = {"number": 1, "startTime": iso_time(0)}


def make_started_status(max_seconds: int | None) -> Any:
    ready_condition = condition(Condition.PODS_READY, "True", Reason.PODS_READY, 5)
    resolved = {} if max_seconds is None else {"resolved": {"maxDurationSeconds": max_seconds}}
    return status(attempt=1, attempts=[STARTED_ATTEMPT], conditions=[ready_condition], **resolved)


def test_limit_is_recorded_when_the_job_is_accepted() -> None:
    job_facts = facts(spec=spec(), config=make_config(maxDurationSeconds=60))
    new_status = compute_status(job_facts, decide(job_facts), ActionResult())
    assert new_status.resolved is not None and new_status.resolved.max_duration_seconds == 60


@pytest.mark.parametrize(
    ("max_seconds", "deadline_seconds", "message"),
    [
        (100, None, "the platform's rule policy.maxDurationSeconds 100 passed"), (100, 500, "the platform's rule policy.maxDurationSeconds 100 passed"),
        (100, 100, "policy.activeDeadlineSeconds 100 passed"), (500, 100, "policy.activeDeadlineSeconds 100 passed"), (None, None, None), (101, None, None),
    ],
)  # fmt: skip
def test_job_ends_at_the_lower_of_its_deadline_and_the_recorded_limit(max_seconds: int | None, deadline_seconds: int | None, message: str | None) -> None:
    """A user may raise the deadline of a running job, but the job never runs longer than the limit that the operator has recorded."""
    policy = {} if deadline_seconds is None else {"activeDeadlineSeconds": deadline_seconds}
    plan = decide(facts(spec=spec(policy=policy), status=make_started_status(max_seconds), jobs=[job()], pods=[pod()], now=at(100)))
    assert plan.termination == (None if message is None else Termination(Reason.DEADLINE_EXCEEDED, message))


def test_new_limit_does_not_end_a_running_job() -> None:
    job_facts = facts(spec=spec(), status=make_started_status(None), jobs=[job()], pods=[pod()], now=at(100), config=make_config(maxDurationSeconds=60))
    assert decide(job_facts).termination is None
    new_status = compute_status(job_facts, decide(job_facts), ActionResult())
    assert new_status.resolved is None or new_status.resolved.max_duration_seconds is None
