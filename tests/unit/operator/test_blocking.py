"""The operator finds out why pods do not run: from their status, events, injected containers and scheduling gates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_operator.policies.blocking import (
    BlockingCondition,
    choose_refusal_reason,
    find_blocking_condition_in_events,
    find_blocking_condition_in_pods,
    is_admission_refusal,
)
from finetune_operator.views import TerminatedState

from tests.unit.operator.samples import T0, end_pod, parse_pod, pod

RUNNING_STATE = {"running": {"startedAt": "2026-11-21T12:00:00Z"}}

INITIALIZING_STATE = {"waiting": {"reason": "PodInitializing"}}


def test_pod_status_shows_the_blocking_condition() -> None:
    pulling_pod = replace(pod(), phase="Pending", waiting_reason="ImagePullBackOff", waiting_message="no such image")
    unschedulable_pod = replace(pod(index=1), phase="Pending", unschedulable_message="0/1 nodes")
    assert find_blocking_condition_in_pods([unschedulable_pod, pulling_pod]) == BlockingCondition(
        Reason.IMAGE_PULL_FAILED, "ImagePullBackOff: no such image"
    )
    assert find_blocking_condition_in_pods([unschedulable_pod]) == BlockingCondition(Reason.UNSCHEDULABLE, "0/1 nodes")
    assert find_blocking_condition_in_pods([pod()]) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('secret "s3" not found', Reason.CONFIG_MISSING),
        ("context deadline exceeded", Reason.PODS_NOT_READY),
        ('failed to reserve container name "trainer_0": name is reserved', Reason.PODS_NOT_READY),
    ],
)
def test_slow_container_runtime_is_not_a_missing_configuration(message: str, reason: Reason) -> None:
    waiting_pod = replace(pod(), phase="Pending", waiting_reason="CreateContainerError", waiting_message=message)
    assert find_blocking_condition_in_pods([waiting_pod]) == BlockingCondition(reason, f"CreateContainerError: {message}")


@pytest.mark.parametrize(
    ("reason", "note", "expected_reason"),
    [
        ("FailedCreate", 'pods "x" is forbidden: exceeded quota: q', Reason.QUOTA_EXCEEDED),
        ("FailedCreate", "violates PodSecurity", Reason.FORBIDDEN_BY_POLICY),
        ("FailedMount", 'secret "s3" not found', Reason.CONFIG_MISSING),
        ("Pulled", "x", None),
    ],
)
def test_warning_events_show_the_blocking_condition(reason: str, note: str, expected_reason: Reason | None) -> None:
    blocking_condition = find_blocking_condition_in_events(
        [{"reason": reason, "message": note, "lastTimestamp": "2026-11-21T12:00:00Z"}]
    )
    assert (blocking_condition.reason if blocking_condition else None) == expected_reason


def test_injected_container_that_keeps_the_pod_running_is_named() -> None:
    blocking_condition = find_blocking_condition_in_pods([parse_pod("Running", {"terminated": {"exitCode": 0}}, injected=RUNNING_STATE)])
    assert blocking_condition is not None
    assert "ended with exit code 0, but another container of the pod still runs" in blocking_condition.message
    assert find_blocking_condition_in_pods([parse_pod("Running", RUNNING_STATE, injected=RUNNING_STATE)]) is None


def test_missing_image_of_an_init_container_is_a_blocking_condition() -> None:
    blocking_condition = find_blocking_condition_in_pods(
        [parse_pod("Pending", INITIALIZING_STATE, init={"waiting": {"reason": "ErrImagePull", "message": "none"}})]
    )
    assert blocking_condition is not None
    assert (blocking_condition.reason, blocking_condition.message) == (Reason.IMAGE_PULL_FAILED, "ErrImagePull: none")
    assert find_blocking_condition_in_pods([parse_pod("Pending", INITIALIZING_STATE, init=RUNNING_STATE)]) is None


def test_blocking_condition_names_the_scheduling_gate() -> None:
    gated_condition = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "Scheduling is blocked"}
    blocking_condition = find_blocking_condition_in_pods([parse_pod("Pending", {}, conditions=[gated_condition], gates=["example.com/licence"])])
    assert blocking_condition is not None
    assert (blocking_condition.reason, blocking_condition.message) == (Reason.UNSCHEDULABLE, "Scheduling is blocked (example.com/licence)")


def test_most_important_condition_of_all_pods_is_shown() -> None:
    pods = [
        replace(pod(), phase="".join(["Run", "ning"]), terminated=TerminatedState(0)),  # a new string object, as when the phase is read from a response
        replace(pod(), phase="Pending", unschedulable_message="0/1 nodes"),
        replace(pod(), phase="Pending", waiting_reason="ErrImagePull"),
        replace(pod(), phase="Pending", waiting_reason="CreateContainerConfigError"),
    ]
    reasons = [Reason.PODS_NOT_READY, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CONFIG_MISSING]
    for count, reason in enumerate(reasons, 1):
        for order in (pods[:count], pods[:count][::-1]):
            blocking_condition = find_blocking_condition_in_pods([pod(), *order])
            assert blocking_condition is not None and blocking_condition.reason is reason


@pytest.mark.parametrize("change", [{"phase": "Failed"}, {"phase": "Succeeded"}, {"is_deleted": True}, {"waiting_reason": "ContainerCreating"}])
def test_pod_that_has_ended_or_is_about_to_start_is_not_blocked(change: dict[str, Any]) -> None:
    blocked_pod = replace(pod(), phase="Pending", waiting_reason="ErrImagePull")
    assert find_blocking_condition_in_pods([blocked_pod]) == BlockingCondition(Reason.IMAGE_PULL_FAILED, "ErrImagePull")
    assert find_blocking_condition_in_pods([replace(blocked_pod, **change)]) is None


def test_trainer_that_ended_in_a_pending_pod_does_not_block() -> None:
    assert find_blocking_condition_in_pods([replace(end_pod(pod(), 0), phase="Pending")]) is None


@pytest.mark.parametrize(
    "make_times",
    [
        lambda time: {"lastTimestamp": time},
        lambda time: {"eventTime": time, "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"}},
        lambda time: {"metadata": {"creationTimestamp": time}},
        lambda time: {"series": {"lastObservedTime": time}, "lastTimestamp": "2026-01-01T00:00:00Z"},
        lambda time: {"series": {"count": 2}, "lastTimestamp": time, "eventTime": "2026-01-01T00:00:00Z"},
    ],
    ids=["lastTimestamp", "eventTime", "creationTimestamp", "series", "lastTimestamp despite a series"],
)  # fmt: skip
def test_newest_event_with_an_explanation_is_used(make_times: Any) -> None:
    volume_event = {"reason": "FailedMount", "note": "no such volume", "lastTimestamp": T0.isoformat()}
    quota_event = {"reason": "FailedCreate", "message": "exceeded Quota"}
    unrelated_event = {"reason": "Pulled", "message": "x", "lastTimestamp": "2028-01-01T00:00:00Z"}
    undated_event = {"reason": "FailedCreate", "message": "undated"}
    volume_condition = BlockingCondition(Reason.CONFIG_MISSING, "no such volume")
    quota_condition = BlockingCondition(Reason.QUOTA_EXCEEDED, "exceeded Quota")
    for time, expected_condition in (("2026-06-01T00:00:00Z", volume_condition), ("2027-01-01T00:00:00Z", quota_condition)):
        assert find_blocking_condition_in_events([undated_event, volume_event, {**quota_event, **make_times(time)}, unrelated_event]) == expected_condition
    assert find_blocking_condition_in_events([{"reason": "FailedAttachVolume"}]) == BlockingCondition(Reason.CONFIG_MISSING, "")


@pytest.mark.parametrize(
    ("message", "is_admission", "reason"),
    [
        ('admission webhook "policy.example.com" denied the request', True, Reason.FORBIDDEN_BY_POLICY),
        ("ValidatingAdmissionPolicy 'p' denied request", True, Reason.FORBIDDEN_BY_POLICY),
        ('failed calling webhook "w": timeout', True, Reason.FORBIDDEN_BY_POLICY),
        ("exceeded quota: gpus", False, Reason.QUOTA_EXCEEDED),
        ("Job.batch is invalid", False, Reason.FORBIDDEN_BY_POLICY),
    ],
)
def test_refusal_is_traced_to_an_admission_policy_or_a_quota(message: str, is_admission: bool, reason: Reason) -> None:
    assert (is_admission_refusal(message), choose_refusal_reason(message)) == (is_admission, reason)
