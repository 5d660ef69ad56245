"""The start timeout and the stall timeout of a job, with and without a restart of the operator."""

from __future__ import annotations

import pytest
from finetune_api.names import Condition, Reason
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult, Situation
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.report import compute_status

from tests.unit.operator.samples import at, condition, facts, iso_time, job, pod, report, spec, status

STARTED_ATTEMPT = {"number": 1, "startTime": iso_time(0)}


def is_stalled(job_facts: Facts, result: ActionResult | None = None) -> bool:
    new_status = compute_status(job_facts, decide(job_facts), result or ActionResult())
    return any(condition.type == Condition.STALLED and condition.status == "True" for condition in new_status.conditions)


def make_unready_status(unready_since: float) -> FineTuneJobStatus:
    return status(
        attempt=1, attempts=[{**STARTED_ATTEMPT, "lastStep": 500}], progress={"step": 500, "updateTime": iso_time(100)},
        conditions=[condition(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, unready_since)],
    )  # fmt: skip


def test_start_timeout_begins_when_ready_pods_become_unready() -> None:
    ready_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.PODS_READY, "True", Reason.PODS_READY, 5)]
    )
    job_facts = facts(status=ready_status, jobs=[job()], pods=[pod(is_ready=False)], now=at(7200))
    assert not is_stalled(job_facts)
    lost_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, 7200)]
    )
    assert is_stalled(facts(status=lost_status, jobs=[job()], pods=[pod(is_ready=False)], now=at(9001)))


def test_unready_pod_without_reports_stalls_after_a_restart_of_the_operator() -> None:
    job_facts = facts(status=make_unready_status(200), jobs=[job()], pods=[pod(is_ready=False)], now=at(900))
    plan = decide(job_facts)
    assert plan.termination is not None and plan.termination.reason is Reason.STALLED


@pytest.mark.parametrize(
    ("old_status", "is_ready"),
    [
        (make_unready_status(200), True),
        (make_unready_status(500), False),
        (status(attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, 0)]), False),
        (make_unready_status(200).model_copy(update={"attempts": status(attempts=[{"number": 1, "startTime": iso_time(150)}]).attempts}), False),
    ],
    ids=["pod is ready", "unready for less than the timeout", "never reported", "an earlier attempt reported"],
)  # fmt: skip
def test_pod_without_any_report_does_not_stall(old_status: FineTuneJobStatus, is_ready: bool) -> None:
    plan = decide(facts(status=old_status, jobs=[job()], pods=[pod(is_ready=is_ready)], now=at(900)))
    assert plan.termination is None and plan.reconcile_at is not None


def test_new_pod_of_a_readmitted_job_gets_the_whole_stall_timeout() -> None:
    """The queue suspended the Job at 120 s and admitted it again at 7200 s. After the second admission, the Job has a new pod."""
    old_status = status(
        attempt=1, attempts=[{**STARTED_ATTEMPT, "lastStep": 50}], progress={"step": 50, "updateTime": iso_time(100)},
        conditions=[
            condition(Condition.QUOTA_RESERVED, "True", Reason.PROGRESSING, 7200),
            condition(Condition.PODS_READY, "False", Reason.PODS_NOT_READY, 120),
        ],
    )  # fmt: skip
    readmitted_job = job(queue="q", started_at=at(7200))
    pending_pod = pod(uid="new", phase="Pending", is_ready=False, created_at=at(7200))
    running_pod = pod(uid="new", is_ready=False, created_at=at(7200), running_since=at(7300))
    queued_spec = spec(placement={"queueName": "q"})
    for current_pod, now, is_ended in ((pending_pod, 9000, False), (running_pod, 7400, False), (running_pod, 7899, False), (running_pod, 7905, True)):
        job_facts = facts(spec=queued_spec, status=old_status, jobs=[readmitted_job], pods=[current_pod], now=at(now))
        assert (decide(job_facts).termination is not None) is is_ended, (current_pod.phase, now)


def test_node_clock_that_is_ahead_does_not_stall_an_attempt_that_has_not_started() -> None:
    old_status = status(
        attempt=2, attempts=[{**STARTED_ATTEMPT, "lastStep": 50, "endTime": iso_time(102), "reason": "PodFailed"}, {"number": 2, "startTime": iso_time(112)}],
        progress={"step": 50, "updateTime": iso_time(130)}, conditions=[condition(Condition.PODS_READY, "False", "PodsNotReady", 102)],
    )  # fmt: skip
    new_pod = pod(
        uid="new", attempt=2, phase="Pending", is_ready=False, created_at=at(112), node="", unschedulable_message="0/3 nodes"
    )
    assert decide(facts(status=old_status, jobs=[job(2, created_at=at(112))], pods=[new_pod], now=at(800))).termination is None


def test_refused_create_shows_as_stalled_after_the_start_timeout() -> None:
    old_status = status(
        conditions=[
            condition(Condition.ACCEPTED, "True", "Accepted", 0),
            condition(Condition.PODS_READY, "False", "QuotaExceeded", 0),
        ]
    )
    refused_result = ActionResult(blocking_condition=BlockingCondition(Reason.QUOTA_EXCEEDED, "exceeded quota"))
    assert not is_stalled(facts(status=old_status, now=at(1700)), refused_result)
    assert is_stalled(facts(status=old_status, now=at(1900)), refused_result)
    assert not is_stalled(facts(status=old_status, now=at(1900)))


def test_job_name_conflict_shows_as_stalled_after_the_start_timeout() -> None:
    old_status = status(
        conditions=[
            condition(Condition.ACCEPTED, "True", "Accepted", 0),
            condition(Condition.PODS_READY, "False", "ChildrenConflict", 0),
        ]
    )
    early_facts = facts(status=old_status, jobs=[job(owner_uid="other")], now=at(100))
    assert decide(early_facts).situation is Situation.BLOCKED and decide(early_facts).reconcile_at == at(1800)
    assert is_stalled(facts(status=old_status, jobs=[job(owner_uid="other")], now=at(1900)))


@pytest.mark.parametrize(
    ("suspended_condition", "pods_ready_reason", "now"),
    [
        (condition(Condition.SUSPENDED, "False", "Resumed", 9000), "QuotaExceeded", 9100),
        (condition(Condition.SUSPENDED, "True", "Suspended", 100), "PodsNotReady", 9000),
    ],
    ids=["resumed a while ago", "resumed in this reconcile"],
)
def test_suspended_time_does_not_count_as_waiting(suspended_condition: dict[str, str], pods_ready_reason: str, now: float) -> None:
    conditions = [condition(Condition.PODS_READY, "False", pods_ready_reason, 0), suspended_condition]
    refused_result = ActionResult(blocking_condition=BlockingCondition(Reason.QUOTA_EXCEEDED, "exceeded quota"))
    assert not is_stalled(facts(status=status(conditions=conditions), now=at(now)), refused_result)


def test_backoff_does_not_count_as_waiting() -> None:
    attempts = [
        {"number": n, "startTime": iso_time(n), "endTime": iso_time(n + 1), "reason": "PodFailed", "counted": True} for n in range(1, 6)
    ]  # fmt: skip
    unready_condition = condition(Condition.PODS_READY, "False", "PodsNotReady", 5)
    old_status, backoff_seconds = status(attempt=6, attempts=attempts, conditions=[unready_condition]), 160
    refused_result = ActionResult(blocking_condition=BlockingCondition(Reason.QUOTA_EXCEEDED, "exceeded quota"))
    for now, is_late in ((6 + backoff_seconds + 1, False), (6 + backoff_seconds + 61, True)):
        job_facts = facts(spec=spec(policy={"startTimeoutSeconds": 60}), status=old_status, now=at(now))
        assert is_stalled(job_facts, refused_result) is is_late


def test_queued_time_does_not_count_towards_the_stall_timeout() -> None:
    conditions = [
        condition(Condition.QUOTA_RESERVED, "True", "Progressing", 5000),
        condition(Condition.PODS_READY, "False", "Progressing", 600),
    ]
    progress = {"step": 7, "updateTime": at(590).isoformat()}
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], progress=progress, conditions=conditions)
    new_pod = pod(uid="new", created_at=at(5000), phase="Pending", is_ready=False, ip="")
    job_facts = facts(
        spec=spec(placement={"queueName": "q"}), status=old_status, jobs=[job(queue="q", started_at=at(5000))], pods=[new_pod],
        now=at(5001),
    )  # fmt: skip
    assert decide(job_facts).termination is None


def test_pod_of_a_lost_node_does_not_count_as_stalled() -> None:
    """The pod is evicted at 340 s and counts as lost at 700 s (grace period 300 s, margin 60 s). The stall timeout of the job passes before 700 s."""
    old_status = status(
        attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.PODS_READY, "False", "Progressing", 40)]
    )
    received_report = report(stage="training", health={"secondsSinceStep": 1.0})
    evicted_pod = pod(is_ready=False, deletion_timestamp=at(640), disruption_reason="DeletionByTaintManager")
    for now, reason in ((650, None), (701, Reason.NODE_LOST)):
        job_facts = facts(status=old_status, jobs=[job()], pods=[evicted_pod], last_report=received_report, reported_at=at(0), now=at(now))
        termination = decide(job_facts).termination
        assert (termination.reason if termination else None) is reason


def test_single_failed_readiness_probe_of_an_unreachable_pod_is_not_a_stall() -> None:


    """For an hour, a network policy has prevented the operator from reading reports, while the pod was ready.

    In this situation, one failed readiness probe must not count as a stall.
    """
    received_report = report(stage="training", health={"secondsSinceStep": 1.0})
    flapping_pod = pod(is_ready=False)
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], conditions=[condition(Condition.PODS_READY, "True", "Progressing", 10)])
    job_facts = facts(status=old_status, jobs=[job()], pods=[flapping_pod], last_report=received_report, reported_at=at(0), now=at(3600))
    assert decide(job_facts).termination is None
    old_status = compute_status(job_facts, decide(job_facts), ActionResult())
    later_facts = facts(status=old_status, jobs=[job()], pods=[flapping_pod], last_report=received_report, reported_at=at(0), now=at(3660))
    wake_at = decide(later_facts).reconcile_at
    assert wake_at is not None and wake_at == at(3600 + 600 + 1)
    late_facts = facts(status=old_status, jobs=[job()], pods=[flapping_pod], last_report=received_report, reported_at=at(0), now=wake_at)
    termination = decide(late_facts).termination
    assert termination is not None and termination.reason is Reason.STALLED
