"""Computes the conditions of a FineTuneJob. GitOps tools (kstatus), other programs and people read the conditions."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Literal

from finetune_api.names import Condition as ConditionType
from finetune_api.names import Phase, Reason
from finetune_api.status import Condition, Stage

from finetune_operator.deadlines import find_waiting_start, get_start_timeout_seconds
from finetune_operator.phase import compute_phase_of_pods
from finetune_operator.plan import JobEnd, Outcome, Situation
from finetune_operator.policies.acceptance import RefusedSpec
from finetune_operator.policies.timeouts import seconds_between
from finetune_operator.preparation import describe_preparation
from finetune_operator.status_input import StatusInput
from finetune_operator.text import clean

ConditionStatus = Literal["True", "False", "Unknown"]
REASON_OF_OUTCOME = {
    Outcome.SUCCEEDED: Reason.SUCCEEDED,
    Outcome.FAILED: Reason.FAILED,
    Outcome.CANCELLED: Reason.CANCELLED,
}
CHECKPOINT_PROBLEM_REASONS = {reason.value: reason for reason in (Reason.STAGING_DISK_FULL, Reason.CHECKPOINT_DAMAGED)}
"""Checkpoint problems that have their own reason. For all other problems in the trainer's report, the reason is CheckpointNotStored."""
TRACKER_PROBLEM_REASONS = {reason.value: reason for reason in (Reason.TRACKER_UNAVAILABLE, Reason.TRACKER_CREDENTIALS_REJECTED)}
"""Tracker problems that have their own reason. For all other problems, the reason is TrackerFailed."""


def compute_conditions(inputs: StatusInput, latest_checkpoint: str | None, *, transition_time: datetime) -> list[Condition]:
    """Return all conditions, in a fixed order. `transition_time`: the time for a condition that changes now, if no other time is known for it."""
    new_conditions = [
        _compute_accepted_condition(inputs), _compute_prepared_condition(inputs), _compute_quota_reserved_condition(inputs),
        _compute_pods_ready_condition(inputs), _compute_suspended_condition(inputs), _compute_checkpoints_healthy_condition(inputs, latest_checkpoint),
        _compute_trackers_reachable_condition(inputs), _compute_succeeded_condition(inputs), _compute_finished_condition(inputs),
        _compute_reconciling_condition(inputs), _compute_stalled_condition(inputs),
    ]  # fmt: skip
    old_conditions_by_type = {condition.type: condition for condition in inputs.old_status.conditions}
    return [
        _set_transition_time(condition, old_conditions_by_type.get(condition.type), transition_time, inputs.facts.job.generation)
        for condition in new_conditions if condition is not None
    ]  # fmt: skip


def set_generation(conditions: Iterable[Condition], generation: int) -> list[Condition]:
    """Return the same conditions with another `observedGeneration`."""
    return [_copy_condition(condition, condition.last_transition_time, generation) for condition in conditions]


def _set_transition_time(
    new_condition: Condition, old_condition: Condition | None, transition_time: datetime, generation: int
) -> Condition:
    """Return the condition with `lastTransitionTime`, the time at which the status of the condition last changed."""
    unchanged_since = old_condition.last_transition_time if old_condition is not None and old_condition.status == new_condition.status else None
    known_times = [time for time in (unchanged_since, new_condition.last_transition_time) if time is not None]
    # The stored time can be too early, because the condition can have changed and changed back while the operator was stopped. So the later
    # of the stored time and the time in the new condition is used.
    return _copy_condition(new_condition, max(known_times, default=transition_time), generation)


def _copy_condition(condition: Condition, transition_time: datetime | None, generation: int) -> Condition:
    return condition.model_copy(update={"last_transition_time": transition_time, "observed_generation": generation})


def _make_condition(
    condition_type: ConditionType, status: ConditionStatus, reason: Reason, message: str, transition_time: datetime | None = None
) -> Condition:
    return Condition(
        type=condition_type, status=status, reason=reason.value, message=clean(message), last_transition_time=transition_time
    )


def _compute_accepted_condition(inputs: StatusInput) -> Condition:
    acceptance = inputs.facts.acceptance
    if isinstance(acceptance, RefusedSpec):
        message = acceptance.message + (f"; {acceptance.hint}" if acceptance.hint and not acceptance.is_final else "")
        return _make_condition(ConditionType.ACCEPTED, "False", acceptance.reason, message)
    return _make_condition(ConditionType.ACCEPTED, "True", Reason.ACCEPTED, "the spec passed all checks")


def _compute_prepared_condition(inputs: StatusInput) -> Condition | None:
    preparation = inputs.plan.preparation or inputs.old_status.preparation
    if preparation is None:
        return None
    if preparation.reason is None:
        blocking_condition = inputs.blocking_condition if _is_preparing(inputs) else None
        return _make_condition(ConditionType.PREPARED, "False", *describe_preparation(preparation, blocking_condition))
    if preparation.reason == Reason.EXISTING_RESULT_ADOPTED:
        return _make_condition(ConditionType.PREPARED, "True", Reason.EXISTING_RESULT_ADOPTED, "spec and inputs are those of an earlier run")
    if preparation.reason == Reason.PREPARED:
        return _make_condition(ConditionType.PREPARED, "True", Reason.PREPARED, "storage, model and data passed all checks that need no GPU")
    reason = Reason(preparation.reason) if preparation.reason in list(Reason) else Reason.FAILED
    return _make_condition(ConditionType.PREPARED, "False", reason, preparation.message or preparation.reason)


def _is_preparing(inputs: StatusInput) -> bool:
    return inputs.plan.situation is Situation.PREPARING


def _compute_quota_reserved_condition(inputs: StatusInput) -> Condition | None:
    queue_name = inputs.facts.spec.placement.queue_name
    if not queue_name and not inputs.is_queued and inputs.facts.condition(ConditionType.QUOTA_RESERVED) is None:
        return None
    queue_text = f"queue {queue_name}" if queue_name else "the queue"
    job = inputs.current_job
    if job is None:
        return _make_condition(ConditionType.QUOTA_RESERVED, "False", Reason.PROGRESSING, "no Job exists, so no quota is requested")
    if job.is_finished:
        return _make_condition(ConditionType.QUOTA_RESERVED, "False", Reason.PROGRESSING, "the attempt ended and released its quota")
    if inputs.is_queued:
        return _make_condition(ConditionType.QUOTA_RESERVED, "False", Reason.QUEUED, f"waiting for quota in {queue_text}")
    message, admitted_at = f"{queue_text} admitted attempt {job.attempt}", inputs.facts.admitted_at
    return _make_condition(ConditionType.QUOTA_RESERVED, "True", Reason.PROGRESSING, message, admitted_at)


def _compute_pods_ready_condition(inputs: StatusInput) -> Condition:
    pod_count, ready_pod_count = inputs.facts.pod_count, inputs.ready_pod_count
    if inputs.plan.job_end is not None:
        return _make_condition(ConditionType.PODS_READY, "False", Reason.PODS_NOT_READY, "the job is finished")
    if ready_pod_count >= pod_count:
        return _make_condition(ConditionType.PODS_READY, "True", Reason.PODS_READY, f"all {pod_count} pods are ready")
    if _is_preparing(inputs):
        return _make_condition(ConditionType.PODS_READY, "False", Reason.PODS_NOT_READY, "the preparation has not ended; no pod of an attempt exists")
    if inputs.blocking_condition is not None:
        message = f"waiting for {pod_count - ready_pod_count} of {pod_count} pods: {inputs.blocking_condition.message}"
        return _make_condition(ConditionType.PODS_READY, "False", inputs.blocking_condition.reason, message)
    return _make_condition(ConditionType.PODS_READY, "False", Reason.PODS_NOT_READY, f"{ready_pod_count} of {pod_count} pods are ready")


def _compute_suspended_condition(inputs: StatusInput) -> Condition:
    if inputs.is_suspended:
        step = inputs.facts.next_start_step
        start_text = f"the next attempt continues from step {step}" if step else "no checkpoint is committed yet"
        return _make_condition(ConditionType.SUSPENDED, "True", Reason.SUSPENDED, f"spec.suspend is true and no pod is left; {start_text}")
    if inputs.facts.is_suspend_requested and inputs.plan.job_end is None:
        return _make_condition(ConditionType.SUSPENDED, "False", Reason.SUSPENDING, "spec.suspend is true; the pods save and stop")
    if inputs.facts.is_true(ConditionType.SUSPENDED):
        return _make_condition(ConditionType.SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false again")
    return _make_condition(ConditionType.SUSPENDED, "False", Reason.PROGRESSING, "spec.suspend is false")


def _compute_checkpoints_healthy_condition(inputs: StatusInput, latest_checkpoint: str | None) -> Condition:
    problem = inputs.last_report.health.checkpoint_problem if inputs.last_report else None
    if problem:
        reason = CHECKPOINT_PROBLEM_REASONS.get(problem.split(":")[0].strip(), Reason.CHECKPOINT_NOT_STORED)
        return _make_condition(ConditionType.CHECKPOINTS_HEALTHY, "False", reason, problem)
    if latest_checkpoint:
        message = f"newest checkpoint: {latest_checkpoint}"
        return _make_condition(ConditionType.CHECKPOINTS_HEALTHY, "True", Reason.CHECKPOINT_COMMITTED, message)
    return _make_condition(ConditionType.CHECKPOINTS_HEALTHY, "Unknown", Reason.PROGRESSING, "no checkpoint is committed yet")


def _compute_trackers_reachable_condition(inputs: StatusInput) -> Condition | None:
    """Return the TrackersReachable condition: whether trackers accept the metrics of a running job. Other jobs do not have this condition."""
    if not inputs.facts.spec.tracking.report_to or inputs.plan.job_end is not None or inputs.last_report is None:
        return None
    problem = inputs.last_report.health.tracker_problem
    if problem is None:
        return _make_condition(ConditionType.TRACKERS_REACHABLE, "True", Reason.TRACKERS_REACHABLE, "the trackers accept the values of the run")
    reason = TRACKER_PROBLEM_REASONS.get(problem.split(":")[0].strip(), Reason.TRACKER_FAILED)
    return _make_condition(ConditionType.TRACKERS_REACHABLE, "False", reason, problem)


def _compute_succeeded_condition(inputs: StatusInput) -> Condition:
    job_end = inputs.plan.job_end
    if job_end is None:
        return _make_condition(ConditionType.SUCCEEDED, "Unknown", Reason.PROGRESSING, "the job is not finished")
    if inputs.adopts_result:
        return _make_condition(ConditionType.SUCCEEDED, "True", job_end.reason, _describe_adopted_result(inputs))
    if job_end.outcome is Outcome.SUCCEEDED:
        return _make_condition(ConditionType.SUCCEEDED, "True", Reason.SUCCEEDED, "the final artefact is committed")
    return _make_condition(ConditionType.SUCCEEDED, "False", job_end.reason, _describe_unsuccessful_end(job_end))


def _describe_adopted_result(inputs: StatusInput) -> str:
    adopted_output = inputs.termination_message.output if inputs.termination_message is not None else None
    uid, uri = (adopted_output.adopted_uid, adopted_output.uri) if adopted_output is not None else (None, None)
    return f"nothing was trained: the FineTuneJob of the same name with uid {uid} had the same spec and inputs, and its result is {uri}"


def _compute_finished_condition(inputs: StatusInput) -> Condition:
    job_end = inputs.plan.job_end
    if job_end is None:
        return _make_condition(ConditionType.FINISHED, "False", Reason.PROGRESSING, "the job is not finished")
    return _make_condition(ConditionType.FINISHED, "True", REASON_OF_OUTCOME[job_end.outcome], "no further attempt follows")


def _describe_unsuccessful_end(job_end: JobEnd) -> str:
    if job_end.outcome is Outcome.CANCELLED:
        return "spec.cancel is true; the newest checkpoint is kept"
    failure = job_end.failure
    if failure is None:
        return "the job ended without a final artefact"
    return f"{failure.class_} {failure.code}: {failure.message}" + (f"; {failure.hint}" if failure.hint else "")


def _compute_reconciling_condition(inputs: StatusInput) -> Condition | None:
    """Return the Reconciling condition of kstatus, or None if the job is finished or suspended."""
    if inputs.plan.job_end is not None or inputs.is_suspended:
        return None
    reason, message = _describe_activity(inputs)
    return _make_condition(ConditionType.RECONCILING, "True", reason, message)


def _describe_activity(inputs: StatusInput) -> tuple[Reason, str]:
    plan, facts = inputs.plan, inputs.facts
    if plan.refusal is not None:
        return plan.refusal.reason, plan.refusal.message
    preparation = plan.preparation or facts.job.status.preparation
    if _is_preparing(inputs) and preparation is not None:
        return describe_preparation(preparation, inputs.blocking_condition)
    if inputs.termination_reason is not None:
        record = facts.attempt_record
        recorded_message = (record.message if record else "") or inputs.termination_reason
        explanation = plan.termination.message if plan.termination else recorded_message
        return inputs.termination_reason, f"ending attempt {facts.attempt}: {explanation}"
    if plan.attempt_end is not None:
        failure = plan.attempt_end.failure
        explanation = failure.message if failure else plan.attempt_end.reason
        return Reason.RETRYING, f"attempt {facts.attempt} ended: {explanation}"
    if plan.situation is Situation.BACKING_OFF:
        start_text = plan.reconcile_at.strftime("%H:%M:%SZ") if plan.reconcile_at else "soon"
        return Reason.RETRYING, f"attempt {facts.attempt} starts at {start_text}"
    if inputs.blocking_condition is not None:
        return inputs.blocking_condition.reason, inputs.blocking_condition.message
    if inputs.is_queued:
        return Reason.QUEUED, "waiting for quota in the queue"
    return Reason.PROGRESSING, f"attempt {facts.attempt}: {_describe_stage(inputs)}"


def _describe_stage(inputs: StatusInput) -> str:
    live_report = inputs.facts.live_report
    if live_report is not None:
        detail = live_report.report.detail
        return live_report.report.stage + (f", {detail}" if detail else "")
    return Stage.TRAINING if compute_phase_of_pods(inputs, follows_failure=False) is Phase.RUNNING else Stage.STARTING


def _compute_stalled_condition(inputs: StatusInput) -> Condition | None:
    """Return the Stalled condition of kstatus if the job failed or has waited for its pods longer than the start timeout."""
    plan, facts = inputs.plan, inputs.facts
    if plan.job_end is not None:
        if plan.job_end.outcome is not Outcome.FAILED:
            return None
        return _make_condition(ConditionType.STALLED, "True", plan.job_end.reason, _describe_unsuccessful_end(plan.job_end))
    waiting_since = find_waiting_start(facts)
    timeout_seconds = get_start_timeout_seconds(facts)
    if waiting_since is None or seconds_between(waiting_since, facts.now) < timeout_seconds:
        return None
    is_blocked_start = plan.situation in (Situation.PREPARING, Situation.STARTING, Situation.BLOCKED) and inputs.blocking_condition is not None
    is_running = plan.situation is Situation.ACTIVE and plan.termination is None and not inputs.is_queued
    if not (plan.refusal is not None or is_blocked_start or (is_running and inputs.ready_pod_count < facts.pod_count)):
        return None
    explanation = plan.refusal.message if plan.refusal else inputs.blocking_condition.message if inputs.blocking_condition else "the pods are not ready"
    message = f"policy.startTimeoutSeconds {timeout_seconds} passed: {explanation}"
    return _make_condition(ConditionType.STALLED, "True", Reason.START_TIMEOUT, message)
