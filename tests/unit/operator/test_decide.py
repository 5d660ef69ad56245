"""What the operator decides when a user suspends or cancels a job, when a job has finished and when an attempt has ended, in every state of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from finetune_api.names import Condition, FailureClass, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Checkpoint, Failure, FineTuneJobStatus
from finetune_operator.decide import decide
from finetune_operator.plan import JobEnd, Outcome, Plan, Situation, Termination
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.policies.verdict import RefusedSpec
from finetune_operator.views import JobView, PodView

from tests.unit.operator.samples import UID, at, condition, end_pod, facts, job, pod, report, spec, status

START_TIME = "2026-11-21T12:00:00Z"
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
"""For each state of a FineTuneJob: its status, its Jobs and its pods."""


def decide_in_state(state: str, **stop_request: bool) -> Plan:
    old_status, jobs, pods = STATES[state]
    return decide(facts(spec=spec(**stop_request), status=old_status, jobs=jobs, pods=pods, now=at(61)))


@pytest.mark.parametrize("state", STATES)
def test_suspend_creates_no_attempt_and_ends_the_running_one(state: str) -> None:
    plan = decide_in_state(state, suspend=True)
    assert plan.attempt_to_create is None
    if state in ("not reconciled yet", "recovering"):
        assert plan.situation is Situation.SUSPENDED
    else:
        assert plan.termination is not None
        assert plan.termination.reason is Reason.SUSPENDED


@pytest.mark.parametrize("state", STATES)
def test_cancel_ends_the_running_attempt_and_the_job(state: str) -> None:
    plan = decide_in_state(state, cancel=True)
    assert plan.attempt_to_create is None
    if state in ("not reconciled yet", "recovering"):
        assert plan.job_end is not None
        assert plan.job_end.outcome is Outcome.CANCELLED
    else:
        assert plan.termination is not None
        assert plan.termination.reason is Reason.CANCELLED


@pytest.mark.parametrize("state", STATES)
def test_cancel_takes_precedence_over_suspend(state: str) -> None:
    plan_of_both, plan_of_cancel = decide_in_state(state, cancel=True, suspend=True), decide_in_state(state, cancel=True)
    assert (plan_of_both.job_end, plan_of_both.termination and plan_of_both.termination.reason) == (
        plan_of_cancel.job_end,
        plan_of_cancel.termination and plan_of_cancel.termination.reason,
    )


@pytest.mark.parametrize("state", STATES)
def test_finished_job_never_starts_again(state: str) -> None:
    old_status, jobs, pods = STATES[state]
    finish_time = "2026-11-21T12:01:00Z"
    finished_condition = {
        "type": Condition.FINISHED,
        "status": "True",
        "reason": "Succeeded",
        "message": "",
        "lastTransitionTime": finish_time,
    }
    finished_status = FineTuneJobStatus.model_validate({**(old_status.to_wire() if old_status else {}), "conditions": [finished_condition]})
    for stop_request in ({}, {"suspend": False}, {"suspend": True}, {"cancel": True}):
        plan = decide(facts(spec=spec(**stop_request), status=finished_status, jobs=jobs, pods=pods, now=at(4000)))
        assert plan.situation is Situation.FINISHED
        assert (plan.attempt_to_create, plan.job_end, plan.termination) == (None, None, None)


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
"""Facts in which a time limit has passed, although the operator has nothing to do."""


@pytest.mark.parametrize("case", PASSED_LIMITS)
def test_time_limit_in_the_past_causes_no_busy_loop(case: str) -> None:
    job_facts = PASSED_LIMITS[case]
    plan = decide(job_facts)
    assert plan.termination is None
    assert plan.reconcile_at is not None
    assert (plan.reconcile_at - job_facts.now).total_seconds() >= 30


def test_checkpoints_of_earlier_attempts_are_no_progress_of_the_current_one() -> None:
    """A pod's report lists all existing checkpoints, including the checkpoints of attempts that the status no longer lists."""
    old_checkpoint = {"step": 500, "uri": "s3://b/checkpoints/step-00000500/a1-0123abcd"}
    earlier_attempts = [{"number": n, "startTime": START_TIME, "endTime": START_TIME, "reason": "NodeLost", "counted": False} for n in range(2, 12)]
    old_status = status(attempt=12, attempts=[*earlier_attempts, {"number": 12, "startTime": START_TIME}], checkpoints=[old_checkpoint], retriesUsed=3)
    message = TerminationMessage.model_validate(
        {"checkpoints": [old_checkpoint], "committedStep": 500, "checkpoint": old_checkpoint["uri"], "resumedFromStep": 300}
    )
    last_pod = end_pod(pod(12), 70, message)
    plan = decide(facts(status=old_status, jobs=[job(12, failed_at=at(60))], pods=[last_pod], now=at(61)))
    assert plan.attempt_end is not None
    assert (plan.attempt_end.made_progress, plan.attempt_end.committed_step) == (False, None)
    assert plan.job_end is not None and plan.job_end.reason is Reason.RETRIES_EXHAUSTED
    new_checkpoint = {"step": 600, "uri": "s3://b/checkpoints/step-00000600/a12-0123abcd"}
    message = message.model_copy(update={"checkpoints": [Checkpoint.model_validate(checkpoint) for checkpoint in (old_checkpoint, new_checkpoint)]})
    plan = decide(facts(status=old_status, jobs=[job(12, failed_at=at(60))], pods=[end_pod(pod(12), 70, message)], now=at(61)))
    assert plan.attempt_end is not None
    assert (plan.attempt_end.made_progress, plan.attempt_end.committed_step) == (True, 600)


# Progress and outcome of an ended attempt


def build_uri(step: int, attempt: int) -> str:
    return f"s3://b/checkpoints/step-{step:08d}/a{attempt}-0123abcd"


@pytest.mark.parametrize(("step", "made_progress"), [(500, False), (501, True)])
def test_committing_an_already_committed_step_is_not_progress(step: int, made_progress: bool) -> None:
    first_attempt = {**STARTED_ATTEMPT, "endTime": START_TIME, "reason": "InternalError", "committedStep": 500}
    old_status = status(attempt=2, attempts=[first_attempt, {"number": 2, "startTime": START_TIME}])
    message = TerminationMessage.model_validate({"checkpoints": [{"step": step, "uri": build_uri(step, 2)}]})
    plan = decide(facts(status=old_status, jobs=[job(2, failed_at=at(60))], pods=[end_pod(pod(2), 70, message)], now=at(61)))
    assert plan.attempt_end is not None
    assert (plan.attempt_end.committed_step, plan.attempt_end.made_progress) == (step, made_progress)


@pytest.mark.parametrize(("codes", "outcome"), [([0, 0], Outcome.SUCCEEDED), ([0], None), ([0, 75], None)])
def test_gang_whose_job_was_deleted_succeeded_only_if_every_rank_exited_with_0(codes: list[int], outcome: Outcome | None) -> None:
    pods = [replace(end_pod(pod(index=index), code), is_deleted=True) for index, code in enumerate(codes)]
    job_facts = facts(spec=spec(resources={"nodes": 2, "gpusPerNode": 0}), status=RUNNING_STATUS, pods=pods, now=at(90))
    plan = decide(job_facts)
    assert (plan.job_end and plan.job_end.outcome) == outcome


@pytest.mark.parametrize("reason", [Reason.SUSPENDED, Reason.STALLED, Reason.NODE_LOST, Reason.PREEMPTED])
def test_fatal_exit_during_a_termination_fails_the_job(reason: Reason) -> None:
    """Exit code 65 is a data error. It ends the job, because the next attempt would have the same error."""
    old_status = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": reason}])
    ended_pod = replace(end_pod(pod(), 65), is_deleted=True)
    plan = decide(facts(spec=spec(suspend=reason is Reason.SUSPENDED), status=old_status, pods=[ended_pod], now=at(90)))
    assert plan.job_end is not None
    assert (plan.job_end.outcome, plan.job_end.reason) == (Outcome.FAILED, Reason.DATA_ERROR)


def test_job_that_fails_while_it_is_terminated_is_still_deleted() -> None:
    """If the attempt fails because the operator terminates it, this failure must not replace the recorded reason `Suspended`."""
    old_status = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": "Suspended"}])
    failed_job = job(failed_at=at(60), failed_reason="BackoffLimitExceeded")
    plan = decide(facts(spec=spec(suspend=True), status=old_status, jobs=[failed_job], pods=[end_pod(pod(), 75)], now=at(61)))
    assert (plan.situation, plan.jobs_to_delete) == (Situation.TERMINATING, (failed_job,))


def test_job_that_completes_while_it_is_terminated_succeeds() -> None:
    old_status = status(attempt=1, attempts=[{**STARTED_ATTEMPT, "reason": "Suspended"}])
    plan = decide(
        facts(
            spec=spec(suspend=True), status=old_status, jobs=[job(completed_at=at(60))], pods=[end_pod(pod(), 0)], now=at(61)
        )
    )
    assert plan.job_end is not None and plan.job_end.outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    ("now", "situation"), [(-3600, Situation.STARTING), (59, Situation.STARTING), (60, Situation.BACKING_OFF)]
)
def test_backoff_is_over_if_the_clock_was_set_back(now: float, situation: Situation) -> None:
    """The attempt ended at 60 s, and its backoff takes 10 s. If the operator's clock is set back by an hour, the backoff must not become an hour longer."""
    old_status, jobs, pods = STATES["recovering"]
    assert decide(facts(status=old_status, jobs=jobs, pods=pods, now=at(now))).situation is situation


@pytest.mark.parametrize("stop_request", [{"suspend": True}, {"cancel": True}, {}])
def test_job_without_the_finetunejobs_controller_reference_is_never_deleted(stop_request: dict[str, bool]) -> None:
    """The Job has a label with the FineTuneJob's uid, but no owner reference to the FineTuneJob."""
    foreign_job = job(is_owned=False)
    job_facts = facts(spec=spec(**stop_request), jobs=[foreign_job])
    assert job_facts.owned_jobs == ()
    assert decide(job_facts).jobs_to_delete == ()


def test_unfinished_job_of_an_earlier_attempt_is_deleted_while_the_pool_is_missing() -> None:
    old_status = status(attempt=2, attempts=[{**STARTED_ATTEMPT, "endTime": "2026-11-21T12:01:00Z", "reason": "Preempted"}])
    raw_spec = spec(resources={"nodePool": "gone", "gpusPerNode": 1})
    plan = decide(facts(spec=raw_spec, status=old_status, jobs=[job(1)], now=at(90)))
    assert [job.name for job in plan.jobs_to_delete] == ["run-1"]


# Which Jobs and pods are deleted. The key of each Job and pod describes its state.

JOBS = {
    "runs": job(1),
    "done": job(2, completed_at=at(50)),
    "failed": job(3, failed_at=at(50)),
    "runs and is being deleted": job(4, is_deleting=True),
    "done and is being deleted": job(5, completed_at=at(50), is_deleting=True),
}
PODS = {
    "runs": pod(uid="runs", job_uid="gone"),
    "ended": end_pod(pod(uid="ended", job_uid="gone"), 0),
    "is being deleted": pod(uid="is being deleted", job_uid="gone", deletion_timestamp=at(90)),
    "is deleted": pod(uid="is deleted", job_uid="gone", is_deleted=True),
    "runs in a Job": pod(uid="runs in a Job", job_uid="job-1"),
}


def get_names(objects: Sequence[JobView | PodView]) -> list[str]:
    """Return the names under which these objects are in JOBS and PODS."""
    return [name for wanted_object in objects for name, known_object in [*JOBS.items(), *PODS.items()] if known_object is wanted_object]


@pytest.mark.parametrize(
    ("ttl", "now", "jobs", "pods", "reconcile_at"),
    [
        (60, 159, ["runs"], ["runs"], at(160)),
        (60, 160, ["runs", "done", "failed"], ["runs", "ended"], None),
        (60, 161, ["runs", "done", "failed"], ["runs", "ended"], None),
        (None, 9999, ["runs"], ["runs"], None),
    ],
    ids=["before the TTL", "at the TTL", "after the TTL", "no TTL"],
)
def test_finished_job_deletes_running_objects_at_once_and_finished_ones_after_the_ttl(
    ttl: int | None, now: float, jobs: list[str], pods: list[str], reconcile_at: object
) -> None:
    old_status = status(attempt=5, conditions=[condition(Condition.FINISHED, "True", "Succeeded", 100)], completionTime=at(100).isoformat())
    job_facts = facts(
        spec=spec(policy={"ttlSecondsAfterFinished": ttl}), status=old_status, jobs=[*JOBS.values()], pods=[*PODS.values()], now=at(now)
    )
    plan = decide(job_facts)
    assert (get_names(plan.jobs_to_delete), get_names(plan.pods_to_delete), plan.reconcile_at) == (jobs, pods, reconcile_at)
    only_jobs, only_pods = replace(job_facts, pods=()), replace(job_facts, jobs=())
    no_objects_left = replace(job_facts, jobs=(JOBS["done and is being deleted"],), pods=(PODS["is being deleted"],))
    assert [decide(remaining_facts).is_cleaned_up for remaining_facts in (job_facts, only_jobs, only_pods, no_objects_left)] == [False, False, False, True]


def test_job_that_is_being_deleted_needs_no_action() -> None:
    assert decide(facts(status=RUNNING_STATUS, jobs=[job()], pods=[pod()], is_deleting=True)) == Plan(Situation.DELETING)


def plan_next_attempt(
    jobs: Sequence[str] = (), pods: Sequence[str] = (), *, added_pods: Sequence[PodView] = (), now: float = 100, **stop_request: bool
) -> Plan:
    """Return the operator's plan when attempt 6 must be created and these Jobs and pods of earlier attempts exist."""
    old_status = status(attempt=6, conditions=[NOT_READY_CONDITION])
    earlier_pods = [*(PODS[name] for name in pods), *added_pods]
    return decide(facts(spec=spec(**stop_request), status=old_status, jobs=[JOBS[name] for name in jobs], pods=earlier_pods, now=at(now)))


@pytest.mark.parametrize("stop_request", [{}, {"suspend": True}], ids=["next attempt", "suspend"])
def test_running_jobs_and_pods_of_earlier_attempts_are_deleted_before_the_next_attempt(stop_request: dict[str, bool]) -> None:
    plan = plan_next_attempt([*JOBS], [*PODS], **stop_request)
    assert (plan.situation, plan.attempt_to_create) == (Situation.BLOCKED, None)
    assert (get_names(plan.jobs_to_delete), get_names(plan.pods_to_delete), plan.pods_to_force_delete) == (["runs"], ["runs"], ())
    assert plan.blocking_condition is not None and plan.blocking_condition.reason is Reason.PROGRESSING
    assert plan.reconcile_at == at(90 + 61)


@pytest.mark.parametrize(
    ("job_names", "pod_names", "situation"),
    [
        ([], [], Situation.STARTING),
        (["done", "failed"], ["ended", "is deleted"], Situation.STARTING),
        (["runs"], ["runs in a Job"], Situation.BLOCKED),
        (["done and is being deleted"], [], Situation.BLOCKED),
        ([], ["runs"], Situation.BLOCKED),
        ([], ["is being deleted"], Situation.BLOCKED),
    ],
)
def test_next_attempt_waits_until_no_job_or_pod_of_an_earlier_attempt_runs(job_names: list[str], pod_names: list[str], situation: Situation) -> None:
    assert plan_next_attempt(job_names, pod_names).situation is situation


def test_pods_of_earlier_attempts_are_force_deleted_60_s_after_their_grace_period() -> None:
    in_a_job = pod(uid="in a Job", job_uid="job-1", deletion_timestamp=at(39))
    at_the_limit, over_the_limit = (pod(uid=f"from {end}", job_uid="gone", deletion_timestamp=at(end)) for end in (40, 39))
    plan = plan_next_attempt(["runs"], added_pods=[at_the_limit, over_the_limit, in_a_job])
    assert (plan.pods_to_delete, plan.pods_to_force_delete, plan.reconcile_at) == ((), (over_the_limit, in_a_job), at(130))


@pytest.mark.parametrize(
    ("job_names", "superseded_names"),
    [
        ([], []),
        (["failed"], []),
        (["done", "failed"], ["done"]),
        (["failed", "done"], ["done"]),
        (["done", "failed", "last"], ["done", "failed"]),
        (["runs and is being deleted", "failed", "done", "last"], ["done", "failed"]),
        (["done and is being deleted", "failed", "last"], ["failed"]),
        (["runs", "last"], []),
    ],
)
def test_running_attempt_keeps_only_the_newest_job_of_earlier_attempts(job_names: list[str], superseded_names: list[str]) -> None:
    """The newest earlier Job is kept, so that users can still read its logs. The operator does not delete Jobs that still run or are already being deleted."""
    jobs = [job(500, failed_at=at(60)) if name == "last" else JOBS[name] for name in job_names]
    old_status = status(attempt=1000, attempts=[{**STARTED_ATTEMPT, "number": 1000}])
    running_facts = facts(status=old_status, jobs=[job(int("1000")), *jobs], now=at(61))  # a new int object, so that comparing it with `is` would fail
    assert get_names(decide(running_facts).jobs_to_delete) == superseded_names
    if all(earlier_job.is_finished and not earlier_job.is_deleting for earlier_job in jobs):
        plan = decide(facts(status=status(attempt=1000), jobs=jobs, now=at(61)))
        assert (plan.attempt_to_create, get_names(plan.jobs_to_delete)) == (1000, superseded_names)


# Before an attempt


@pytest.mark.parametrize(
    ("record", "situation"),
    [({"number": 1}, Situation.STARTING), (STARTED_ATTEMPT, Situation.ENDED), (ENDED_ATTEMPT, Situation.STARTING)],
    ids=["not started", "started", "ended"],
)
def test_attempt_without_a_job_ends_only_if_it_had_started(record: dict[str, Any], situation: Situation) -> None:
    assert decide(facts(status=status(attempt=1, attempts=[record]), now=at(100))).situation is situation


@pytest.mark.parametrize("hint", ["", "write a model"])
def test_final_refusal_fails_the_job_and_temporary_refusal_lets_it_wait(hint: str) -> None:
    refusal = RefusedSpec(Reason.REJECTED, "no model", hint, is_final=True)
    job_facts = facts(status=status(conditions=[REFUSED_CONDITION]), now=at(100))
    failure = Failure(class_=FailureClass.USER, code=Reason.REJECTED, message="no model", hint=hint or None)
    failed_plan = Plan(Situation.FINISHED, refusal=refusal, job_end=JobEnd(Outcome.FAILED, Reason.REJECTED, failure))
    assert decide(replace(job_facts, acceptance=refusal)) == failed_plan
    temporary_refusal = replace(refusal, is_final=False)
    assert decide(replace(job_facts, acceptance=temporary_refusal)) == Plan(Situation.REFUSED, refusal=temporary_refusal, reconcile_at=at(1800))


@pytest.mark.parametrize(("owner", "text"), [(UID, f"uid {UID}"), ("other", "uid other"), ("", "uid unknown")])
def test_job_of_another_owner_blocks_the_attempt_only_if_it_has_its_name(owner: str, text: str) -> None:
    """The Jobs have the labels of the FineTuneJob's attempts, but no owner reference to the FineTuneJob."""
    unowned_jobs = [job(attempt, is_owned=False, owner_uid=owner) for attempt in (1, 2, 3)]
    old_status = status(attempt=2, conditions=[NOT_READY_CONDITION])
    blocking_condition = BlockingCondition(Reason.CHILDREN_CONFLICT, f"Job run-2 belongs to another object ({text})")
    blocked_plan = Plan(Situation.BLOCKED, blocking_condition=blocking_condition, reconcile_at=at(1800))
    assert decide(facts(status=old_status, jobs=unowned_jobs, now=at(100))) == blocked_plan
    assert decide(facts(status=old_status, jobs=[unowned_jobs[0], unowned_jobs[2]], now=at(100))) == Plan(Situation.STARTING, attempt_to_create=2)


@pytest.mark.parametrize(("now", "is_over"), [(60, False), (69, False), (70, True)])
def test_backoff_lasts_10_s_after_the_first_failed_attempt(now: float, is_over: bool) -> None:
    waiting_plan, starting_plan = Plan(Situation.BACKING_OFF, reconcile_at=at(70)), Plan(Situation.STARTING, attempt_to_create=2)
    assert decide(facts(status=RECOVERING_STATUS, now=at(now))) == (starting_plan if is_over else waiting_plan)


# While the attempt runs


def plan_active_attempt(pods: Sequence[PodView] = (), *, now: float = 100, nodes: int = 1, policy: dict[str, Any] | None = None, **fields: Any) -> Plan:
    job_facts = facts(spec=spec(policy=policy or {}), status=RUNNING_STATUS, jobs=[job(pod_count=nodes, **fields)], pods=pods, now=at(now))
    return decide(replace(job_facts, blocking_condition=BlockingCondition(Reason.QUOTA_EXCEEDED, "from events")))


@pytest.mark.parametrize(
    ("pods", "scraped_uid"),
    [
        ([pod(index=1), pod(index=0)], "pod-1-0"),
        ([pod(index=1)], None),
        ([pod(phase="Pending")], None),
        ([pod(phase="Unknown")], None),
        ([pod(ip="")], None),
        ([end_pod(pod(), 0)], None),
        ([pod(is_ready=False)], "pod-1-0"),
    ],
    ids=["two ranks", "no rank 0", "pending", "unknown", "no address", "ended", "not ready"],
)
def test_only_a_running_pod_of_rank_0_with_an_address_is_scraped(pods: list[PodView], scraped_uid: str | None) -> None:
    plan = plan_active_attempt(pods, nodes=2)
    assert (plan.pod_to_scrape.uid if plan.pod_to_scrape else None) == scraped_uid


@pytest.mark.parametrize(
    ("pods", "is_suspended", "reason"),
    [
        ([pod(), pod(index=1)], False, None),
        ([pod()], False, Reason.QUOTA_EXCEEDED),
        ([pod(), pod(index=1, is_ready=False)], False, Reason.QUOTA_EXCEEDED),
        ([pod(), replace(UNSCHEDULABLE_POD, completion_index=1)], False, Reason.UNSCHEDULABLE),
        ([UNSCHEDULABLE_POD], True, None),
    ],
    ids=["all ready", "one missing", "one not ready", "one unschedulable", "suspended by a queue"],
)
def test_attempt_is_blocked_until_all_pods_are_ready(pods: list[PodView], is_suspended: bool, reason: Reason | None) -> None:
    plan = plan_active_attempt(pods, nodes=2, is_suspended=is_suspended)
    assert (plan.situation, plan.blocking_condition and plan.blocking_condition.reason) == (Situation.ACTIVE, reason)


LEAVING_POD = pod(deletion_timestamp=at(90))


@pytest.mark.parametrize(
    ("pods", "policy", "is_suspended", "reconcile_at"),
    [
        ([pod()], {}, False, None),
        ([pod(is_ready=False)], {}, False, at(1800)),
        ([pod()], {"activeDeadlineSeconds": 200}, False, at(200)),
        ([LEAVING_POD], {"activeDeadlineSeconds": 200}, False, at(90 + 61)),
        ([], {"activeDeadlineSeconds": 200}, True, at(1800)),
    ],
    ids=["no limit", "start timeout", "deadline", "lost node", "deadline while a queue suspends the Job"],
)
def test_running_attempt_is_reconciled_at_its_next_time_limit(
    pods: list[PodView], policy: dict[str, Any], is_suspended: bool, reconcile_at: object
) -> None:
    assert plan_active_attempt(pods, policy=policy, is_suspended=is_suspended).reconcile_at == reconcile_at


@pytest.mark.parametrize(("now", "earlier_seconds", "is_over"), [(99, 0, False), (100, 0, True), (101, 0, True), (59, 40, False), (60, 40, True)])
def test_attempt_is_ended_when_the_job_has_run_for_its_active_deadline(now: float, earlier_seconds: int, is_over: bool) -> None:
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], activeSeconds=earlier_seconds)
    policy = {"activeDeadlineSeconds": 100}
    plan = decide(facts(spec=spec(policy=policy), status=old_status, jobs=[job()], pods=[pod()], now=at(now)))
    deadline_termination = Termination(Reason.DEADLINE_EXCEEDED, "policy.activeDeadlineSeconds 100 passed")
    assert plan.termination == (deadline_termination if is_over else None)
    queued_status = status(attempt=1, activeSeconds=100, attempts=[{**STARTED_ATTEMPT}], conditions=[condition(Condition.QUOTA_RESERVED, "False", "Queued", 0)])
    waiting_job = job(is_suspended=True, started_at=None, queue="q")
    assert decide(facts(spec=spec(policy=policy), status=queued_status, jobs=[waiting_job], now=at(now))).termination is None


@pytest.mark.parametrize(("node", "text"), [("node-1", "node node-1"), ("", "node unknown")])
def test_attempt_with_several_lost_pods_is_ended_because_of_the_first(node: str, text: str) -> None:
    lost_pods = [pod(index=0, name="a", node=node, deletion_timestamp=at(39)), pod(index=1, name="b", node="node-2", deletion_timestamp=at(39))]
    plan = plan_active_attempt(lost_pods, nodes=2)
    assert plan == Plan(Situation.ACTIVE, termination=Termination(Reason.NODE_LOST, f"pod a does not end: {text} is lost"))


# While the attempt is being ended


def test_end_of_a_job_is_the_time_that_the_job_controller_recorded() -> None:
    for ended_job in (job(completed_at=at(60)), job(failed_at=at(60))):
        plan = decide(facts(status=RUNNING_STATUS, jobs=[ended_job], pods=[end_pod(pod(), 0)], now=at(90)))
        assert plan.attempt_end is not None and plan.attempt_end.ended_at == at(60)


@pytest.mark.parametrize("failed_at", [None, at(60)])
def test_deletion_of_a_job_by_another_client_is_recorded_as_preemption(failed_at: Any) -> None:
    plan = decide(facts(status=RUNNING_STATUS, jobs=[job(is_deleting=True, failed_at=failed_at)], pods=[pod()], now=at(61)))
    termination = Termination(Reason.PREEMPTED, "the Job of this attempt was deleted by another client than the operator")
    assert plan == Plan(Situation.TERMINATING, termination=termination)


@pytest.mark.parametrize("is_deleting", [False, True])
def test_job_is_deleted_once_and_its_lost_pods_are_force_deleted(is_deleting: bool) -> None:
    found_job, lost_pod = job(is_deleting=is_deleting), pod(index=1, deletion_timestamp=at(39))
    plan = decide(facts(status=SUSPENDING_STATUS, jobs=[found_job], pods=[LEAVING_POD, pod(), lost_pod], now=at(100)))
    assert plan == Plan(
        Situation.TERMINATING, jobs_to_delete=() if is_deleting else (found_job,), pods_to_force_delete=(lost_pod,), reconcile_at=at(130)
    )


def test_pods_of_a_deleted_job_are_deleted_before_the_attempt_ends() -> None:
    lost_pod = pod(index=1, deletion_timestamp=at(39))
    pods = [pod(), LEAVING_POD, lost_pod, end_pod(pod(index=2), 75)]
    plan = decide(facts(status=SUSPENDING_STATUS, pods=pods, now=at(100)))
    assert plan == Plan(Situation.TERMINATING, pods_to_delete=(pods[0],), pods_to_force_delete=(lost_pod,), reconcile_at=at(130))
    plan_without_lost_pod = decide(facts(status=SUSPENDING_STATUS, pods=pods[:2], now=at(100)))
    assert (plan_without_lost_pod.pods_to_force_delete, plan_without_lost_pod.reconcile_at) == ((), at(90 + 61))
    assert decide(facts(status=SUSPENDING_STATUS, pods=pods[3:], now=at(100))).situation is Situation.ENDED
