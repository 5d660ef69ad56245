"""The conditions: their status, reason and message, and when they last changed."""

from __future__ import annotations

from datetime import datetime

import pytest
from finetune_api.names import Condition, Reason
from finetune_api.status import FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import ActionResult
from finetune_operator.report import compute_status

from tests.unit.operator.samples import at, facts, job, pod, report, spec, status

RUNNING_STATUS = {
    "attempt": 1,
    "startTime": "2026-11-21T12:00:00Z",
    "attempts": [{"number": 1, "startTime": "2026-11-21T12:00:00Z"}],
}


def compute_status_of(job_facts: Facts, result: ActionResult | None = None) -> FineTuneJobStatus:
    return compute_status(job_facts, decide(job_facts), result or ActionResult())


def get_condition_statuses(new_status: FineTuneJobStatus) -> dict[str, str]:
    return {condition.type.value: condition.status for condition in new_status.conditions}


def test_conditions_of_a_new_job() -> None:
    assert get_condition_statuses(compute_status_of(facts(), ActionResult(created_job=job()))) == {
        "Accepted": "True", "PodsReady": "False", "Suspended": "False", "CheckpointsHealthy": "Unknown",
        "Succeeded": "Unknown", "Finished": "False", "Reconciling": "True",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "value", "reason"),
    [
        ("CheckpointDamaged: s3://b/x/optimizer.pt is damaged", "False", "CheckpointDamaged"),
        ("StagingDiskFull: the checkpoint of step 5 was skipped", "False", "StagingDiskFull"),
        ("StorageFailed: step 5 was not stored: it answered with 503", "False", "CheckpointNotStored"),
        ("StagingFailed: step 5: Not a directory", "False", "CheckpointNotStored"),
        (None, "True", "CheckpointCommitted"),
    ],
)
def test_checkpoint_problem_of_the_pod_becomes_a_condition(problem: str | None, value: str, reason: str) -> None:
    health = {"healthy": problem is None, "checkpointProblem": problem}
    checkpoints = [{"step": 5, "uri": "s3://b/5"}]
    received_report = report(health=health, checkpoints=checkpoints, latestCheckpoint="s3://b/5")
    new_status = compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], last_report=received_report))
    condition = new_status.condition(Condition.CHECKPOINTS_HEALTHY)
    assert condition is not None
    assert (condition.status, condition.reason) == (value, reason)
    assert problem is None or condition.message == problem


@pytest.mark.parametrize(
    ("problem", "value", "reason"),
    [
        ("TrackerUnavailable: mlflow at http://mlflow:5000 could not be reached: the connection was refused", "False", "TrackerUnavailable"),
        ("TrackerCredentialsRejected: mlflow at http://mlflow:5000 does not accept the credentials", "False", "TrackerCredentialsRejected"),
        ("Unknown: text of a newer trainer", "False", "TrackerFailed"),
        (None, "True", "TrackersReachable"),
    ],
)
def test_tracker_problem_of_the_pod_becomes_a_condition(problem: str | None, value: str, reason: str) -> None:
    received_report = report(health={"trackerProblem": problem})
    tracked_spec = spec(tracking={"reportTo": ["mlflow"], "mlflow": {"trackingUri": "http://mlflow:5000"}})
    for raw_spec, expected in ((tracked_spec, (value, reason)), (spec(), None)):
        new_status = compute_status_of(facts(spec=raw_spec, status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], last_report=received_report))
        condition = new_status.condition(Condition.TRACKERS_REACHABLE)
        assert (None if condition is None else (condition.status, condition.reason)) == expected
        assert condition is None or problem is None or condition.message == problem


def test_start_timeout_sets_the_condition_stalled_but_does_not_finish_the_job() -> None:
    raw_spec = spec(policy={"startTimeoutSeconds": 60})
    pulling_pod = pod(phase="Pending", is_ready=False, waiting_reason="ImagePullBackOff", waiting_message="no")
    late_status = compute_status_of(facts(spec=raw_spec, status=status(**RUNNING_STATUS), jobs=[job()], pods=[pulling_pod], now=at(61)))
    condition_statuses = get_condition_statuses(late_status)
    assert [condition_statuses[name] for name in ("Stalled", "Reconciling", "Finished")] == ["True", "True", "False"]
    early_status = compute_status_of(facts(spec=raw_spec, status=status(**RUNNING_STATUS), jobs=[job()], pods=[pulling_pod], now=at(59)))
    assert "Stalled" not in get_condition_statuses(early_status)


def test_start_timeout_restarts_when_pods_stop_being_ready() -> None:
    """The operator's own status writes do not cause another reconcile. So the reconcile that records the unready pods must schedule the next one."""
    raw_spec = spec(policy={"startTimeoutSeconds": 60})
    ready_status = compute_status_of(facts(spec=raw_spec, status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod()], now=at(10)))
    lost_facts = facts(spec=raw_spec, status=ready_status, jobs=[job()], pods=[pod(is_ready=False)], now=at(500))
    assert decide(lost_facts).reconcile_at == at(560)
    old_status = compute_status_of(lost_facts)
    assert "Stalled" not in get_condition_statuses(old_status)
    for seconds, is_stalled in ((559, False), (560, True)):
        later_facts = facts(spec=raw_spec, status=old_status, jobs=[job()], pods=[pod(is_ready=False)], now=at(seconds))
        assert ("Stalled" in get_condition_statuses(compute_status_of(later_facts))) is is_stalled


def test_transition_time_changes_only_if_the_status_of_the_condition_changes() -> None:
    first_status = compute_status_of(facts(status=status(**RUNNING_STATUS), jobs=[job()], pods=[pod(is_ready=False)], now=at(10)))
    second_status = compute_status_of(facts(status=first_status, jobs=[job()], pods=[pod(is_ready=False)], now=at(20)))
    third_status = compute_status_of(facts(status=second_status, jobs=[job()], pods=[pod()], now=at(30)))

    def get_transition_time(new_status: FineTuneJobStatus) -> datetime | None:
        condition = new_status.condition(Condition.PODS_READY)
        return condition.last_transition_time if condition else None

    assert (get_transition_time(first_status), get_transition_time(second_status), get_transition_time(third_status)) == (at(10), at(10), at(30))


def test_running_attempt_continues_if_its_pool_is_removed() -> None:
    raw_spec = spec(resources={"nodes": 2, "nodePool": "gone", "gpusPerNode": 1}, policy={"activeDeadlineSeconds": 100})
    pods = [pod(), pod(index=1)]
    job_facts = facts(spec=raw_spec, status=status(**RUNNING_STATUS), jobs=[job()], pods=pods, now=at(50))
    assert decide(job_facts).termination is None
    shown_status = compute_status_of(job_facts)
    assert shown_status.workers is not None and shown_status.workers.display == "2/2"
    assert get_condition_statuses(shown_status)["Accepted"] == "False"
    late_plan = decide(facts(spec=raw_spec, status=status(**RUNNING_STATUS), jobs=[job()], pods=pods, now=at(101)))
    assert late_plan.termination is not None and late_plan.termination.reason is Reason.DEADLINE_EXCEEDED
