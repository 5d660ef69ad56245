"""Decisions for suspend, cancellation, finished jobs and ended attempts, in every state of a job."""

from __future__ import annotations

from dataclasses import replace

import pytest
from finetune_api.names import Condition, Phase, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Checkpoint, FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.plan import Outcome, Plan, Situation

from tests.unit.operator.samples import at, condition, end_pod, facts, job, pod, report, spec, status

T = "2026-11-21T12:00:00Z"
STARTED_ATTEMPT = {"number": 1, "startTime": "2026-11-21T12:00:00Z"}
ENDED_ATTEMPT = {**STARTED_ATTEMPT, "endTime": "2026-11-21T12:01:00Z", "reason": "InternalError", "counted": True}
RUNNING_STATUS = status(attempt=1, attempts=[STARTED_ATTEMPT])
RECOVERING_STATUS = status(attempt=2, attempts=[ENDED_ATTEMPT])
PENDING_POD, STARTING_POD = pod(phase="Pending", is_ready=False, node=""), pod(is_ready=False)
STATES = {
    "not reconciled yet": (None, [], []),
    "starting, no pod": (RUNNING_STATUS, [job()], []),
    "starting, pod waits": (RUNNING_STATUS, [job()], [PENDING_POD]),
    "queued": (RUNNING_STATUS, [job(is_suspended=True, started_at=None)], []),
    "running": (RUNNING_STATUS, [job()], [pod()]),
    "recovering": (RECOVERING_STATUS, [job(failed_at=at(60), failed_reason="BackoffLimitExceeded")], [end_pod(pod(), 70)]),
}
"""For each state of a job: its status, Jobs and pods."""


def plan_of(state: str, **stop_request: bool) -> Plan:
    known, jobs, pods = STATES[state]
    return decide(facts(spec=spec(**stop_request), status=known, jobs=jobs, pods=pods, now=at(61)))


@pytest.mark.parametrize("state", STATES)
def test_suspend_creates_no_attempt_and_ends_the_running_one(state: str) -> None:
    plan = plan_of(state, suspend=True)
    assert plan.create_attempt is None
    if state in ("not reconciled yet", "recovering"):
        assert plan.situation is Situation.SUSPENDED
    else:
        assert plan.termination is not None
        assert plan.termination.reason is Reason.SUSPENDED


@pytest.mark.parametrize("state", STATES)
def test_cancel_ends_the_running_attempt_and_the_job(state: str) -> None:
    plan = plan_of(state, cancel=True)
    assert plan.create_attempt is None
    if state in ("not reconciled yet", "recovering"):
        assert plan.job_end is not None
        assert plan.job_end.outcome is Outcome.CANCELLED
    else:
        assert plan.termination is not None
        assert plan.termination.reason is Reason.CANCELLED


@pytest.mark.parametrize("state", STATES)
def test_cancel_takes_precedence_over_suspend(state: str) -> None:
    both, alone = plan_of(state, cancel=True, suspend=True), plan_of(state, cancel=True)
    assert (both.job_end, both.termination and both.termination.reason) == (
        alone.job_end,
        alone.termination and alone.termination.reason,
    )


@pytest.mark.parametrize("state", STATES)
def test_finished_job_never_starts_again(state: str) -> None:
    known, jobs, pods = STATES[state]
    finish_time = "2026-11-21T12:01:00Z"
    finished_condition = {
        "type": Condition.FINISHED,
        "status": "True",
        "reason": "Succeeded",
        "message": "",
        "lastTransitionTime": finish_time,
    }
    finished = FineTuneJobStatus.model_validate({**(known.to_wire() if known else {}), "conditions": [finished_condition]})
    for stop_request in ({}, {"suspend": False}, {"suspend": True}, {"cancel": True}):
        plan = decide(facts(spec=spec(**stop_request), status=finished, jobs=jobs, pods=pods, now=at(4000)))
        assert plan.situation is Situation.FINISHED
        assert (plan.create_attempt, plan.job_end, plan.termination) == (None, None, None)


def test_next_attempt_starts_when_the_backoff_ends() -> None:
    assert plan_of("recovering").situation is Situation.BACKING_OFF
    known, jobs, pods = STATES["recovering"]
    plan = decide(facts(status=known, jobs=jobs, pods=pods, now=at(71)))
    assert (plan.situation, plan.create_attempt) == (Situation.STARTING, 2)


NOT_READY_CONDITION = {
    "type": "PodsReady",
    "status": "False",
    "reason": "Unschedulable",
    "lastTransitionTime": "2026-11-21T12:00:00Z",
}
REFUSED_CONDITION = {**NOT_READY_CONDITION, "type": "Accepted", "reason": "UnknownNodePool"}
UNSCHEDULABLE_POD = pod(phase="Pending", is_ready=False, node="", unschedulable_message="0/9 nodes")
SUSPENDING_STATUS = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": "Suspended"}])
PASSED_LIMITS = {
    "start timeout": facts(
        status=status(attempt=1, attempts=[STARTED_ATTEMPT], conditions=[NOT_READY_CONDITION]), jobs=[job()], pods=[UNSCHEDULABLE_POD], now=at(3600)
    ),
    "start timeout while the node pool does not exist": facts(
        spec=spec(resources={"nodePool": "a100", "gpusPerNode": 1}), status=status(conditions=[REFUSED_CONDITION]), now=at(3600)
    ),
    "stall timeout of a pod that the operator cannot reach but the kubelet reports as ready": facts(
        status=RUNNING_STATUS, jobs=[job()], pods=[pod()], now=at(3600), last_report=report(stage="evaluating"), reported_at=at(0)
    ),
    "grace period of a pod with a finalizer": facts(
        status=SUSPENDING_STATUS, jobs=[job(is_deleting=True)], pods=[pod(deletion_timestamp=at(0))], now=at(3600)
    ),
    "grace period of a pod with a finalizer, without its Job": facts(
        status=SUSPENDING_STATUS, pods=[pod(deletion_timestamp=at(0))], now=at(3600)
    ),
    "grace period of an orphaned pod with a finalizer": facts(
        status=RECOVERING_STATUS, pods=[pod(deletion_timestamp=at(0), job_uid="gone")], now=at(3600)
    ),
}  # fmt: skip
"""Facts in which a time limit has passed, but the operator has nothing to do."""


@pytest.mark.parametrize("case", PASSED_LIMITS)
def test_time_limit_in_the_past_causes_no_busy_loop(case: str) -> None:
    known = PASSED_LIMITS[case]
    plan = decide(known)
    assert plan.termination is None
    assert plan.reconcile_at is not None
    assert (plan.reconcile_at - known.now).total_seconds() >= 30


def test_checkpoints_of_earlier_attempts_are_no_progress_of_the_current_one() -> None:
    """A pod lists all existing checkpoints, also those of attempts that the status no longer contains."""
    old = {"step": 500, "uri": "s3://b/checkpoints/step-00000500/a1-0123abcd"}
    idle = [{"number": n, "startTime": T, "endTime": T, "reason": "NodeLost", "counted": False} for n in range(2, 12)]
    known = status(attempt=12, attempts=[*idle, {"number": 12, "startTime": T}], checkpoints=[old], retriesUsed=3)
    received = TerminationMessage.model_validate(
        {"checkpoints": [old], "committedStep": 500, "checkpoint": old["uri"], "resumedFromStep": 300}
    )
    last = end_pod(pod(12), 70, received)
    plan = decide(facts(status=known, jobs=[job(12, failed_at=at(60))], pods=[last], now=at(61)))
    assert plan.attempt_end is not None
    assert (plan.attempt_end.made_progress, plan.attempt_end.committed_step) == (False, None)
    assert plan.job_end is not None and plan.job_end.reason is Reason.RETRIES_EXHAUSTED
    new = {"step": 600, "uri": "s3://b/checkpoints/step-00000600/a12-0123abcd"}
    received = received.model_copy(update={"checkpoints": [Checkpoint.model_validate(one) for one in (old, new)]})
    plan = decide(facts(status=known, jobs=[job(12, failed_at=at(60))], pods=[end_pod(pod(12), 70, received)], now=at(61)))
    assert plan.attempt_end is not None
    assert (plan.attempt_end.made_progress, plan.attempt_end.committed_step) == (True, 600)


# Progress and outcome of an ended attempt


def uri(step: int, attempt: int) -> str:
    return f"s3://b/checkpoints/step-{step:08d}/a{attempt}-0123abcd"


@pytest.mark.parametrize(("step", "made_progress"), [(500, False), (501, True)])
def test_committing_an_already_committed_step_is_not_progress(step: int, made_progress: bool) -> None:
    first = {**STARTED_ATTEMPT, "endTime": T, "reason": "InternalError", "committedStep": 500}
    known = status(attempt=2, attempts=[first, {"number": 2, "startTime": T}])
    message = TerminationMessage.model_validate({"checkpoints": [{"step": step, "uri": uri(step, 2)}]})
    plan = decide(facts(status=known, jobs=[job(2, failed_at=at(60))], pods=[end_pod(pod(2), 70, message)], now=at(61)))
    assert plan.attempt_end is not None
    assert (plan.attempt_end.committed_step, plan.attempt_end.made_progress) == (step, made_progress)


@pytest.mark.parametrize(("codes", "outcome"), [([0, 0], Outcome.SUCCEEDED), ([0], None), ([0, 75], None)])
def test_gang_without_its_job_succeeded_only_if_every_rank_exited_with_0(codes: list[int], outcome: Outcome | None) -> None:
    pods = [replace(end_pod(pod(index=index), code), is_deleted=True) for index, code in enumerate(codes)]
    observed = facts(spec=spec(resources={"nodes": 2, "gpusPerNode": 0}), status=RUNNING_STATUS, pods=pods, now=at(90))
    plan = decide(observed)
    assert (plan.job_end and plan.job_end.outcome) == outcome


@pytest.mark.parametrize("reason", [Reason.SUSPENDED, Reason.STALLED, Reason.NODE_LOST, Reason.PREEMPTED])
def test_fatal_exit_during_a_termination_fails_the_job(reason: Reason) -> None:
    """A data error ends the job, because the next attempt would have the same error."""
    known = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": reason}])
    over = replace(end_pod(pod(), 65), is_deleted=True)
    plan = decide(facts(spec=spec(suspend=reason is Reason.SUSPENDED), status=known, pods=[over], now=at(90)))
    assert plan.job_end is not None
    assert (plan.job_end.outcome, plan.job_end.reason) == (Outcome.FAILED, Reason.DATA_ERROR)


def test_terminating_job_that_failed_meanwhile_is_still_deleted() -> None:
    """A failure that the operator's own termination causes must not replace the recorded reason `Suspended`."""
    known = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": "Suspended"}])
    failed = job(failed_at=at(60), failed_reason="BackoffLimitExceeded")
    plan = decide(facts(spec=spec(suspend=True), status=known, jobs=[failed], pods=[end_pod(pod(), 75)], now=at(61)))
    assert (plan.situation, plan.delete_jobs) == (Situation.TERMINATING, (failed,))


def test_terminating_job_that_completed_meanwhile_succeeds() -> None:
    known = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": "Suspended"}])
    plan = decide(
        facts(
            spec=spec(suspend=True), status=known, jobs=[job(completed_at=at(60))], pods=[end_pod(pod(), 0)], now=at(61)
        )
    )
    assert plan.job_end is not None and plan.job_end.outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    ("now", "situation"), [(-3600, Situation.STARTING), (59, Situation.STARTING), (60, Situation.BACKING_OFF)]
)
def test_backoff_is_over_if_the_clock_was_set_back(now: float, situation: Situation) -> None:
    """The attempt ended at 60 s, and its backoff takes 10 s. A clock that is set back by an hour must not add an hour to the backoff."""
    known, jobs, pods = STATES["recovering"]
    assert decide(facts(status=known, jobs=jobs, pods=pods, now=at(now))).situation is situation


def test_job_of_another_owner_is_not_current_and_blocks_the_attempt() -> None:
    """The Job has the name and labels of the first attempt, but its owner reference names another owner."""
    foreign = job(is_owned=False)
    plan = decide(facts(jobs=[foreign]))
    assert (plan.situation, plan.delete_jobs) == (Situation.BLOCKED, ())
    assert plan.blocking_condition is not None and plan.blocking_condition.reason is Reason.CHILDREN_CONFLICT


@pytest.mark.parametrize("stop_request", [{"suspend": True}, {"cancel": True}, {}])
def test_job_without_the_finetunejobs_controller_reference_is_never_deleted(stop_request: dict[str, bool]) -> None:
    """The Job has a label with the FineTuneJob's uid, but no owner reference to the FineTuneJob."""
    foreign = job(is_owned=False)
    observed = facts(spec=spec(**stop_request), jobs=[foreign])
    assert observed.owned_jobs == ()
    assert decide(observed).delete_jobs == ()


def test_orphaned_pods_are_deleted_at_the_ttl_like_their_job() -> None:
    done = [condition(Condition.FINISHED, "True", "Succeeded", 100)]
    known = status(attempt=1, phase=Phase.SUCCEEDED, conditions=done, completionTime=at(100).isoformat())
    written = spec(policy={"ttlSecondsAfterFinished": 60})
    ended_pod, running_pod = end_pod(pod(), 0), pod(uid="runs", index=1)
    early = decide(facts(spec=written, status=known, pods=[ended_pod, running_pod], now=at(120)))
    assert (early.situation, early.delete_pods, early.is_clean) == (Situation.FINISHED, (running_pod,), False)
    due = decide(facts(spec=written, status=known, pods=[ended_pod], now=at(161)))
    assert (due.delete_pods, due.is_clean) == ((ended_pod,), False)
    with_job = decide(facts(spec=written, status=known, jobs=[job(completed_at=at(90))], pods=[ended_pod], now=at(161)))
    assert (with_job.delete_pods, len(with_job.delete_jobs)) == ((), 1)


def test_unfinished_job_of_an_earlier_attempt_is_deleted_while_the_pool_is_missing() -> None:
    known = status(attempt=2, attempts=[{**STARTED_ATTEMPT, "endTime": "2026-11-21T12:01:00Z", "reason": "Preempted"}])
    written = spec(resources={"nodePool": "gone", "gpusPerNode": 1})
    plan = decide(facts(spec=written, status=known, jobs=[job(1)], now=at(90)))
    assert [job.name for job in plan.delete_jobs] == ["run-1"]
