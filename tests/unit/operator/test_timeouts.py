"""The deadline and the stall timeout of a job, and the time for which the next reconcile is scheduled."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest
from finetune_operator.policies import timeouts
from finetune_operator.views import PodView

from tests.unit.operator.samples import T0, accept_spec, at, end_pod, pod, report, spec

SHORT_STALL_TIMEOUT = accept_spec(spec(policy={"stallTimeoutSeconds": 60})).spec
UNREADY_POD = replace(pod(), is_ready=False)


@pytest.mark.parametrize(
    ("limit_seconds", "active_seconds", "running_since", "deadline"),
    [
        (100, 0.0, T0, at(100)),
        (100, 30.0, T0, at(70)),
        (100, 99.5, T0, at(0.5)),
        (100, 200.0, T0, T0),
        (None, 0.0, T0, None),
        (100, 0.0, None, None),
        (None, 0.0, None, None),
    ],
)
def test_deadline_counts_earlier_running_time(
    limit_seconds: int | None, active_seconds: float, running_since: datetime | None, deadline: datetime | None
) -> None:
    assert timeouts.compute_deadline(limit_seconds, active_seconds, running_since) == deadline


@pytest.mark.parametrize(
    ("stage", "seconds_since_step", "report_age_seconds", "is_ready", "is_stalled"),
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
    stage: str, seconds_since_step: float, report_age_seconds: int, is_ready: bool, is_stalled: bool
) -> None:
    received_report = report(stage=stage, health={"secondsSinceStep": seconds_since_step, "medianStepSeconds": 1.0})
    message = timeouts.describe_stall(accept_spec().spec, received_report, T0, [replace(pod(), is_ready=is_ready)], at(report_age_seconds))
    assert bool(message) == is_stalled


def test_next_reconcile_is_within_an_hour() -> None:
    assert timeouts.compute_next_reconcile(T0, at(10), at(20), None) == at(10)
    assert timeouts.compute_next_reconcile(T0, at(99999)) == at(3600)
    assert timeouts.compute_next_reconcile(T0, at(3601), at(7200)) == at(3600)
    assert timeouts.compute_next_reconcile(T0, at(-10), T0, at(30)) == at(30)
    assert timeouts.compute_next_reconcile(T0, at(-10), T0) == at(3600)
    assert timeouts.compute_next_reconcile(T0, None) is None


@pytest.mark.parametrize(("heartbeat_age_seconds", "is_late"), [(3.0, False), (690.0, True), (None, True)])
def test_heartbeat_of_an_evaluation_batch_prevents_a_stall(heartbeat_age_seconds: float | None, is_late: bool) -> None:
    received_report = report(health={"secondsSinceStep": 700.0, "secondsSinceHeartbeat": heartbeat_age_seconds, "medianStepSeconds": 1.0})
    assert bool(timeouts.describe_stall(accept_spec().spec, received_report, T0, [pod()], at(5))) is (
        is_late and (heartbeat_age_seconds is None or heartbeat_age_seconds + 5 > 600)
    )


@pytest.mark.parametrize(("start", "seconds"), [(None, 0.0), (at(5), 0.0), (T0, 0.0), (at(-0.5), 0.5), (at(-90), 90.0)])
def test_seconds_between_are_never_negative(start: datetime | None, seconds: float) -> None:
    assert timeouts.seconds_between(start, T0) == seconds


@pytest.mark.parametrize(
    ("ttl_seconds", "completed_at", "expires_at"),
    [(60, T0, at(60)), (0, T0, T0), (None, T0, None), (60, None, None), (None, None, None)],
)
def test_ttl_starts_when_the_job_completes(
    ttl_seconds: int | None, completed_at: datetime | None, expires_at: datetime | None
) -> None:
    assert timeouts.compute_ttl_end(ttl_seconds, completed_at) == expires_at


@pytest.mark.parametrize(("median_seconds", "limit_seconds"), [(None, 600.0), (30.0, 600.0), (30.5, 610.0)])
def test_default_stall_limit_is_20_steps_but_at_least_ten_minutes(median_seconds: float | None, limit_seconds: float) -> None:
    assert timeouts.compute_stall_limit_seconds(accept_spec().spec, report(health={"medianStepSeconds": median_seconds})) == limit_seconds
    assert timeouts.compute_stall_limit_seconds(accept_spec().spec, None) == 600.0


@pytest.mark.parametrize(
    ("seconds_since_step", "report_age_seconds", "message"),
    [
        (590.0, 10, ""),
        (590.0, 11, "no rank has reported progress for 601 s; the stall timeout is 600 s"),
        (5000.0, 119.5, "no rank has reported progress for 5120 s; the stall timeout is 600 s"),
        (5000.0, 120, ""),
        (None, 100, ""),
    ],
)
def test_run_without_steps_stalls_only_while_its_report_is_new(seconds_since_step: float | None, report_age_seconds: float, message: str) -> None:
    received_report = report(health={"secondsSinceStep": seconds_since_step})
    assert timeouts.describe_stall(accept_spec().spec, received_report, T0, [pod()], at(report_age_seconds)) == message


def test_report_older_than_a_short_stall_timeout_is_ignored() -> None:
    received_report = report(health={"secondsSinceStep": 30.0})
    assert timeouts.describe_stall(SHORT_STALL_TIMEOUT, received_report, T0, [pod()], at(31)).startswith("no rank has reported progress for 61 s")
    assert timeouts.describe_stall(SHORT_STALL_TIMEOUT, received_report, T0, [pod()], at(60)) == ""


@pytest.mark.parametrize(
    ("pods", "reported_at", "unready_since", "seconds"),
    [
        ([UNREADY_POD], at(-61), None, 61), ([UNREADY_POD], at(-60), None, None), ([UNREADY_POD], at(-59), None, None),
        ([UNREADY_POD], None, None, None),
        ([UNREADY_POD], at(-90), at(-61), 61), ([UNREADY_POD], at(-61), at(-90), 61), ([UNREADY_POD], at(-90), at(-60), None),
        ([], at(-61), None, None), ([end_pod(pod(), 70)], at(-61), None, None),
        ([UNREADY_POD, end_pod(pod(), 70)], at(-61), None, 61), ([UNREADY_POD, pod(index=1)], at(-61), None, None),
        ([UNREADY_POD, replace(UNREADY_POD, deletion_timestamp=T0)], at(-61), None, None),
    ],
)  # fmt: skip
def test_running_pods_stall_if_none_has_answered_or_been_ready_for_the_stall_timeout(
    pods: list[PodView], reported_at: datetime | None, unready_since: datetime | None, seconds: int | None
) -> None:
    message = timeouts.describe_stall(SHORT_STALL_TIMEOUT, None, reported_at, pods, T0, unready_since)
    expected = f"the pods have not answered for {seconds} s and are not ready; the stall timeout is 60 s"
    assert message == (expected if seconds else "")


def test_node_is_lost_if_its_pod_exists_longer_than_the_margin_after_its_grace_period() -> None:
    lost_pod, deleted_pod = replace(pod(), deletion_timestamp=at(-31)), replace(pod(), deletion_timestamp=at(-31), is_deleted=True)
    assert timeouts.find_pods_of_lost_nodes([replace(pod(), deletion_timestamp=at(-29))], 30.0, T0) == []
    assert timeouts.find_pods_of_lost_nodes([pod(), lost_pod, deleted_pod, replace(pod(), deletion_timestamp=at(-30))], 30.0, T0) == [lost_pod]
