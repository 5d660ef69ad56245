"""Computes the plan for a job from the facts. `decide` is a pure function: the same facts always produce the same plan.

`decide` checks in this order: Is the job finished? Does the current attempt have a Job, and must the attempt be ended? Has the attempt
ended, and does another attempt follow? Must the job be prepared? May the next attempt start? Each reconcile makes one of these decisions.
Three decisions are written to the status before they are carried out: why an attempt is ended (`termination`), the number of the next
attempt (`attempt_end`), and the end of a preparation (`preparation`). A restarted operator reads these three decisions from the status and carries them out.
"""

from __future__ import annotations

from finetune_api.names import FailureClass, Reason, attempt_job_name
from finetune_api.status import Failure

from finetune_operator.attempt_end import all_ranks_succeeded, find_cause_without_job, plan_attempt_end
from finetune_operator.costs import (
    build_budget_failure,
    describe_excessive_cost,
    describe_spent_budget,
    predict_budget_end,
)
from finetune_operator.deadlines import (
    compute_backoff_interval,
    compute_force_delete_time,
    compute_stall_check_time,
    compute_start_timeout_end,
    describe_stall,
    get_start_timeout_seconds,
)
from finetune_operator.facts import Facts
from finetune_operator.plan import JobEnd, Outcome, Plan, Situation, Termination
from finetune_operator.policies import timeouts
from finetune_operator.policies.blocking import BlockingCondition, find_blocking_condition_in_pods
from finetune_operator.policies.cause import find_cause
from finetune_operator.policies.verdict import RefusedSpec
from finetune_operator.preparation import plan_preparation
from finetune_operator.views import JobView, PodView


def decide(facts: Facts) -> Plan:
    """Return the plan for one job."""
    if facts.job.is_deleting:
        return Plan(Situation.DELETING)
    if facts.is_finished:
        return _plan_clean_up(facts)
    current_job = facts.current_job
    if current_job is not None:
        return _plan_attempt_with_job(facts, current_job)
    record = facts.attempt_record
    if record is not None and record.start_time is not None and record.end_time is None:
        return _plan_attempt_without_job(facts)
    return _plan_before_attempt(facts)


def _plan_clean_up(facts: Facts) -> Plan:
    """Return the plan that deletes the unfinished Jobs and pods of a finished job and, after the TTL, also its finished Jobs and pods."""
    expires_at = timeouts.compute_ttl_end(facts.ttl_seconds_after_finished, facts.job.status.completion_time)
    is_expired = expires_at is not None and facts.now >= expires_at
    jobs_to_delete = tuple(job for job in facts.owned_jobs if not job.is_deleting and (is_expired or not job.is_finished))
    # The deletion of a Job also deletes its pods. Orphaned pods have no Job, so each of them is deleted separately.
    orphaned_pods = [pod for pod in _find_orphaned_pods(facts) if not (pod.is_deleted or pod.deletion_timestamp)]
    pods_to_delete = tuple(pod for pod in orphaned_pods if is_expired or not pod.is_finished)
    return Plan(
        Situation.FINISHED,
        jobs_to_delete=jobs_to_delete,
        pods_to_delete=pods_to_delete,
        reconcile_at=None if is_expired else timeouts.compute_next_reconcile(facts.now, expires_at),
        is_cleaned_up=not (jobs_to_delete or pods_to_delete),
    )


def _plan_before_attempt(facts: Facts) -> Plan:
    """Return the plan for a job whose current attempt has no Job yet."""
    if facts.is_cancel_requested:
        return Plan(Situation.FINISHED, job_end=JobEnd(Outcome.CANCELLED, Reason.CANCELLED))
    refusal = facts.acceptance if isinstance(facts.acceptance, RefusedSpec) else None
    if refusal is not None and refusal.is_final:
        return _plan_refusal(refusal)
    preparation_plan = plan_preparation(facts)
    if preparation_plan is not None:
        return preparation_plan
    cost_message = describe_excessive_cost(facts)
    if cost_message:
        return Plan(Situation.FINISHED, job_end=JobEnd(Outcome.FAILED, Reason.BUDGET_EXCEEDED, build_budget_failure(cost_message)))
    ending_plan = _plan_end_of_earlier_attempts(facts)
    if ending_plan is not None:
        return ending_plan
    if facts.is_suspend_requested:
        return Plan(Situation.SUSPENDED)
    timeout_at = timeouts.compute_next_reconcile(facts.now, compute_start_timeout_end(facts))
    if refusal is not None:
        return Plan(Situation.REFUSED, refusal=refusal, reconcile_at=timeout_at)
    foreign_job = next((job for job in facts.jobs if job.name == attempt_job_name(facts.job.name, facts.attempt)), None)
    if foreign_job is not None:
        message = f"Job {foreign_job.name} belongs to another object (uid {foreign_job.owner_uid or 'unknown'})"
        blocking_condition = BlockingCondition(Reason.CHILDREN_CONFLICT, message)
        return Plan(Situation.BLOCKED, blocking_condition=blocking_condition, reconcile_at=timeout_at)
    backoff_start, backoff_end = compute_backoff_interval(facts)
    # If the clock was set back, `now` is before `backoff_start` and the backoff would last too long. The backoff then ends at once.
    if backoff_start is not None and backoff_end is not None and backoff_start <= facts.now < backoff_end:
        return Plan(Situation.BACKING_OFF, reconcile_at=timeouts.compute_next_reconcile(facts.now, backoff_end))
    return Plan(Situation.STARTING, attempt_to_create=facts.attempt, jobs_to_delete=_find_superseded_jobs(facts))


def _plan_refusal(refusal: RefusedSpec) -> Plan:
    failure = Failure(class_=FailureClass.USER, code=refusal.reason, message=refusal.message, hint=refusal.hint or None)
    return Plan(Situation.FINISHED, refusal=refusal, job_end=JobEnd(Outcome.FAILED, refusal.reason, failure))


def _plan_end_of_earlier_attempts(facts: Facts) -> Plan | None:
    """Return the plan that deletes unfinished Jobs and pods of earlier attempts, because only one attempt may run. Return None if none exist."""
    earlier_jobs = tuple(job for job in facts.owned_jobs if not job.is_finished or job.is_deleting)
    earlier_pods = tuple(pod for pod in _find_orphaned_pods(facts) if not pod.is_finished)
    if not earlier_jobs and not earlier_pods:
        return None
    return Plan(
        Situation.BLOCKED,
        jobs_to_delete=tuple(job for job in earlier_jobs if not job.is_deleting),
        pods_to_delete=tuple(pod for pod in earlier_pods if not pod.deletion_timestamp),
        pods_to_force_delete=_find_pods_of_lost_nodes(facts, facts.owned_pods),
        blocking_condition=BlockingCondition(Reason.PROGRESSING, "waiting for the pods of the last attempt to end"),
        reconcile_at=timeouts.compute_next_reconcile(facts.now, compute_force_delete_time(facts, facts.owned_pods), compute_start_timeout_end(facts)),
    )


def _plan_attempt_with_job(facts: Facts, current_job: JobView) -> Plan:
    """Return the plan for a job whose current attempt has a Job."""
    if current_job.completed_at is not None:
        return plan_attempt_end(facts, None, current_job.completed_at)
    if facts.termination_reason is not None or current_job.is_deleting:
        return _plan_termination(facts, current_job)
    if current_job.failed_at is not None:
        cause = find_cause(current_job, facts.newest_pods, is_model_committed=facts.is_model_committed, stage=facts.reported_stage)
        return plan_attempt_end(facts, cause, current_job.failed_at)
    termination = _find_termination(facts, current_job)
    if termination is not None:
        return Plan(Situation.ACTIVE, termination=termination)
    pods = facts.active_pods
    rank0_pod = facts.rank0_pod
    all_pods_ready = sum(pod.is_ready for pod in pods) >= facts.pod_count
    deadline = timeouts.compute_deadline(facts.active_deadline_seconds, facts.earlier_running_seconds, facts.running_since)
    time_limits = [
        None if current_job.is_suspended else deadline,
        predict_budget_end(facts),
        compute_force_delete_time(facts, pods),
        compute_stall_check_time(facts),
        None if all_pods_ready else compute_start_timeout_end(facts),
    ]
    return Plan(
        Situation.ACTIVE,
        blocking_condition=None if all_pods_ready or current_job.is_suspended else (find_blocking_condition_in_pods(pods) or facts.blocking_condition),
        pod_to_scrape=rank0_pod if rank0_pod is not None and rank0_pod.phase == "Running" and rank0_pod.ip else None,
        reconcile_at=timeouts.compute_next_reconcile(facts.now, *time_limits),
        jobs_to_delete=_find_superseded_jobs(facts),
    )


def _find_termination(facts: Facts, current_job: JobView) -> Termination | None:
    """Return why the running attempt must be ended, or None if the attempt may continue."""
    if facts.is_cancel_requested:
        return Termination(Reason.CANCELLED, "spec.cancel is true")
    if facts.is_suspend_requested:
        return Termination(Reason.SUSPENDED, "spec.suspend is true")
    limit_seconds = facts.active_deadline_seconds
    if limit_seconds is not None and facts.running_since is not None and facts.compute_running_seconds(facts.now) >= limit_seconds:
        return Termination(Reason.DEADLINE_EXCEEDED, f"{facts.deadline_source} {limit_seconds} passed")
    spent_message = describe_spent_budget(facts, facts.now)
    if spent_message:
        return Termination(Reason.BUDGET_EXCEEDED, spent_message)
    pods_of_lost_nodes = _find_pods_of_lost_nodes(facts, facts.active_pods)
    if pods_of_lost_nodes:
        return Termination(Reason.NODE_LOST, f"pod {pods_of_lost_nodes[0].name} does not end: node {pods_of_lost_nodes[0].node or 'unknown'} is lost")
    if not facts.is_spec_readable:
        # The timeouts that are checked below are in the spec, which the operator cannot read. The attempt continues, because no new attempt
        # could start with this spec.
        return None
    gang_message = _describe_incomplete_gang(facts, current_job)
    if gang_message:
        return Termination(Reason.GANG_INCOMPLETE, gang_message)
    stall_message = describe_stall(facts)
    return Termination(Reason.STALLED, stall_message) if stall_message else None


def _describe_incomplete_gang(facts: Facts, current_job: JobView) -> str:
    """Return why the attempt must release its nodes, or an empty string if the attempt keeps its nodes.

    If two gangs each hold some of the nodes, they wait for each other forever, unless a queue such as Kueue schedules them. If no pod has
    a node, the attempt keeps waiting: the attempt blocks no other job, and an autoscaler may be adding nodes.
    """
    timeout_at = compute_start_timeout_end(facts)
    if current_job.queue or timeout_at is None or facts.now < timeout_at:
        return ""
    placed_count = sum(bool(pod.node) for pod in facts.active_pods)
    if placed_count in (0, facts.pod_count) or len(facts.newest_pods) > len(facts.active_pods):
        return ""
    timeout_seconds = get_start_timeout_seconds(facts)
    return (
        f"{placed_count} of {facts.pod_count} pods have a node, but the other pods got no node within {timeout_seconds} s: "
        "the nodes are freed for other jobs"
    )


def _plan_termination(facts: Facts, current_job: JobView) -> Plan:
    """Return a plan that deletes the attempt's Job. If another client deleted the Job, the plan first records this as the reason of the end."""
    if facts.termination_reason is None:
        termination = Termination(Reason.PREEMPTED, "the Job of this attempt was deleted by another client than the operator")
        return Plan(Situation.TERMINATING, termination=termination)
    return Plan(
        Situation.TERMINATING,
        jobs_to_delete=() if current_job.is_deleting else (current_job,),
        pods_to_force_delete=_find_pods_of_lost_nodes(facts, facts.attempt_pods),
        reconcile_at=timeouts.compute_next_reconcile(facts.now, compute_force_delete_time(facts, facts.attempt_pods)),
    )


def _plan_attempt_without_job(facts: Facts) -> Plan:
    """Return the plan for an attempt whose Job was deleted: delete the unfinished pods, then record the end of the attempt."""
    unfinished_pods = tuple(pod for pod in facts.attempt_pods if not pod.is_finished)
    if unfinished_pods:
        return Plan(
            Situation.TERMINATING,
            pods_to_delete=tuple(pod for pod in unfinished_pods if not pod.deletion_timestamp),
            pods_to_force_delete=_find_pods_of_lost_nodes(facts, unfinished_pods),
            reconcile_at=timeouts.compute_next_reconcile(facts.now, compute_force_delete_time(facts, unfinished_pods)),
        )
    cause = None if all_ranks_succeeded(facts) else find_cause_without_job(facts)
    return plan_attempt_end(facts, cause, facts.last_seen_at)


def _find_pods_of_lost_nodes(facts: Facts, pods: tuple[PodView, ...]) -> tuple[PodView, ...]:
    return tuple(timeouts.find_pods_of_lost_nodes(pods, facts.config.lost_node_seconds, facts.now))


def _find_orphaned_pods(facts: Facts) -> list[PodView]:
    """Return the FineTuneJob's pods that no existing Job owns."""
    job_uids = {job.uid for job in facts.owned_jobs}
    return [pod for pod in facts.owned_pods if pod.job_uid not in job_uids]


def _find_superseded_jobs(facts: Facts) -> tuple[JobView, ...]:
    """Return the finished Jobs of earlier attempts, except the newest. The newest Job is kept so that users can read its pods' logs."""
    earlier_jobs = sorted((job for job in facts.owned_jobs if job.attempt < facts.attempt), key=lambda job: job.attempt)
    return tuple(job for job in earlier_jobs[:-1] if job.is_finished and not job.is_deleting)
