"""What others do to our pods: containers that admission puts beside the trainer, gates, evictions for what a pod did itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.exits import RetryPolicy
from finetune_api.names import CONTAINER, MANAGER, Condition, FailureClass, Label, Phase, Reason
from finetune_operator.decide import decide
from finetune_operator.events import transitions
from finetune_operator.plan import ActionResult, Situation
from finetune_operator.policies.blocking import blocking_condition_of_pods
from finetune_operator.policies.cause import cause_of, pod_cause
from finetune_operator.report import report
from finetune_operator.views import PodView, read_pod

from tests.unit.operator.samples import UID, at, ended, facts, job, pod, spec, status

BEGUN = {"number": 1, "startTime": "2026-11-21T12:00:00Z"}


def seen(phase: str, trainer: dict[str, Any], *, beside: dict[str, Any] | None = None, init: dict[str, Any] | None = None,
         conditions: list[dict[str, Any]] | None = None, gates: list[str] | None = None) -> PodView:  # fmt: skip
    """A pod as the API server shows it. States of the trainer, of a container whose name sorts before it, of an init container."""
    labels = {Label.MANAGED_BY: MANAGER, Label.NAME: "run", Label.UID: UID, Label.ATTEMPT: "1"}
    states = [{"name": "istio-proxy", "imageID": "proxy", "state": beside}] if beside else []
    states.append({"name": CONTAINER, "imageID": "trainer", "state": trainer})
    body = {
        "metadata": {"name": "run-1-0-x", "namespace": "team", "uid": "pod-1", "labels": labels},
        "spec": {"schedulingGates": [{"name": gate} for gate in gates or []]},
        "status": {
            "phase": phase, "containerStatuses": states, "conditions": conditions or [],
            "initContainerStatuses": [{"name": "setup", "state": init}] if init else [],
        },
    }  # fmt: skip
    found = read_pod(body)
    assert found is not None
    return found


RUNS = {"running": {"startedAt": "2026-11-21T12:00:00Z"}}
INITIALIZING = {"waiting": {"reason": "PodInitializing"}}


def test_the_trainer_s_end_counts_and_not_that_of_a_container_beside_it() -> None:
    over = seen("Failed", {"terminated": {"exitCode": 65}}, beside={"terminated": {"exitCode": 0}})
    assert over.image_id == "trainer"
    cause = pod_cause(over)
    assert cause is not None
    assert (cause.failure.exit_code, cause.retry) == (65, RetryPolicy.NEVER)


def test_a_container_beside_the_trainer_that_holds_the_pod_is_named() -> None:
    found = blocking_condition_of_pods([seen("Running", {"terminated": {"exitCode": 0}}, beside=RUNS)])
    assert found is not None
    assert "ended with exit code 0, and a container beside it still runs" in found.message
    assert blocking_condition_of_pods([seen("Running", RUNS, beside=RUNS)]) is None


def test_an_init_container_that_fails_is_named() -> None:
    failed = {"terminated": {"exitCode": 3, "reason": "Error", "message": "no route to the vault"}}
    cause = cause_of(None, [seen("Failed", INITIALIZING, init=failed)])
    assert (cause.failure.code, cause.retry) == ("InitContainerFailed", RetryPolicy.COUNTED)
    assert cause.failure.message == "init container setup ended with exit code 3: no route to the vault"


def test_an_init_container_whose_image_is_missing_says_so() -> None:
    found = blocking_condition_of_pods([seen("Pending", INITIALIZING, init={"waiting": {"reason": "ErrImagePull", "message": "none"}})])
    assert found is not None
    assert (found.reason, found.message) == (Reason.IMAGE_PULL_FAILED, "ErrImagePull: none")
    assert blocking_condition_of_pods([seen("Pending", INITIALIZING, init=RUNS)]) is None


def test_a_gate_is_named() -> None:
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "Scheduling is blocked"}
    found = blocking_condition_of_pods([seen("Pending", {}, conditions=[gated], gates=["example.com/licence"])])
    assert found is not None
    assert (found.reason, found.message) == (Reason.UNSCHEDULABLE, "Scheduling is blocked (example.com/licence)")


@pytest.mark.parametrize("code", [75, 76, 137, 143])
def test_a_pod_evicted_for_its_own_use_is_told_why_and_not_repeated_for_ever(code: int) -> None:
    words = "Pod ephemeral local storage usage exceeds the total limit of containers 20Gi."
    evicted = replace(ended(pod(), code), reason="Evicted", message=words)
    cause = pod_cause(evicted)
    assert cause is not None
    assert (cause.failure.class_, cause.failure.code, cause.failure.message) == (FailureClass.INFRASTRUCTURE, "Evicted", words)
    assert cause.retry is RetryPolicy.COUNTED
    assert "resources.ephemeralStorage" in (cause.failure.hint or "")
    free = pod_cause(replace(evicted, disruption="TerminationByKubelet"))
    assert free is not None
    assert free.retry is RetryPolicy.FREE


# What the status says of a wish


def test_suspending_a_job_of_a_queue_is_not_called_the_queue_s_doing() -> None:
    admitted = {"type": "QuotaReserved", "status": "True", "reason": "Progressing", "lastTransitionTime": BEGUN["startTime"]}
    known = status(attempt=1, attempts=[{**BEGUN, "reason": "Suspended"}], conditions=[admitted])
    written = spec(placement={"queueName": "team"}, suspend=True)
    gone = facts(written=written, known=known, pods=[replace(ended(pod(), 75), is_deleted=True)], now=at(60))
    new = report(gone, decide(gone), ActionResult())
    told = [note.reason for note in transitions(known, new)]
    assert Reason.PREEMPTED not in told
    assert Reason.QUEUED not in told
    assert Reason.SUSPENDED in told
    quota = next(one for one in new.conditions if one.type == Condition.QUOTA_RESERVED)
    assert (quota.status, quota.message) == ("False", "no Job requests quota")
    again = facts(written=spec(placement={"queueName": "team"}), known=new, now=at(90))
    plan = decide(again)
    waits = report(again, plan, ActionResult(created_job=job(2, is_suspended=True, started_at=None, queue="team")))
    assert Reason.QUEUED in [note.reason for note in transitions(new, waits)]


def test_suspended_while_it_waits_for_a_pool_no_pod_is_said_to_save() -> None:
    found = facts(written=spec(resources={"nodePool": "gone", "gpusPerNode": 1}, suspend=True))
    plan = decide(found)
    assert plan.situation is Situation.SUSPENDED
    new = report(found, plan, ActionResult())
    assert new.phase is Phase.SUSPENDED
    said = {one.type: one.status for one in new.conditions}
    assert (said[Condition.SUSPENDED], said[Condition.ACCEPTED]) == ("True", "False")


def test_what_an_earlier_attempt_left_goes_also_while_a_pool_is_missing() -> None:
    known = status(attempt=2, attempts=[{**BEGUN, "endTime": "2026-11-21T12:01:00Z", "reason": "Preempted"}])
    written = spec(resources={"nodePool": "gone", "gpusPerNode": 1})
    plan = decide(facts(written=written, known=known, jobs=[job(1)], now=at(90)))
    assert [one.name for one in plan.delete_jobs] == ["run-1"]
