"""A job waits and does not fail if the CRD is newer than the operator, or if the API server has removed a field because an older CRD lacks it."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import Condition, Phase, Reason
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.objects import Object
from finetune_operator.plan import ActionResult, Situation
from finetune_operator.policies.acceptance import AcceptedSpec, FirstAttempt, RefusedSpec, accept, read_first_attempt
from finetune_operator.policies.spec_hash import compute_spec_sha256
from finetune_operator.report import compute_status

from tests.unit.operator.samples import CONFIG, at, end_pod, facts, finetunejob, job, pod, report, spec, status

STARTED_ATTEMPT: dict[str, Any] = {"number": 1, "startTime": at(0).isoformat()}
RUNNING_STATUS = status(attempt=1, attempts=[STARTED_ATTEMPT], phase="Running")
NEWER_GROUPS = {
    "unknown field": {"training": {"momentum": 0.9}},
    "unknown group": {"budget": {"strategy": "auto"}},
    "unknown enum value": {"policy": {"onDivergence": "Restart"}},
    "unknown value in a list": {"placement": {"tolerations": [{"key": "a"}, {"key": "b", "operator": "Gt"}]}},
    "wider bounds": {"policy": {"retries": 100000}},
    "another type": {"training": {"epochs": "many"}},
    "required field is missing": {"placement": {"env": [{"value": "x"}, {"name": "A", "value": "b"}]}},
    "group of another type": {"training": ["sft"]},
}


def make_newer_spec(name: str, **groups: Any) -> Object:
    return {**spec(**NEWER_GROUPS[name]), **groups}


@pytest.mark.parametrize("name", NEWER_GROUPS)
@pytest.mark.parametrize("attempt_count", [0, 1], ids=["new", "between attempts"])
def test_job_with_an_unreadable_spec_waits_for_a_newer_operator(name: str, attempt_count: int) -> None:
    ended_attempt = {**STARTED_ATTEMPT, "endTime": at(1).isoformat(), "reason": "Suspended"}
    old_status = status(attempt=2, attempts=[ended_attempt]) if attempt_count else None
    job_facts = facts(spec=make_newer_spec(name), status=old_status, now=at(5000))
    plan = decide(job_facts)
    assert (plan.situation, plan.attempt_to_create, plan.job_end) == (Situation.REFUSED, None, None)
    new_status = compute_status(job_facts, plan, ActionResult())
    accepted_condition = new_status.condition(Condition.ACCEPTED)
    assert accepted_condition is not None and (accepted_condition.status, accepted_condition.reason) == ("False", Reason.OPERATOR_TOO_OLD)
    assert next(iter(NEWER_GROUPS[name])) in accepted_condition.message
    assert new_status.phase is Phase.PENDING


def test_suspended_job_with_an_unreadable_spec_stays_suspended() -> None:
    ended_attempt = {**STARTED_ATTEMPT, "endTime": at(1).isoformat(), "reason": "Suspended", "committedStep": 5000}
    job_facts = facts(spec=make_newer_spec("unknown field", suspend=True), status=status(attempt=2, attempts=[ended_attempt]), now=at(5000))
    assert compute_status(job_facts, decide(job_facts), ActionResult()).phase is Phase.SUSPENDED


def test_cancelled_job_with_an_unreadable_spec_is_cancelled() -> None:
    plan = decide(facts(spec=make_newer_spec("unknown field", cancel=True)))
    assert plan.job_end is not None and plan.job_end.reason is Reason.CANCELLED


# Running attempts


def make_running_facts(raw_spec: Object, now: float = 60, **fields: Any) -> Facts:
    pods = [pod(index=index) for index in range(4)]
    return facts(spec=raw_spec, status=RUNNING_STATUS, jobs=[job(pod_count=4)], pods=pods, now=at(now), **fields)


@pytest.mark.parametrize("unreadable_group", ["resources", "training"])
def test_running_gang_keeps_its_number_of_pods(unreadable_group: str) -> None:
    """The operator reads the number of pods from the Job, because it may be unable to read the group `resources` of the spec."""
    job_facts = make_running_facts({**spec(resources={"nodes": 4}), unreadable_group: {"newer": 1, "nodes": "four"}})
    plan = decide(job_facts)
    assert (plan.situation, plan.termination, plan.jobs_to_delete) == (Situation.ACTIVE, None, ())
    new_status = compute_status(job_facts, plan, ActionResult())
    assert new_status.workers is not None and new_status.workers.display == "4/4"
    assert new_status.phase is Phase.RUNNING or new_status.phase is Phase.STARTING


@pytest.mark.parametrize(
    ("groups", "reason"),
    [
        ({"suspend": True}, Reason.SUSPENDED),
        ({"cancel": True}, Reason.CANCELLED),
        ({"policy": {"activeDeadlineSeconds": 50, "newer": True}}, Reason.DEADLINE_EXCEEDED),
    ],
)
def test_running_attempt_with_an_unreadable_spec_can_be_stopped(groups: Object, reason: Reason) -> None:
    plan = decide(make_running_facts(make_newer_spec("unknown field", **groups)))
    assert plan.termination is not None and plan.termination.reason is reason


def test_running_attempt_with_an_unreadable_spec_is_not_stalled() -> None:
    received_report = report(health={"secondsSinceHeartbeat": 5000.0}, progress={"step": 5})
    stalled_facts = make_running_facts(spec(), last_report=received_report)
    assert (decide(stalled_facts).termination is not None) is True
    assert decide(make_running_facts(make_newer_spec("unknown field"), last_report=received_report)).termination is None


@pytest.mark.parametrize("code", [70, 71, 72, 74])
def test_failure_with_an_unreadable_spec_is_not_counted_and_adapts_nothing(code: int) -> None:
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], retriesUsed=3)
    raw_spec = make_newer_spec("unknown field", policy={"onOutOfMemory": "Fail", "onDivergence": "Fail"})
    plan = decide(facts(spec=raw_spec, status=old_status, jobs=[job(failed_at=at(60))], pods=[end_pod(pod(), code)], now=at(61)))
    assert plan.job_end is None and plan.attempt_end is not None
    assert (plan.attempt_end.next_attempt, plan.attempt_end.is_counted, plan.attempt_end.adaptation) == (2, False, None)


# A field that an older CRD removed


def make_started_status(raw_spec: Object) -> FineTuneJobStatus:
    """Return the status that the operator writes after it has created the first Job from this spec."""
    job_facts = facts(spec=raw_spec)
    new_status = compute_status(job_facts, decide(job_facts), ActionResult(created_job=job()))
    assert new_status.resolved is not None and new_status.resolved.spec_sha256 == compute_spec_sha256(raw_spec)
    return new_status


def test_resume_waits_if_an_older_crd_removed_a_field() -> None:
    started_status = make_started_status(spec(training={"seed": 7}))
    acceptance_after = accept(spec(), CONFIG, read_first_attempt(started_status))
    assert isinstance(acceptance_after, RefusedSpec)
    assert (acceptance_after.reason, acceptance_after.is_final) == (Reason.SPEC_CHANGED, False)
    attempts = [attempt.model_copy(update={"end_time": at(1), "reason": "Suspended"}) for attempt in started_status.attempts]
    ended_status = started_status.model_copy(update={"attempts": attempts, "attempt": 2})
    waiting_facts = Facts(finetunejob(spec(), ended_status), acceptance_after, at(100), CONFIG)
    plan = decide(waiting_facts)
    assert (plan.situation, plan.attempt_to_create, plan.job_end) == (Situation.REFUSED, None, None)


@pytest.mark.parametrize(
    "changed_groups",
    [
        {"suspend": True}, {"cancel": False}, {"policy": {}}, {"placement": {}},
        {"policy": {"activeDeadlineSeconds": 5, "ttlSecondsAfterFinished": 5}}, {"placement": {"queueName": "q"}},
    ],
)  # fmt: skip
def test_changes_that_the_api_allows_keep_the_hash(changed_groups: Object) -> None:
    assert compute_spec_sha256(spec(**changed_groups)) == compute_spec_sha256(spec())
    assert isinstance(accept(spec(**changed_groups), CONFIG, read_first_attempt(make_started_status(spec()))), AcceptedSpec)


def test_job_without_a_recorded_hash_continues() -> None:
    """Version 0.1.0 of the operator did not record a hash of the spec."""
    assert isinstance(accept(spec(), CONFIG, FirstAttempt({"training.epochs": 3})), AcceptedSpec)
