"""Deadline, stall timeout and the time of the next reconcile."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest
from finetune_operator.policies import timeouts

from tests.unit.operator.samples import T0, accept_spec, at, pod, report, spec


@pytest.mark.parametrize(
    ("limit", "active", "since", "moment"),
    [
        (100, 0.0, T0, at(100)),
        (100, 60.0, T0, at(40)),
        (100, 200.0, T0, T0),
        (None, 0.0, T0, None),
        (100, 0.0, None, None),
    ],
)
def test_deadline_counts_earlier_running_time(
    limit: int | None, active: float, since: datetime | None, moment: datetime | None
) -> None:
    assert timeouts.deadline_at(limit, active, since) == moment


@pytest.mark.parametrize(
    ("stage", "since_step", "report_age", "ready", "stalls"),
    [
        ("training", 601.0, 0, True, True),
        ("training", 599.0, 0, True, False),
        ("evaluating", 5000.0, 0, True, False),
        ("training", 550.0, 60, True, True),
        ("training", 1.0, 700, True, False),
        ("training", 1.0, 700, False, True),
    ],
)
def test_attempt_stalls_without_steps_or_without_reports_while_its_pod_is_not_ready(
    stage: str, since_step: float, report_age: int, ready: bool, stalls: bool
) -> None:
    received = report(stage=stage, health={"secondsSinceStep": since_step, "medianStepSeconds": 1.0})
    message = timeouts.stall_message(accept_spec().spec, received, T0, [replace(pod(), is_ready=ready)], at(report_age))
    assert bool(message) == stalls


def test_stall_limit_follows_the_step_time_unless_the_spec_sets_it() -> None:
    received = report(health={"medianStepSeconds": 120.0})
    assert timeouts.stall_limit_seconds(accept_spec().spec, received) == 2400.0
    assert timeouts.stall_limit_seconds(accept_spec(spec(policy={"stallTimeoutSeconds": 5})).spec, received) == 5.0


def test_next_reconcile_is_within_an_hour() -> None:
    assert timeouts.next_reconcile_at(T0, at(10), at(20), None) == at(10)
    assert timeouts.next_reconcile_at(T0, at(99999)) == at(3600)
    assert timeouts.next_reconcile_at(T0, None) is None


def test_ready_pod_does_not_stall_because_its_last_report_is_old() -> None:
    """If a network policy prevents the operator from reading reports, the attempt must not end."""
    received = report(health={"secondsSinceStep": 30.0, "medianStepSeconds": 1.0})
    assert timeouts.stall_message(accept_spec().spec, received, T0, [pod()], at(580)) == ""


@pytest.mark.parametrize(("heartbeat_age", "late"), [(3.0, False), (690.0, True), (None, True)])
def test_heartbeat_of_an_evaluation_batch_prevents_a_stall(heartbeat_age: float | None, late: bool) -> None:
    received = report(health={"secondsSinceStep": 700.0, "secondsSinceHeartbeat": heartbeat_age, "medianStepSeconds": 1.0})
    assert bool(timeouts.stall_message(accept_spec().spec, received, T0, [pod()], at(5))) is (
        late and (heartbeat_age is None or heartbeat_age + 5 > 600)
    )
