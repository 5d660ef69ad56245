"""Computes the conditions of a FineTuneJob. GitOps tools (kstatus), other programs and people read the conditions."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from finetune_api.names import Condition as Kind
from finetune_api.names import Phase, Reason
from finetune_api.status import Condition, Stage

from finetune_operator.deadlines import start_timeout_seconds, waiting_since
from finetune_operator.phase import phase_of_pods
from finetune_operator.plan import JobEnd, Outcome, Situation
from finetune_operator.policies.acceptance import RefusedSpec
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.status_input import StatusInput
from finetune_operator.text import clean

ConditionStatus = Literal["True", "False", "Unknown"]
REASON_OF_OUTCOME = {
    Outcome.SUCCEEDED: Reason.SUCCEEDED,
    Outcome.FAILED: Reason.FAILED,
    Outcome.CANCELLED: Reason.CANCELLED,
}
CHECKPOINT_PROBLEMS = {reason.value: reason for reason in (Reason.STAGING_DISK_FULL, Reason.CHECKPOINT_DAMAGED)}
"""Checkpoint problems that have their own reason. For all other problems in the trainer's report, the reason is CheckpointNotStored."""


def conditions(view: StatusInput, latest_checkpoint: str | None) -> list[Condition]:
    """Return all conditions, in a fixed order."""
    new = [
        _accepted(view), _quota_reserved(view), _pods_ready(view), _suspended(view),
        _checkpoints_healthy(view, latest_checkpoint), _succeeded(view), _finished(view), _reconciling(view), _stalled(view),
    ]  # fmt: skip
    old = {condition.type: condition for condition in view.old.conditions}
    return [_with_transition_time(condition, old.get(condition.type), view) for condition in new if condition is not None]


def with_generation(conditions: Iterable[Condition], generation: int) -> list[Condition]:
    """Return the same conditions with another `observedGeneration`."""
    return [_copy_with(condition, condition.last_transition_time, generation) for condition in conditions]


def _with_transition_time(new: Condition, old: Condition | None, view: StatusInput) -> Condition:
    """Return the condition with `lastTransitionTime` set: when the status of the condition last changed."""
    unchanged_since = old.last_transition_time if old is not None and old.status == new.status else None
    known = [time for time in (unchanged_since, new.last_transition_time) if time is not None]
    # While the operator did not run, the condition may have changed and changed back. So the later of the two times is correct.
    return _copy_with(new, max(known, default=view.facts.now), view.facts.job.generation)


def _copy_with(condition: Condition, transition_time: datetime | None, generation: int) -> Condition:
    return Condition(
        type=condition.type, status=condition.status, reason=condition.reason, message=condition.message,
        last_transition_time=transition_time, observed_generation=generation,
    )  # fmt: skip


def _condition(
    kind: Kind, status: ConditionStatus, reason: Reason, message: str, since: datetime | None = None
) -> Condition:
    return Condition(
        type=kind, status=status, reason=reason.value, message=clean(message), last_transition_time=since
    )


def _accepted(view: StatusInput) -> Condition:
    acceptance = view.facts.acceptance
    if isinstance(acceptance, RefusedSpec):
        message = acceptance.message + (f"; {acceptance.hint}" if acceptance.hint and not acceptance.is_final else "")
        return _condition(Kind.ACCEPTED, "False", acceptance.reason, message)
    return _condition(Kind.ACCEPTED, "True", Reason.ACCEPTED, "the spec passed all checks")


def _quota_reserved(view: StatusInput) -> Condition | None:
    name = view.facts.spec.placement.queue_name
    if not name and not view.is_queued and view.facts.condition(Kind.QUOTA_RESERVED) is None:
        return None
    queue = f"queue {name}" if name else "the queue"
    job = view.current_job
    if job is None:
        return _condition(Kind.QUOTA_RESERVED, "False", Reason.PROGRESSING, "no Job exists, so no quota is requested")
    if job.is_finished:
        return _condition(Kind.QUOTA_RESERVED, "False", Reason.PROGRESSING, "the attempt ended and released its quota")
    if view.is_queued:
        return _condition(Kind.QUOTA_RESERVED, "False", Reason.QUEUED, f"waiting for quota in {queue}")
    message, since = f"{queue} admitted attempt {job.attempt}", view.facts.admitted_at
    return _condition(Kind.QUOTA_RESERVED, "True", Reason.PROGRESSING, message, since)


def _pods_ready(view: StatusInput) -> Condition:
    total, ready = view.facts.nodes, view.ready_pods
    if view.plan.job_end is not None:
        return _condition(Kind.PODS_READY, "False", Reason.PODS_NOT_READY, "the job is finished")
    if ready >= total:
        return _condition(Kind.PODS_READY, "True", Reason.PODS_READY, f"all {total} pods are ready")
    if view.blocking_condition is not None:
        message = f"waiting for {total - ready} of {total} pods: {view.blocking_condition.message}"
        return _condition(Kind.PODS_READY, "False", view.blocking_condition.reason, message)
    return _condition(Kind.PODS_READY, "False", Reason.PODS_NOT_READY, f"{ready} of {total} pods are ready")


def _suspended(view: StatusInput) -> Condition:
    if view.is_suspended:
        step = view.facts.next_start_step
        start = f"the next attempt continues from step {step}" if step else "no checkpoint is committed yet"
        return _condition(Kind.SUSPENDED, "True", Reason.SUSPENDED, f"spec.suspend is true and no pod is left; {start}")
    if view.facts.suspend_requested and view.plan.job_end is None:
        return _condition(Kind.SUSPENDED, "False", Reason.SUSPENDING, "spec.suspend is true; the pods save and stop")
    if view.facts.is_true(Kind.SUSPENDED):
        return _condition(Kind.SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false again")
    return _condition(Kind.SUSPENDED, "False", Reason.PROGRESSING, "spec.suspend is false")


def _checkpoints_healthy(view: StatusInput, latest_checkpoint: str | None) -> Condition:
    problem = view.last_report.health.checkpoint_problem if view.last_report else None
    if problem:
        reason = CHECKPOINT_PROBLEMS.get(problem.split(":")[0].strip(), Reason.CHECKPOINT_NOT_STORED)
        return _condition(Kind.CHECKPOINTS_HEALTHY, "False", reason, problem)
    if latest_checkpoint:
        message = f"newest checkpoint: {latest_checkpoint}"
        return _condition(Kind.CHECKPOINTS_HEALTHY, "True", Reason.CHECKPOINT_COMMITTED, message)
    return _condition(Kind.CHECKPOINTS_HEALTHY, "Unknown", Reason.PROGRESSING, "no checkpoint is committed yet")


def _succeeded(view: StatusInput) -> Condition:
    job_end = view.plan.job_end
    if job_end is None:
        return _condition(Kind.SUCCEEDED, "Unknown", Reason.PROGRESSING, "the job is not finished")
    if job_end.outcome is Outcome.SUCCEEDED:
        return _condition(Kind.SUCCEEDED, "True", Reason.SUCCEEDED, "the final artefact is committed")
    return _condition(Kind.SUCCEEDED, "False", job_end.reason, _why_not_succeeded(job_end))


def _finished(view: StatusInput) -> Condition:
    job_end = view.plan.job_end
    if job_end is None:
        return _condition(Kind.FINISHED, "False", Reason.PROGRESSING, "the job is not finished")
    return _condition(Kind.FINISHED, "True", REASON_OF_OUTCOME[job_end.outcome], "no further attempt follows")


def _why_not_succeeded(job_end: JobEnd) -> str:
    if job_end.outcome is Outcome.CANCELLED:
        return "spec.cancel is true; the newest checkpoint is kept"
    failure = job_end.failure
    if failure is None:
        return "the job ended without a final artefact"
    return f"{failure.class_} {failure.code}: {failure.message}" + (f"; {failure.hint}" if failure.hint else "")


def _reconciling(view: StatusInput) -> Condition | None:
    """Return the Reconciling condition of kstatus, or None if the job is finished or suspended."""
    if view.plan.job_end is not None or view.is_suspended:
        return None
    reason, message = _current_activity(view)
    return _condition(Kind.RECONCILING, "True", reason, message)


def _current_activity(view: StatusInput) -> tuple[Reason, str]:
    plan, facts = view.plan, view.facts
    if plan.refusal is not None:
        return plan.refusal.reason, plan.refusal.message
    if view.termination_reason is not None:
        record = facts.attempt_record
        recorded = (record.message if record else "") or view.termination_reason
        why = plan.termination.message if plan.termination else recorded
        return view.termination_reason, f"ending attempt {facts.attempt}: {why}"
    if plan.attempt_end is not None:
        failure = plan.attempt_end.failure
        why = failure.message if failure else plan.attempt_end.reason
        return Reason.RETRYING, f"attempt {facts.attempt} ended: {why}"
    if plan.situation is Situation.BACKING_OFF:
        start = plan.reconcile_at.strftime("%H:%M:%SZ") if plan.reconcile_at else "soon"
        return Reason.RETRYING, f"attempt {facts.attempt} starts at {start}"
    if view.blocking_condition is not None:
        return view.blocking_condition.reason, view.blocking_condition.message
    if view.is_queued:
        return Reason.QUEUED, "waiting for quota in the queue"
    return Reason.PROGRESSING, f"attempt {facts.attempt}: {_stage(view)}"


def _stage(view: StatusInput) -> str:
    received = view.facts.live_report
    if received is not None:
        detail = received.report.detail
        return received.report.stage + (f", {detail}" if detail else "")
    return Stage.TRAINING if phase_of_pods(view, recovering=False) is Phase.RUNNING else Stage.STARTING


def _stalled(view: StatusInput) -> Condition | None:
    """Return the Stalled condition of kstatus if the job failed or has waited for its pods longer than the start timeout."""
    plan, facts = view.plan, view.facts
    if plan.job_end is not None:
        if plan.job_end.outcome is not Outcome.FAILED:
            return None
        return _condition(Kind.STALLED, "True", plan.job_end.reason, _why_not_succeeded(plan.job_end))
    since = waiting_since(facts)
    limit = start_timeout_seconds(facts)
    if since is None or seconds_between(since, facts.now) < limit:
        return None
    starting = plan.situation in (Situation.STARTING, Situation.BLOCKED) and view.blocking_condition is not None
    running = plan.situation is Situation.ACTIVE and plan.termination is None and not view.is_queued
    if not (plan.refusal is not None or starting or (running and view.ready_pods < facts.nodes)):
        return None
    why = plan.refusal.message if plan.refusal else view.blocking_condition.message if view.blocking_condition else "the pods are not ready"
    message = f"policy.startTimeoutSeconds {limit} passed: {why}"
    return _condition(Kind.STALLED, "True", Reason.START_TIMEOUT, message)
