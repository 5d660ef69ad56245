"""The reason why pods do not run, found in their status, events, injected containers and scheduling gates."""

from __future__ import annotations

from dataclasses import replace

import pytest
from finetune_api.names import Reason
from finetune_operator.policies.blocking import (
    BlockingCondition,
    blocking_condition_of_events,
    blocking_condition_of_pods,
)

from tests.unit.operator.samples import parse_pod, pod

RUNNING_STATE = {"running": {"startedAt": "2026-11-21T12:00:00Z"}}

INITIALIZING_STATE = {"waiting": {"reason": "PodInitializing"}}


def test_pod_status_shows_the_blocking_condition() -> None:
    pulling_pod = replace(pod(), phase="Pending", waiting_reason="ImagePullBackOff", waiting_message="no such image")
    unschedulable_pod = replace(pod(index=1), phase="Pending", unschedulable_message="0/1 nodes")
    assert blocking_condition_of_pods([unschedulable_pod, pulling_pod]) == BlockingCondition(
        Reason.IMAGE_PULL_FAILED, "ImagePullBackOff: no such image"
    )
    assert blocking_condition_of_pods([unschedulable_pod]) == BlockingCondition(Reason.UNSCHEDULABLE, "0/1 nodes")
    assert blocking_condition_of_pods([pod()]) is None


@pytest.mark.parametrize(
    ("reason", "note", "found"),
    [
        ("FailedCreate", 'pods "x" is forbidden: exceeded quota: q', Reason.QUOTA_EXCEEDED),
        ("FailedCreate", "violates PodSecurity", Reason.FORBIDDEN_BY_POLICY),
        ("FailedMount", 'secret "s3" not found', Reason.CONFIG_MISSING),
        ("Pulled", "x", None),
    ],
)
def test_warning_events_show_the_blocking_condition(reason: str, note: str, found: Reason | None) -> None:
    waiting = blocking_condition_of_events(
        [{"reason": reason, "message": note, "lastTimestamp": "2026-11-21T12:00:00Z"}]
    )
    assert (waiting.reason if waiting else None) == found


def test_injected_container_that_keeps_the_pod_running_is_named() -> None:
    blocking = blocking_condition_of_pods([parse_pod("Running", {"terminated": {"exitCode": 0}}, injected=RUNNING_STATE)])
    assert blocking is not None
    assert "ended with exit code 0, but another container of the pod still runs" in blocking.message
    assert blocking_condition_of_pods([parse_pod("Running", RUNNING_STATE, injected=RUNNING_STATE)]) is None


def test_missing_image_of_an_init_container_is_shown() -> None:
    blocking = blocking_condition_of_pods(
        [parse_pod("Pending", INITIALIZING_STATE, init={"waiting": {"reason": "ErrImagePull", "message": "none"}})]
    )
    assert blocking is not None
    assert (blocking.reason, blocking.message) == (Reason.IMAGE_PULL_FAILED, "ErrImagePull: none")
    assert blocking_condition_of_pods([parse_pod("Pending", INITIALIZING_STATE, init=RUNNING_STATE)]) is None


def test_scheduling_gate_is_named() -> None:
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "Scheduling is blocked"}
    blocking = blocking_condition_of_pods([parse_pod("Pending", {}, conditions=[gated], gates=["example.com/licence"])])
    assert blocking is not None
    assert (blocking.reason, blocking.message) == (Reason.UNSCHEDULABLE, "Scheduling is blocked (example.com/licence)")
