"""Computes `status.phase` and `status.reason`. The phase and the reason are single words for people. Programs read the conditions instead."""

from __future__ import annotations

import re

from finetune_api.names import Condition as ConditionType
from finetune_api.names import Phase, Reason
from finetune_api.status import Condition, FineTuneJobStatus, Progress, Stage

from finetune_operator.plan import Outcome, Situation
from finetune_operator.status_input import StatusInput

NO_VALUE = "-"
"""Text for a column of `kubectl get` that has no value. An empty cell could also mean an error."""
PHASE_OF_STAGE: dict[Stage, Phase] = {
    Stage.STARTING: Phase.STARTING,
    Stage.DOWNLOADING: Phase.STARTING,
    Stage.CHECKING: Phase.VALIDATING,
    Stage.LOADING: Phase.STARTING,
    Stage.RESTORING: Phase.STARTING,
    Stage.TRAINING: Phase.RUNNING,
    Stage.SAVING: Phase.RUNNING,
    Stage.MERGING: Phase.UPLOADING,
    Stage.EVALUATING: Phase.EVALUATING,
    Stage.COMPARING: Phase.EVALUATING,
    Stage.BENCHMARKING: Phase.EVALUATING,
    Stage.VERIFYING: Phase.EVALUATING,
    Stage.UPLOADING: Phase.UPLOADING,
    Stage.REPORTING: Phase.UPLOADING,
    Stage.STOPPING: Phase.RUNNING,
    Stage.DONE: Phase.UPLOADING,
    Stage.FAILED: Phase.RUNNING,
}
PHASE_OF_OUTCOME = {
    Outcome.SUCCEEDED: Phase.SUCCEEDED,
    Outcome.FAILED: Phase.FAILED,
    Outcome.CANCELLED: Phase.CANCELLED,
}
PHASE_OF_TERMINATION = {
    Reason.SUSPENDED: Phase.SUSPENDING,
    Reason.CANCELLED: Phase.CANCELLING,
    Reason.DEADLINE_EXCEEDED: Phase.CANCELLING,
    Reason.BUDGET_EXCEEDED: Phase.CANCELLING,
}
"""Phase while the operator ends an attempt, by termination reason. For all other reasons the phase is Recovering."""
SHORT_CODE_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9]{0,39}")
"""Matches a failure code that fits into a table column. Pods report the codes, so a code can contain any text."""


def compute_phase(inputs: StatusInput) -> Phase:
    """Return the phase of the job."""
    plan, facts = inputs.plan, inputs.facts
    if plan.job_end is not None:
        return PHASE_OF_OUTCOME[plan.job_end.outcome]
    if inputs.is_suspended:
        return Phase.SUSPENDED
    follows_failure = is_recovering(inputs.old_status)
    match plan.situation:
        case Situation.REFUSED:
            return Phase.PENDING
        case Situation.PREPARING:
            return Phase.PREPARING
        case Situation.BLOCKED:
            return Phase.SUSPENDING if facts.is_suspend_requested else Phase.RECOVERING if follows_failure else Phase.PENDING
        case Situation.BACKING_OFF | Situation.ENDED:
            return Phase.RECOVERING
        case Situation.STARTING if inputs.result.created_job is None:
            return Phase.PENDING
    if inputs.termination_reason is not None:
        return PHASE_OF_TERMINATION.get(inputs.termination_reason, Phase.RECOVERING)
    if inputs.is_queued:
        return Phase.QUEUED
    return compute_phase_of_pods(inputs, follows_failure)


def is_recovering(status: FineTuneJobStatus) -> bool:
    """Whether the current or next attempt follows a failed attempt. A resume after a suspension is not a recovery."""
    ended_attempts = [attempt for attempt in status.attempts if attempt.end_time is not None]
    return bool(ended_attempts) and ended_attempts[-1].reason != Reason.SUSPENDED


def compute_phase_of_pods(inputs: StatusInput, follows_failure: bool) -> Phase:
    """Return the phase of a running attempt, from the last report of rank 0's pod. `follows_failure`: whether the attempt follows a failed one."""
    facts, live_report = inputs.facts, inputs.facts.live_report
    if live_report is None:
        record = facts.attempt_record
        if facts.active_pods and record is not None and record.last_step:
            # The operator was restarted and has no progress report yet, but the status shows that this attempt trained.
            return Phase.RUNNING
        return Phase.RECOVERING if follows_failure else Phase.STARTING
    report = live_report.report
    reported_phase = PHASE_OF_STAGE[report.stage]
    if report.stage is Stage.EVALUATING and report.output is None and _is_before_last_step(report.progress):
        return Phase.RUNNING
    is_starting = reported_phase in (Phase.STARTING, Phase.VALIDATING)
    return Phase.RECOVERING if is_starting and follows_failure else reported_phase


def _is_before_last_step(progress: Progress) -> bool:
    """Whether optimizer steps remain. A job that only evaluates has no optimizer steps."""
    return progress.total_steps is not None and (progress.step or 0) < progress.total_steps


def compute_reason(inputs: StatusInput, conditions: list[Condition]) -> str:
    """Return in one word why the job waits, is being ended, recovers or has failed, or `-` if its phase needs no reason."""
    plan = inputs.plan
    if plan.job_end is not None:
        if inputs.adopts_result:
            return plan.job_end.reason
        return _choose_failure_reason(inputs) if plan.job_end.outcome is Outcome.FAILED else NO_VALUE
    if inputs.is_suspended:
        return NO_VALUE
    if plan.refusal is not None:
        return plan.refusal.reason
    if plan.attempt_end is not None:
        return plan.attempt_end.reason
    if inputs.termination_reason is not None:
        is_requested = inputs.termination_reason in (Reason.SUSPENDED, Reason.CANCELLED)
        return NO_VALUE if is_requested else inputs.termination_reason
    if inputs.blocking_condition is not None and inputs.blocking_condition.reason is not Reason.PROGRESSING:
        return inputs.blocking_condition.reason
    if inputs.is_queued:
        return Reason.QUEUED
    if is_recovering(inputs.old_status) and compute_phase(inputs) is Phase.RECOVERING:
        return next(attempt.reason for attempt in reversed(inputs.old_status.attempts) if attempt.end_time is not None) or NO_VALUE
    reason = _find_problem_reason(conditions)
    is_pod_report_missing = plan.situation in (Situation.STARTING, Situation.ACTIVE) and inputs.facts.live_report is None
    if reason == NO_VALUE and is_pod_report_missing and compute_phase(inputs) is Phase.STARTING and inputs.ready_pod_count < inputs.facts.pod_count:
        return Reason.PODS_NOT_READY
    return reason


def _choose_failure_reason(inputs: StatusInput) -> str:
    """Return the failure code or, if it does not fit into a column of `kubectl get`, the reason of the job's end."""
    job_end = inputs.plan.job_end
    assert job_end is not None  # noqa: S101 -- the caller checks
    code = job_end.failure.code if job_end.failure else ""
    return code if SHORT_CODE_PATTERN.fullmatch(code) else job_end.reason


def _find_problem_reason(conditions: list[Condition]) -> str:
    """Return the reason of the first condition that shows a problem of a running attempt, or `-` if there is none."""
    for condition in conditions:
        is_problem = (condition.type, condition.status) in ((ConditionType.STALLED, "True"), (ConditionType.CHECKPOINTS_HEALTHY, "False"))
        if is_problem:
            return condition.reason
    return NO_VALUE
