"""Facts about the running time and the checkpoints of a job. They must also be right after the operator was down, or after a queue replaced the pods."""

from __future__ import annotations

from dataclasses import replace

from finetune_api.names import Condition, Reason
from finetune_api.pod import TerminationMessage
from finetune_operator.decide import decide
from finetune_operator.plan import ActionResult
from finetune_operator.report import compute_status

from tests.unit.operator.samples import at, condition, end_pod, facts, iso_time, job, pod, spec, status

STARTED_ATTEMPT = {"number": 1, "startTime": iso_time(0)}

QUEUED_SPEC = spec(placement={"queueName": "q"}, policy={"activeDeadlineSeconds": 1800})


def test_running_time_begins_when_the_queue_admits_the_job() -> None:
    old_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.QUOTA_RESERVED, "False", Reason.QUEUED, 0)]
    )
    job_facts = facts(spec=QUEUED_SPEC, status=old_status, jobs=[job(queue="q", started_at=at(100))], pods=[pod()], now=at(3700))
    assert job_facts.running_since == at(100)
    plan = decide(job_facts)
    assert plan.termination is not None and plan.termination.reason is Reason.DEADLINE_EXCEEDED


def test_attempt_missing_in_status_runs_since_its_job_was_created() -> None:
    job_facts = facts(jobs=[job(created_at=at(7))], pods=[pod()], now=at(100))
    assert (job_facts.attempt_record, job_facts.running_since) == (None, at(7))
    ended_facts = facts(jobs=[job(created_at=at(7), failed_at=at(40), failed_reason="x")], pods=[end_pod(pod(), 70)], now=at(41))
    assert compute_status(ended_facts, decide(ended_facts), ActionResult()).active_seconds == 33


def test_attempt_missing_in_status_runs_since_its_queue_admitted_it() -> None:
    waiting_facts = facts(spec=QUEUED_SPEC, jobs=[job(queue="q", is_suspended=True, started_at=None)], now=at(100))
    assert (waiting_facts.attempt_record, waiting_facts.running_since) == (None, None)
    running_facts = facts(spec=QUEUED_SPEC, jobs=[job(queue="q", started_at=at(60))], pods=[pod()], now=at(100))
    assert (running_facts.attempt_record, running_facts.running_since) == (None, at(60))


def test_queued_job_with_an_unreadable_spec_does_not_run() -> None:
    """The time that a job waits in the queue must not count towards the job's deadline."""
    unreadable_spec = {**QUEUED_SPEC, "training": ["a newer form"]}
    waiting_facts = facts(spec=unreadable_spec, jobs=[job(queue="q", is_suspended=True, started_at=None)], now=at(10**6))
    assert (waiting_facts.is_spec_readable, waiting_facts.running_since) == (False, None)
    assert decide(waiting_facts).termination is None


def test_attempt_that_failed_while_the_operator_was_down_has_used_its_time() -> None:
    old_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.QUOTA_RESERVED, "False", Reason.QUEUED, 0)]
    )
    failed_job = job(queue="q", started_at=at(100), failed_at=at(1700), failed_reason="x")
    job_facts = facts(spec=QUEUED_SPEC, status=old_status, jobs=[failed_job], pods=[end_pod(pod(), 70)], now=at(3700))
    assert compute_status(job_facts, decide(job_facts), ActionResult()).active_seconds == 1600


def test_running_time_of_a_requeued_job_begins_at_its_last_admission() -> None:
    """A resumed Job keeps its old start time until the Job controller has handled the resumption."""
    for value, reason, since_seconds in (("False", Reason.QUEUED, 1800), ("True", Reason.PROGRESSING, 7201)):
        quota_condition = condition(Condition.QUOTA_RESERVED, value, reason, since_seconds)
        old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], activeSeconds=1700, conditions=[quota_condition])
        for requeued_job in (job(queue="q", started_at=at(100), suspended_since=at(1800)), job(queue="q", started_at=at(7200))):
            job_facts = facts(spec=QUEUED_SPEC, status=old_status, jobs=[requeued_job], now=at(7202))
            assert decide(job_facts).termination is None
            assert job_facts.running_since in (None, at(7200), at(7201))


def test_no_attempt_starts_after_the_deadline() -> None:
    failed_job = job(failed_at=at(300), failed_reason="BackoffLimitExceeded")
    job_facts = facts(
        spec=spec(policy={"activeDeadlineSeconds": 100}), status=status(attempt=1, attempts=[STARTED_ATTEMPT]), jobs=[failed_job],
        pods=[end_pod(pod(), 70)], now=at(301),
    )  # fmt: skip
    plan = decide(job_facts)
    assert plan.job_end is not None and plan.job_end.reason is Reason.DEADLINE_EXCEEDED


def test_time_for_which_a_queue_suspends_the_job_is_not_running_time() -> None:
    old_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.QUOTA_RESERVED, "True", "Progressing", 100)]
    )
    suspended_job = job(queue="q", is_suspended=True, suspended_since=at(1000), started_at=None)
    ended_pod = replace(pod(created_at=at(100), deletion_timestamp=at(1000)), phase="Failed")
    job_facts = facts(spec=QUEUED_SPEC, status=old_status, jobs=[suspended_job], pods=[ended_pod], now=at(5000))
    plan = decide(job_facts)
    assert plan.termination is None
    assert compute_status(job_facts, plan, ActionResult()).active_seconds == 900


def test_only_certain_running_time_counts_if_the_queue_suspended_the_job_unnoticed() -> None:
    """While the operator was stopped, the queue may have suspended and resumed the Job several times. So the operator counts only time in which the job
    certainly ran.
    """
    old_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], progress={"step": 5, "updateTime": at(400).isoformat()},
        conditions=[condition(Condition.QUOTA_RESERVED, "True", "Progressing", 100)],
    )  # fmt: skip
    suspended_job = job(queue="q", is_suspended=True, suspended_since=at(4000), started_at=None)
    facts_without_pods = facts(spec=QUEUED_SPEC, status=old_status, jobs=[suspended_job], now=at(5000))
    assert facts_without_pods.compute_running_seconds(facts_without_pods.now) == 300
    second_pod = replace(pod(created_at=at(3900), deletion_timestamp=at(4000)), phase="Failed")
    readmitted_facts = facts(spec=QUEUED_SPEC, status=old_status, jobs=[suspended_job], pods=[second_pod], now=at(5000))
    assert readmitted_facts.compute_running_seconds(readmitted_facts.now) == 100


def test_quota_reservation_begins_again_if_the_job_was_readmitted_while_the_operator_was_down() -> None:
    old_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.QUOTA_RESERVED, "True", "Progressing", 100)]
    )
    job_facts = facts(spec=QUEUED_SPEC, status=old_status, jobs=[job(queue="q", started_at=at(4000))], now=at(4100))
    new_status = compute_status(job_facts, decide(job_facts), ActionResult())
    quota_condition = next(condition for condition in new_status.conditions if condition.type == Condition.QUOTA_RESERVED)
    assert quota_condition.last_transition_time == at(4000)
    facts_without_job = facts(spec=QUEUED_SPEC, status=new_status, now=at(4200))
    assert decide(facts_without_job).job_end is None


def test_job_deleted_while_the_operator_was_down_ran_until_its_last_report() -> None:
    """The operator was suspending the job when it stopped. The hours until the operator started again do not count towards the job's deadline."""
    suspending_attempt = {**STARTED_ATTEMPT, "reason": "Suspended", "message": "spec.suspend is true"}
    old_status = status(attempt=1, attempts=[suspending_attempt], progress={"step": 7, "updateTime": at(500).isoformat()})
    raw_spec = spec(suspend=True, policy={"activeDeadlineSeconds": 1800})
    job_facts = facts(spec=raw_spec, status=old_status, now=at(9000))
    plan = decide(job_facts)
    assert plan.job_end is None
    assert plan.attempt_end is not None and (plan.attempt_end.reason, plan.attempt_end.ended_at) == (
        Reason.SUSPENDED,
        at(500),
    )
    assert compute_status(job_facts, plan, ActionResult()).active_seconds == 500


def test_deleted_job_ran_until_its_pods_ended() -> None:
    old_status = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": "Suspended"}])
    ended_pod = end_pod(pod(is_deleted=True), 75)  # at 60 s
    job_facts = facts(
        spec=spec(suspend=True, policy={"activeDeadlineSeconds": 1800}), status=old_status, pods=[ended_pod], now=at(9000)
    )
    plan = decide(job_facts)
    assert plan.job_end is None
    assert plan.attempt_end is not None and plan.attempt_end.ended_at == at(60)


def test_checkpoints_of_a_pod_that_a_queue_replaced_are_recorded() -> None:
    """The operator was restarted before it read a report with step 20. So it can learn of checkpoint 20 only from the preempted pod's termination message."""
    uri = "s3://models/test/checkpoints/step-{0:08d}/a1-00000000"
    checkpoints = [{"step": step, "uri": uri.format(step)} for step in (10, 20)]
    message = TerminationMessage.model_validate({"step": 29, "resumedFromStep": 0, "checkpoints": checkpoints})
    preempted_pod = replace(end_pod(pod(), 75, message), is_deleted=True)
    replacement_pod = end_pod(pod(uid="new", created_at=at(300)), 75, TerminationMessage(code="Code"))
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT])
    job_facts = facts(
        spec=QUEUED_SPEC,
        status=old_status,
        jobs=[job(queue="q", failed_at=at(400))],
        pods=[preempted_pod, replacement_pod],
        now=at(400),
    )
    plan = decide(job_facts)
    assert plan.attempt_end is not None
    assert (plan.attempt_end.committed_step, plan.attempt_end.made_progress) == (20, True)
    assert [checkpoint.step for checkpoint in compute_status(job_facts, plan, ActionResult()).checkpoints] == [10, 20]


def test_termination_message_of_a_replaced_pod_does_not_restore_removed_checkpoints() -> None:
    uri = "s3://models/test/checkpoints/step-{0:08d}/a1-00000000"
    old_checkpoints = [{"step": step, "uri": uri.format(step)} for step in (10, 20)]
    message = TerminationMessage.model_validate({"checkpoints": old_checkpoints})
    preempted_pod = replace(end_pod(pod(), 75, message), is_deleted=True)
    newer_checkpoints = [{"step": step, "uri": uri.format(step)} for step in (20, 30)]
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], checkpoints=newer_checkpoints)
    job_facts = facts(status=old_status, jobs=[job()], pods=[preempted_pod, pod(uid="new", created_at=at(300))], now=at(400))
    assert [checkpoint.step for checkpoint in compute_status(job_facts, decide(job_facts), ActionResult()).checkpoints] == [20, 30]
