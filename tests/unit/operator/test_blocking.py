"""What keeps pods from running: their status, events, injected containers, gates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import CONTAINER, MANAGER, Label, Reason
from finetune_operator.policies.blocking import (
    BlockingCondition,
    blocking_condition_of_events,
    blocking_condition_of_pods,
)
from finetune_operator.views import PodView, read_pod

from tests.unit.operator.samples import UID, pod


def seen(phase: str, trainer: dict[str, Any], *, beside: dict[str, Any] | None = None, init: dict[str, Any] | None = None,
         conditions: list[dict[str, Any]] | None = None, gates: list[str] | None = None) -> PodView:  # fmt: skip
    """A pod read from JSON, with the states of its trainer, of an injected container that sorts before it, and of an init container."""
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


def test_pod_status_shows_the_blocking_condition() -> None:
    pulling = replace(pod(), phase="Pending", waiting_reason="ImagePullBackOff", waiting_message="no such image")
    placed = replace(pod(index=1), phase="Pending", unschedulable="0/1 nodes")
    assert blocking_condition_of_pods([placed, pulling]) == BlockingCondition(
        Reason.IMAGE_PULL_FAILED, "ImagePullBackOff: no such image"
    )
    assert blocking_condition_of_pods([placed]) == BlockingCondition(Reason.UNSCHEDULABLE, "0/1 nodes")
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
    found = blocking_condition_of_pods([seen("Running", {"terminated": {"exitCode": 0}}, beside=RUNS)])
    assert found is not None
    assert "ended with exit code 0, and another container of the pod still runs" in found.message
    assert blocking_condition_of_pods([seen("Running", RUNS, beside=RUNS)]) is None


def test_missing_image_of_an_init_container_is_shown() -> None:
    found = blocking_condition_of_pods(
        [seen("Pending", INITIALIZING, init={"waiting": {"reason": "ErrImagePull", "message": "none"}})]
    )
    assert found is not None
    assert (found.reason, found.message) == (Reason.IMAGE_PULL_FAILED, "ErrImagePull: none")
    assert blocking_condition_of_pods([seen("Pending", INITIALIZING, init=RUNS)]) is None


def test_scheduling_gate_is_named() -> None:
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "Scheduling is blocked"}
    found = blocking_condition_of_pods([seen("Pending", {}, conditions=[gated], gates=["example.com/licence"])])
    assert found is not None
    assert (found.reason, found.message) == (Reason.UNSCHEDULABLE, "Scheduling is blocked (example.com/licence)")
