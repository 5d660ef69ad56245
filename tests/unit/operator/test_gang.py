"""If some pods of a gang find no node, the other pods must not occupy their nodes forever. A gang that waits in a queue keeps waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from finetune_api.exits import RetryPolicy
from finetune_api.names import Condition, Reason
from finetune_api.status import Attempt
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.plan import Situation
from finetune_operator.policies.acceptance import accept
from finetune_operator.policies.retry import TERMINATION_RETRY, compute_backoff_seconds, compute_blocked_retry_seconds
from finetune_operator.settings import RetrySettings

from tests.unit.operator.samples import CONFIG, T0, UID, at, end_pod, facts, job, pod, spec, status

STARTED_ATTEMPT: dict[str, Any] = {"number": 1, "startTime": at(0).isoformat()}
UNREADY_CONDITION = {"type": Condition.PODS_READY, "status": "False", "reason": "Unschedulable", "message": "", "lastTransitionTime": at(0).isoformat()}
UNREADY_STATUS = status(attempt=1, attempts=[STARTED_ATTEMPT], conditions=[UNREADY_CONDITION])
GANG_SPEC = spec(resources={"nodes": 3}, policy={"startTimeoutSeconds": 600})


def make_waiting_gang(placed_count: int, *, nodes: int = 3, created_count: int = 3, now_seconds: float = 600, **job_fields: Any) -> Facts:
    """Return facts about a gang that needs `nodes` pods: `created_count` pods exist, and `placed_count` of the existing pods have a node."""
    pods = [
        pod(index=index, phase="Pending", is_ready=False, node="node-1" if index < placed_count else "")
        for index in range(created_count)
    ]
    return facts(spec=GANG_SPEC, status=UNREADY_STATUS, jobs=[job(pod_count=nodes, **job_fields)], pods=pods, now=at(now_seconds))


@pytest.mark.parametrize(("nodes", "placed_count", "created_count"), [(2, 1, 2), (2, 1, 1), (3, 1, 3), (3, 2, 3), (3, 1, 1), (3, 2, 2)])
def test_incomplete_gang_is_ended_at_the_start_timeout(nodes: int, placed_count: int, created_count: int) -> None:
    """Pods that have no node may be unschedulable, and missing pods may not exist because they would exceed a quota."""
    for now_seconds in (600, 601):
        plan = decide(make_waiting_gang(placed_count, nodes=nodes, created_count=created_count, now_seconds=now_seconds))
        assert plan.termination is not None
        assert plan.termination.reason is Reason.GANG_INCOMPLETE
        assert f"{placed_count} of {nodes} pods have a node" in plan.termination.message
    assert decide(make_waiting_gang(placed_count, nodes=nodes, created_count=created_count, now_seconds=599)).termination is None


@pytest.mark.parametrize(("placed_count", "created_count"), [(0, 3), (3, 3), (0, 0)])
def test_gang_keeps_waiting_if_none_or_all_of_its_pods_have_a_node(placed_count: int, created_count: int) -> None:
    """If no pod has a node, an autoscaler may still be adding nodes. If all pods have a node, they may still be pulling the image."""
    plan = decide(make_waiting_gang(placed_count, created_count=created_count))
    assert (plan.situation, plan.termination) == (Situation.ACTIVE, None)


def test_gang_in_a_queue_keeps_waiting() -> None:
    assert decide(make_waiting_gang(1, queue="team-a")).termination is None


def test_gang_with_an_unreadable_spec_keeps_waiting() -> None:
    """The operator cannot read the spec, which may set a longer start timeout. If it ended this attempt, it could not start another one from this spec."""
    job_facts = make_waiting_gang(1, now_seconds=1e6)
    unreadable_job = replace(job_facts.job, spec={**GANG_SPEC, "newer": {"field": 1}})
    plan = decide(replace(job_facts, job=unreadable_job, acceptance=accept(unreadable_job.spec, CONFIG)))
    assert (plan.situation, plan.termination) == (Situation.ACTIVE, None)


@pytest.mark.parametrize(("placed_count", "created_count"), [(0, 0), (0, 1), (1, 1)])
def test_single_pod_keeps_waiting(placed_count: int, created_count: int) -> None:
    assert decide(make_waiting_gang(placed_count, nodes=1, created_count=created_count)).termination is None


def test_gang_with_a_finished_pod_is_not_terminated() -> None:
    job_facts = make_waiting_gang(2)
    pods = (replace(end_pod(job_facts.pods[0], 0), is_deleted=True), *job_facts.pods[1:])
    assert decide(replace(job_facts, pods=pods)).termination is None


def test_incomplete_gang_is_retried_uncounted_after_a_delay() -> None:
    assert TERMINATION_RETRY.get(Reason.GANG_INCOMPLETE, RetryPolicy.NOT_COUNTED) is RetryPolicy.NOT_COUNTED
    terminated_status = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": Reason.GANG_INCOMPLETE, "message": "1 of 3"}], retriesUsed=3)
    plan = decide(facts(spec=GANG_SPEC, status=terminated_status, now=at(700)))
    assert plan.attempt_end is not None and plan.job_end is None
    assert (plan.attempt_end.reason, plan.attempt_end.is_counted, plan.attempt_end.next_attempt) == (Reason.GANG_INCOMPLETE, False, 2)
    ended_attempt = {**STARTED_ATTEMPT, "endTime": at(700).isoformat(), "reason": Reason.GANG_INCOMPLETE}
    assert decide(facts(spec=GANG_SPEC, status=status(attempt=2, attempts=[ended_attempt]), now=at(701))).situation is Situation.BACKING_OFF


def make_incomplete_attempts(count: int) -> list[Attempt]:
    return [Attempt(number=n, reason=Reason.GANG_INCOMPLETE, counted=False, end_time=T0) for n in range(1, count + 1)]


def test_delay_of_incomplete_gangs_grows_and_differs_between_jobs() -> None:
    settings = RetrySettings(base_seconds=10, max_seconds=600)
    delays_seconds = [compute_backoff_seconds(make_incomplete_attempts(count), settings, UID) for count in range(1, 5)]
    for count, delay in enumerate(delays_seconds):
        assert 0.5 * 10 * 2**count <= delay <= 1.5 * 10 * 2**count
    assert delays_seconds == [compute_backoff_seconds(make_incomplete_attempts(count), settings, UID) for count in range(1, 5)]
    assert len({compute_backoff_seconds(make_incomplete_attempts(1), settings, f"job-{n}") for n in range(20)}) == 20


def test_trainer_that_is_too_old_is_retried_after_a_backoff() -> None:
    attempts = [Attempt(number=1, reason=Reason.TRAINER_TOO_OLD, counted=False, end_time=T0)]
    assert compute_backoff_seconds(attempts, RetrySettings(base_seconds=10, max_seconds=600)) == 10


@pytest.mark.parametrize(("blocked_seconds", "pause_seconds"), [(0, 15), (20, 15), (100, 50), (9999, 300)])
def test_refused_create_is_repeated_with_a_growing_pause(blocked_seconds: float, pause_seconds: float) -> None:
    assert compute_blocked_retry_seconds(blocked_seconds) == pause_seconds
