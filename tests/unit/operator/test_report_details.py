"""Checkpoints, quota, output and suspension in the status."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.names import Condition, Phase, Reason
from finetune_api.pod import TerminationMessage
from finetune_operator.decide import decide
from finetune_operator.events import draft_events
from finetune_operator.plan import ActionResult, Situation
from finetune_operator.report import compute_status

from tests.unit.operator.samples import at, condition, end_pod, facts, iso_time, job, pod, report, spec, status

STARTED_ATTEMPT = {"number": 1, "startTime": iso_time(0)}

QUEUED_SPEC = spec(placement={"queueName": "q"}, policy={"activeDeadlineSeconds": 1800})


CHECKPOINTS = [
    {"step": step, "uri": f"s3://m/checkpoints/step-{step:08d}/a1-aaaaaaaa", "healthy": True} for step in (100, 200, 300, 400, 500)
]  # fmt: skip


def compute_steps_in_status(reported_steps: list[int], known_steps: list[int]) -> list[int]:
    """Return the steps of the checkpoints in the new status. The old status contains the checkpoints of `known_steps`, and a pod reports the checkpoints of
    `reported_steps`.
    """
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], checkpoints=[checkpoint for checkpoint in CHECKPOINTS if checkpoint["step"] in known_steps])
    received_report = report(checkpoints=[checkpoint for checkpoint in CHECKPOINTS if checkpoint["step"] in reported_steps], progress={"step": 510})
    job_facts = facts(status=old_status, jobs=[job()], pods=[pod()], last_report=received_report)
    return [checkpoint.step for checkpoint in compute_status(job_facts, decide(job_facts), ActionResult()).checkpoints]


def test_quota_reserved_has_the_time_of_admission() -> None:
    old_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.QUOTA_RESERVED, "False", Reason.QUEUED, 0)]
    )
    queued_spec = spec(placement={"queueName": "q"}, policy={"activeDeadlineSeconds": 7200})
    job_facts = facts(spec=queued_spec, status=old_status, jobs=[job(queue="q", started_at=at(100))], pods=[pod()], now=at(3700))
    new_status = compute_status(job_facts, decide(job_facts), ActionResult())
    assert [condition.last_transition_time for condition in new_status.conditions if condition.type is Condition.QUOTA_RESERVED] == [at(100)]
    lost_facts = facts(spec=queued_spec, status=new_status, jobs=[job(queue="q", is_suspended=True, started_at=at(100))], now=at(3800))
    assert compute_status(lost_facts, decide(lost_facts), ActionResult()).active_seconds == 3700


def test_checkpoints_that_retention_removed_are_removed_from_the_status() -> None:
    assert compute_steps_in_status([400, 500], [100, 200, 300, 400, 500]) == [400, 500]


def test_save_time_of_a_checkpoint_is_kept_when_a_later_report_lacks_it() -> None:
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], checkpoints=[CHECKPOINTS[3] | {"saveSeconds": 400.0}])
    job_facts = facts(status=old_status, jobs=[job()], pods=[pod()], last_report=report(checkpoints=[CHECKPOINTS[3]]))
    assert compute_status(job_facts, decide(job_facts), ActionResult()).checkpoints[0].save_seconds == 400.0


def test_checkpoints_newer_than_the_reported_ones_stay_in_status() -> None:
    assert compute_steps_in_status([100, 200], [100, 200, 300, 400]) == [100, 200, 300, 400]
    assert compute_steps_in_status([], [100, 200]) == [100, 200]


def test_termination_message_replaces_the_checkpoints_of_the_last_report() -> None:
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], checkpoints=CHECKPOINTS[-2:])
    message = TerminationMessage.model_validate(
        {"step": 500, "checkpoints": CHECKPOINTS[-1:], "output": {"uri": "s3://m/final"}}
    )
    received_report = report(checkpoints=CHECKPOINTS[-2:], progress={"step": 500})
    job_facts = facts(
        status=old_status, jobs=[job(completed_at=at(60))], pods=[end_pod(pod(), 0, message)], last_report=received_report, now=at(61)
    )
    assert [checkpoint.step for checkpoint in compute_status(job_facts, decide(job_facts), ActionResult()).checkpoints] == [500]


def test_committed_model_stays_in_the_status_while_later_stages_run_and_fail() -> None:
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT])
    received_report = report(stage="evaluating", output={"uri": "s3://m/final"}, progress={"step": 500})
    running_facts = facts(status=old_status, jobs=[job()], pods=[pod()], last_report=received_report)
    new_status = compute_status(running_facts, decide(running_facts), ActionResult())
    assert new_status.phase is Phase.EVALUATING and new_status.output is not None and new_status.output.uri == "s3://m/final"
    message = TerminationMessage.model_validate(
        {"step": 500, "stage": "evaluating", "code": "DatasetEmpty", "message": "m", "output": {"uri": "s3://m/final"}, "class": "Data"}
    )
    failed_facts = facts(status=new_status, jobs=[job(failed_at=at(60))], pods=[end_pod(pod(), 65, message)], now=at(61))
    ended_status = compute_status(failed_facts, decide(failed_facts), ActionResult())
    succeeded_condition = ended_status.condition(Condition.SUCCEEDED)
    assert succeeded_condition is not None and (succeeded_condition.status, succeeded_condition.reason) == ("False", "EvaluationFailed")
    assert (ended_status.phase, ended_status.reason) == (Phase.FAILED, "DatasetEmpty")
    assert ended_status.output is not None and ended_status.output.uri == "s3://m/final"


def test_output_addresses_that_the_termination_message_lacks_are_kept() -> None:
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], output={"uri": "s3://m/final", "mergedUri": "s3://m/merged"})
    received_report = report(stage="reporting", output={"uri": "s3://m/final", "reportUri": "s3://m/report"}, progress={"step": 500})
    running_facts = facts(status=old_status, jobs=[job()], pods=[pod()], last_report=received_report)
    message = TerminationMessage.model_validate({"step": 500, "output": {"uri": "s3://m/final", "promoted": True}})
    reported_status = compute_status(running_facts, decide(running_facts), ActionResult())
    ended_facts = facts(status=reported_status, jobs=[job(completed_at=at(60))], pods=[end_pod(pod(), 0, message)], now=at(61))
    output = compute_status(ended_facts, decide(ended_facts), ActionResult()).output
    assert output is not None
    assert output.to_wire() == {"uri": "s3://m/final", "mergedUri": "s3://m/merged", "reportUri": "s3://m/report", "promoted": True}


def test_suspending_a_queued_job_is_not_reported_as_preemption() -> None:
    admitted_condition = {
        "type": "QuotaReserved",
        "status": "True",
        "reason": "Progressing",
        "lastTransitionTime": STARTED_ATTEMPT["startTime"],
    }
    old_status = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": "Suspended"}], conditions=[admitted_condition])
    raw_spec = spec(placement={"queueName": "team"}, suspend=True)
    ended_facts = facts(spec=raw_spec, status=old_status, pods=[replace(end_pod(pod(), 75), is_deleted=True)], now=at(60))
    new_status = compute_status(ended_facts, decide(ended_facts), ActionResult())
    reasons = [note.reason for note in draft_events(old_status, new_status)]
    assert Reason.PREEMPTED not in reasons
    assert Reason.QUEUED not in reasons
    assert Reason.SUSPENDED in reasons
    quota_condition = next(condition for condition in new_status.conditions if condition.type == Condition.QUOTA_RESERVED)
    assert (quota_condition.status, quota_condition.message) == ("False", "no Job exists, so no quota is requested")
    repeated_facts = facts(spec=spec(placement={"queueName": "team"}), status=new_status, now=at(90))
    plan = decide(repeated_facts)
    queued_status = compute_status(repeated_facts, plan, ActionResult(created_job=job(2, is_suspended=True, started_at=None, queue="team")))
    assert Reason.QUEUED in [note.reason for note in draft_events(new_status, queued_status)]


def test_job_suspended_while_it_waits_for_a_pool_is_suspended_at_once() -> None:
    job_facts = facts(spec=spec(resources={"nodePool": "gone", "gpusPerNode": 1}, suspend=True))
    plan = decide(job_facts)
    assert plan.situation is Situation.SUSPENDED
    new_status = compute_status(job_facts, plan, ActionResult())
    assert new_status.phase is Phase.SUSPENDED
    statuses = {condition.type: condition.status for condition in new_status.conditions}
    assert (statuses[Condition.SUSPENDED], statuses[Condition.ACCEPTED]) == ("True", "False")
