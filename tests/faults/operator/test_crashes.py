"""Crashes of the operator: at every kill point and in every phase of a job, and with changes in the cluster while the operator is down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from finetune_api.names import Condition, Phase, Reason
from finetune_operator.killpoints import KillPoint

from tests.support.kubelet import PodPlan, failure_exit, success_exit
from tests.support.rig import FINETUNEJOBS, Rig, attempt_reasons, condition_is_true, count_created, find_condition

pytestmark = pytest.mark.faults


def create_nothing(rig: Rig) -> None:
    """Do nothing, because the scenario's change creates the job."""


def start_job(rig: Rig) -> None:
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)


def create_suspended_job(rig: Rig) -> None:
    rig.submit(suspend=True)
    rig.wait_phase(Phase.SUSPENDED)


def create_job(rig: Rig) -> None:
    rig.submit()


def create_job_with_two_pods(rig: Rig) -> None:
    rig.submit(resources={"nodes": 2})


def fail_pod(rig: Rig) -> None:
    rig.kubelet.end_pod(rig.kubelet.list_pods(rig.namespace, "job")[0], failure_exit(70, message="broken"))


def complete_pod(rig: Rig) -> None:
    rig.kubelet.end_pod(rig.kubelet.list_pods(rig.namespace, "job")[0], success_exit())


def suspend_job(rig: Rig) -> None:
    rig.patch_spec(suspend=True)


def resume_job(rig: Rig) -> None:
    rig.patch_spec(suspend=False)


def cancel_job(rig: Rig) -> None:
    rig.patch_spec(cancel=True)


STATUS_POINTS = (KillPoint.BEFORE_STATUS_WRITE, KillPoint.AFTER_STATUS_WRITE)
CREATION_POINTS = (KillPoint.BEFORE_JOB_CREATE, KillPoint.AFTER_JOB_CREATE, *STATUS_POINTS)
DELETION_POINTS = (KillPoint.BEFORE_JOB_DELETE, KillPoint.AFTER_JOB_DELETE, *STATUS_POINTS)
SCENARIO_STEPS: dict[str, tuple[Callable[[Rig], None], Callable[[Rig], None], tuple[KillPoint, ...]]] = {
    "create": (create_nothing, create_job, CREATION_POINTS),
    "create two": (create_nothing, create_job_with_two_pods, (KillPoint.BEFORE_CHILD_CREATE, KillPoint.AFTER_CHILD_CREATE)),
    "fail": (start_job, fail_pod, CREATION_POINTS),
    "succeed": (start_job, complete_pod, STATUS_POINTS),
    "suspend": (start_job, suspend_job, DELETION_POINTS),
    "resume": (create_suspended_job, resume_job, CREATION_POINTS),
    "cancel": (start_job, cancel_job, DELETION_POINTS),
}
"""For each scenario: a function that prepares the job, a function that changes the job, and the kill points that the operator reaches afterwards."""
EXPECTED_ATTEMPTS: dict[str, list[tuple[int, str]]] = {
    "create": [(1, Reason.SUCCEEDED)],
    "create two": [(1, Reason.SUCCEEDED)],
    "fail": [(1, Reason.INTERNAL_ERROR), (2, Reason.SUCCEEDED)],
    "succeed": [(1, Reason.SUCCEEDED)],
    "suspend": [(1, Reason.SUSPENDED)],
    "resume": [(1, Reason.SUCCEEDED)],
    "cancel": [(1, Reason.CANCELLED)],
}
EXPECTED_EVENTS: dict[str, list[str]] = {
    "create": [Reason.ATTEMPT_STARTED, Reason.SUCCEEDED],
    "create two": [Reason.ATTEMPT_STARTED, Reason.SUCCEEDED],
    "fail": [
        Reason.ATTEMPT_STARTED, Reason.INTERNAL_ERROR, Reason.RETRYING, Reason.ATTEMPT_STARTED,
        Reason.SUCCEEDED,
    ],
    "succeed": [Reason.ATTEMPT_STARTED, Reason.SUCCEEDED],
    "suspend": [Reason.ATTEMPT_STARTED, Reason.SUSPENDED],
    "resume": [Reason.ACCEPTED, Reason.SUSPENDED, Reason.RESUMED, Reason.ATTEMPT_STARTED, Reason.SUCCEEDED],
    "cancel": [Reason.ATTEMPT_STARTED, Reason.CANCELLED],
}  # fmt: skip
"""Reasons of the events that must exist at the end of each scenario, for every kill point."""


def test_every_kill_point_is_covered() -> None:
    """The scenarios reach all kill points except the forced deletion of a pod, which `test_the_operator_is_killed_after_the_forced_removal_of_a_pod`
    covers.
    """
    covered_points = {point for _, _, points in SCENARIO_STEPS.values() for point in points}
    assert covered_points == set(KillPoint) - {KillPoint.AFTER_POD_DELETE}


@pytest.mark.row(2)
def test_the_operator_is_killed_after_the_forced_removal_of_a_pod(rig: Rig) -> None:
    operator = rig.start_operator()
    rig.kubelet.set_plan(rig.namespace, PodPlan(when_deleted=None))
    rig.submit(policy={"terminationGracePeriodSeconds": 1})
    rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)
    operator.kill_at(KillPoint.AFTER_POD_DELETE)
    rig.patch_spec(suspend=True)
    assert operator.wait_end() == -9
    rig.start_operator()
    body = rig.wait_phase(Phase.SUSPENDED)
    assert attempt_reasons(body) == [(1, Reason.SUSPENDED)]
    assert rig.kubelet.wait_pods(rig.namespace, "job", lambda pods: not pods) == []


@pytest.mark.row(21)
def test_orphaned_pods_end_before_the_next_attempt_starts(rig: Rig) -> None:
    rig.start_operator()
    start_job(rig)
    first_pod = rig.kubelet.list_pods(rig.namespace, "job")[0]
    rig.api.delete("jobs", rig.namespace, "job-1", propagationPolicy="Orphan")
    body = rig.wait_attempt(2)
    assert attempt_reasons(body) == [(1, Reason.PREEMPTED), (2, "")]
    assert rig.api.find("pods", rig.namespace, first_pod.name) is None


@pytest.mark.row(2)
@pytest.mark.parametrize(("scenario", "point"), [(m, p) for m, (_, _, points) in SCENARIO_STEPS.items() for p in points])
def test_a_job_continues_after_the_operator_is_killed_at_each_point(rig: Rig, scenario: str, point: str) -> None:
    prepare_job, change_job, _ = SCENARIO_STEPS[scenario]
    operator = rig.start_operator()
    prepare_job(rig)
    operator.kill_at(point)
    change_job(rig)
    assert operator.wait_end() == -9
    rig.start_operator()
    if scenario in ("create", "create two", "fail", "resume"):
        attempt, count = 2 if scenario == "fail" else 1, 2 if scenario == "create two" else 1
        for pod in rig.kubelet.wait_running(rig.namespace, "job", attempt=attempt, count=count):
            rig.kubelet.end_pod(pod, success_exit())
    body = rig.wait_phase(Phase.SUSPENDED) if scenario == "suspend" else rig.wait_finished()
    assert attempt_reasons(body) == EXPECTED_ATTEMPTS[scenario]
    assert body["status"].get("retriesUsed", 0) == (1 if scenario == "fail" else 0)
    assert len(rig.list_job_names()) <= len(EXPECTED_ATTEMPTS[scenario])
    events = rig.list_event_notes()
    assert len(events) == len(set(events)), "an event was emitted twice"
    assert Counter(EXPECTED_EVENTS[scenario]) - Counter(reason for reason, _ in events) == Counter(), "an event is missing"


@pytest.mark.row(5)
def test_an_attempt_that_ends_while_the_operator_is_down_is_read_from_its_pods(rig: Rig) -> None:
    operator = rig.start_operator()
    start_job(rig)
    operator.stop()
    complete_pod(rig)
    rig.api.wait("jobs", rig.namespace, "job-1", lambda body: condition_is_true(body, "Complete"))
    rig.start_operator()
    body = rig.wait_finished()
    assert attempt_reasons(body) == [(1, Reason.SUCCEEDED)]
    assert body["status"]["output"]["uri"] == "s3://bucket/model"


@pytest.mark.row(5)
def test_an_attempt_whose_end_was_not_observed_is_reported_as_unobserved(rig: Rig) -> None:
    operator = rig.start_operator()
    start_job(rig)
    operator.stop()
    complete_pod(rig)
    rig.api.wait("jobs", rig.namespace, "job-1", lambda body: condition_is_true(body, "Complete"))
    rig.api.delete("jobs", rig.namespace, "job-1", propagationPolicy="Foreground")
    rig.api.wait_gone("jobs", rig.namespace, "job-1")
    rig.start_operator()
    body = rig.wait_attempt(2)
    first_attempt = body["status"]["attempts"][0]
    assert first_attempt["endTime"]
    assert "before the operator read their exit codes" in first_attempt["message"]
    assert body["status"]["retriesUsed"] == 1
    rig.wait_event(Reason.RETRYING)


@pytest.mark.row(28)
def test_a_deadline_that_passes_while_the_operator_is_down_ends_the_job(rig: Rig) -> None:
    operator = rig.start_operator()
    rig.submit(policy={"activeDeadlineSeconds": 4})
    rig.kubelet.wait_running(rig.namespace, "job")
    body = rig.wait_attempt(1)
    operator.stop()
    start_time = body["status"]["attempts"][0]["startTime"]
    rig.api.wait_list("nodes", None, lambda items: _compute_seconds_since(start_time) > 5, timeout=60)
    rig.start_operator()
    body = rig.wait_finished()
    assert attempt_reasons(body) == [(1, Reason.DEADLINE_EXCEEDED)]
    assert find_condition(body, Condition.SUCCEEDED)["reason"] == Reason.DEADLINE_EXCEEDED
    assert body["status"]["failure"]["class"] == "User"
    rig.kubelet.wait_pods(rig.namespace, "job", lambda pods: not pods)


def _compute_seconds_since(time: str) -> float:
    from datetime import UTC, datetime

    return (datetime.now(UTC) - datetime.fromisoformat(time.replace("Z", "+00:00"))).total_seconds()


def test_a_job_that_is_cancelled_while_the_operator_is_down_never_starts(rig: Rig) -> None:
    rig.submit()
    rig.patch_spec(cancel=True)
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    body = rig.wait_finished()
    assert body["status"]["phase"] == Phase.CANCELLED
    assert count_created(proxy, "jobs") == 0


def test_the_attempt_number_is_recovered_from_the_job_names(rig: Rig) -> None:
    """The operator reads the attempt number from the Jobs' names if the status is lost."""
    operator = rig.start_operator()
    start_job(rig)
    fail_pod(rig)
    rig.kubelet.wait_running(rig.namespace, "job", attempt=2)
    rig.wait_attempt(2)
    operator.stop()
    rig.api.request(
        "PATCH", f"/apis/finetune-operator.io/v1alpha1/namespaces/{rig.namespace}/{FINETUNEJOBS}/job/status",
        [{"op": "replace", "path": "/status", "value": {"observedGeneration": -1}}], patch_type="json",
    )  # fmt: skip
    rig.kubelet.set_plan(rig.namespace, PodPlan())
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job", attempt=2)[0], success_exit())
    body = rig.wait_finished()
    assert body["status"]["attempt"] == 2
    assert count_created(proxy, "jobs") == 0
