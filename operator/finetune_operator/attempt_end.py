"""Computes how an attempt ended: its cause, its newest committed step, and whether another attempt follows."""

from __future__ import annotations

from datetime import datetime

from finetune_api.exits import RetryPolicy
from finetune_api.names import ExitCode, FailureClass, Reason, parse_attempt_of_uri
from finetune_api.pod import TerminationMessage
from finetune_api.status import Checkpoint, Failure

from finetune_operator.costs import build_budget_failure, describe_spent_budget
from finetune_operator.facts import Facts
from finetune_operator.plan import AttemptEnd, JobEnd, Outcome, Plan, Situation
from finetune_operator.policies.cause import find_cause
from finetune_operator.policies.retry import (
    TERMINATION_RETRY,
    FailureCause,
    GiveUp,
    RetryDecision,
    build_deadline_failure,
    retry_or_give_up,
)


def plan_attempt_end(facts: Facts, cause: FailureCause | None, ended_at: datetime) -> Plan:
    """Return the plan that writes two things to the status at once: how the attempt ended, and whether another attempt follows.

    `cause` is None if the attempt succeeded.
    """
    message = find_rank0_termination_message(facts)
    committed_step = find_newest_step_of_attempt(facts, message)
    if cause is None:
        attempt_end = AttemptEnd(Reason.SUCCEEDED, ended_at, None, message, committed_step=committed_step)
        return Plan(Situation.ENDED, attempt_end=attempt_end, job_end=JobEnd(Outcome.SUCCEEDED, Reason.SUCCEEDED))
    made_progress = committed_step is not None and committed_step > facts.newest_step_of_earlier_attempts
    decision = _finish_or_retry(facts, cause, made_progress, ended_at)
    retry_decision = decision if isinstance(decision, RetryDecision) else RetryDecision()
    attempt_end = AttemptEnd(
        reason=cause.reason,
        ended_at=ended_at,
        failure=cause.failure,
        termination_message=message,
        is_counted=retry_decision.is_counted,
        made_progress=made_progress,
        committed_step=committed_step,
        next_attempt=facts.attempt + 1 if isinstance(decision, RetryDecision) else None,
        adaptation=retry_decision.adaptation,
    )
    return Plan(Situation.ENDED, attempt_end=attempt_end, job_end=decision if isinstance(decision, JobEnd) else None)


def _finish_or_retry(facts: Facts, cause: FailureCause, made_progress: bool, ended_at: datetime) -> JobEnd | RetryDecision:
    """Return how the job finishes, or the decision to start another attempt."""
    if facts.is_cancel_requested or cause.reason is Reason.CANCELLED:
        return JobEnd(Outcome.CANCELLED, Reason.CANCELLED)
    limit_seconds = facts.active_deadline_seconds
    deadline_end = JobEnd(Outcome.FAILED, Reason.DEADLINE_EXCEEDED, build_deadline_failure(limit_seconds or 0, facts.deadline_source))
    if cause.reason is Reason.DEADLINE_EXCEEDED:
        return deadline_end
    budget_message = describe_spent_budget(facts, ended_at)
    budget_end = JobEnd(Outcome.FAILED, Reason.BUDGET_EXCEEDED, build_budget_failure(budget_message or cause.failure.message))
    if cause.reason is Reason.BUDGET_EXCEEDED:
        return budget_end
    decision = retry_or_give_up(
        cause, facts.spec, facts.job.status, made_progress=made_progress, now=facts.now, attempt=facts.attempt,
        is_spec_readable=facts.is_spec_readable,
    )  # fmt: skip
    if isinstance(decision, GiveUp):
        return JobEnd(Outcome.FAILED, decision.reason, decision.failure)
    if limit_seconds is not None and facts.compute_running_seconds(ended_at) >= limit_seconds:
        # The deadline passed while the operator did not run, so the next attempt would have no time left.
        return deadline_end
    return budget_end if budget_message else decision


def all_ranks_succeeded(facts: Facts) -> bool:
    """Whether the newest pod of every rank exited with 0. Pods exit with 0 only after the final artefact is committed."""
    exit_codes = [pod.terminated.exit_code if pod.terminated else None for pod in facts.newest_pods]
    return len(exit_codes) == facts.pod_count and all(code == ExitCode.OK for code in exit_codes)


def find_cause_without_job(facts: Facts) -> FailureCause:
    """Return why the current attempt ended if its Job was deleted."""
    pod_cause = find_cause(None, facts.newest_pods, is_model_committed=facts.is_model_committed, stage=facts.reported_stage)
    reason, record = facts.termination_reason, facts.attempt_record
    if reason is None or record is None or pod_cause.retry_policy is RetryPolicy.NEVER:
        # A pod's fatal error would happen again in each further attempt. So the error is the cause, even if the operator ended the attempt
        # for another reason.
        return pod_cause
    message = record.message or str(reason)
    failure = Failure(
        class_=FailureClass.PREEMPTED, code=reason, message=message,
        exit_code=pod_cause.failure.exit_code, node=pod_cause.failure.node,
    )  # fmt: skip
    if reason is Reason.STALLED:
        failure = Failure(class_=FailureClass.INFRASTRUCTURE, code=reason, message=message, exit_code=ExitCode.PEER_FAILED)
    return FailureCause(reason, failure, TERMINATION_RETRY.get(reason, RetryPolicy.NOT_COUNTED))


def find_rank0_termination_message(facts: Facts) -> TerminationMessage | None:
    """Return the newest termination message of a pod of rank 0, or None if no such pod wrote a message."""
    pods = sorted((p for p in facts.attempt_pods if p.completion_index == 0), key=lambda p: p.created_at, reverse=True)
    return next((message for pod in pods if (message := pod.termination_message) is not None), None)


def find_newest_step_of_attempt(facts: Facts, message: TerminationMessage | None) -> int | None:
    """Return the newest step that the current attempt committed, or None if no such step is known.

    A pod reports the checkpoints of all attempts, so this function ignores those of earlier attempts. `message` is rank 0's termination message.
    """
    # If a pod of this attempt was replaced, the status may be the only record of the checkpoints that the replaced pod reported.
    committed_steps = [checkpoint.step for checkpoint in facts.job.status.checkpoints if parse_attempt_of_uri(checkpoint.uri) == facts.attempt]
    for source in facts.reported_checkpoints:
        committed_steps += facts.list_steps_of_this_attempt(source.checkpoints, source.resumed_from_step)
    if message is not None and message.committed_step is not None:
        newest_checkpoint = Checkpoint(step=message.committed_step, uri=message.checkpoint or "")
        committed_steps += facts.list_steps_of_this_attempt([newest_checkpoint], message.resumed_from_step)
    record = facts.attempt_record
    if record is not None and record.committed_step is not None:
        committed_steps.append(record.committed_step)
    return max(committed_steps) if committed_steps else None
