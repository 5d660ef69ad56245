"""Decides about the preparation: a Job without GPUs that checks storage, model and data before the first attempt.

If the preparation finds a mistake of the user, the job fails before a pod asks for a GPU. If the preparation fails for another reason, the operator
repeats it. With `prepare.strategy: auto`, a preparation that gets no node or cannot run is skipped, and the training pods check everything
themselves, as without a preparation. `status.preparation` contains all decisions, so a restarted operator continues from them.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_api.exits import RetryPolicy
from finetune_api.names import Condition, ExitCode, FailureClass, Reason, make_preparation_job_name
from finetune_api.rules import needs_preparation
from finetune_api.spec.enums import OnExistingResult, PrepareStrategy
from finetune_api.status import Failure, Preparation

from finetune_operator.deadlines import add_seconds
from finetune_operator.facts import Facts
from finetune_operator.plan import JobEnd, Outcome, Plan, Situation
from finetune_operator.policies import timeouts
from finetune_operator.policies.blocking import BlockingCondition, find_blocking_condition_in_pods
from finetune_operator.policies.cause import find_cause
from finetune_operator.policies.retry import DEFAULT_RETRIES, FailureCause, compute_pause_seconds
from finetune_operator.policies.verdict import AcceptedSpec
from finetune_operator.text import clean
from finetune_operator.views import JobView, PodView

PLACEMENT_SECONDS = 300.0
"""With strategy auto, a preparation whose pod does not start within this many seconds is skipped."""
MAX_AUTO_PREPARATIONS = 6
"""Maximum number of preparations of a job with strategy auto. This limit is reached, for example, if the cluster removes the pod each time."""
PREPARATION_ONLY_CODES = ("LocalDiskTooSmall", "CredentialsMissing", "RewardFileInvalid")
"""Failure codes with which a preparation may end although a training pod would succeed, because the training pod has more disk, the
role of another node, or a GPU for the user's reward code."""
DEADLINE_REASON = "DeadlineExceeded"
"""Reason of a failed Job whose `activeDeadlineSeconds` passed."""


def plan_preparation(facts: Facts) -> Plan | None:
    """Return the plan of a job that must be prepared before its first attempt.

    Return None if no preparation is needed, or if an earlier Job or pod of the FineTuneJob must end first.
    """
    if not _needs_preparation(facts):
        return None
    record = facts.job.status.preparation or Preparation(number=facts.preparation_number, start_time=facts.now)
    job = facts.preparation_job
    if job is None:
        has_unfinished_pods = any(not pod.is_finished for pod in facts.owned_pods)
        return None if has_unfinished_pods else _plan_start(facts, record)
    if job.is_deleting:
        return None
    if job.completed_at is not None:
        return _plan_success(facts, record, job.completed_at)
    if job.failed_at is not None:
        return _plan_failure(facts, record, job, facts.preparation_pods)
    return _plan_running(facts, record, job, facts.preparation_pods)


def _needs_preparation(facts: Facts) -> bool:
    """Whether the job must be prepared, and no preparation has a final result yet. Final results are: prepared, skipped, failed."""
    if facts.attempt > 1 or facts.attempt_record is not None or facts.is_suspend_requested or not isinstance(facts.acceptance, AcceptedSpec):
        return False
    if not facts.crd_has_preparation_field:
        return False
    record, strategy = facts.job.status.preparation, facts.spec.prepare.strategy
    if record is not None and record.reason is not None:
        return False
    return needs_preparation(facts.spec, strategy)


def _plan_start(facts: Facts, record: Preparation) -> Plan:
    """Return the plan that creates the preparation's Job, that waits until the pause after a failure ends, or that skips the preparation."""
    start_time = _compute_start_time(facts, record)
    if start_time > facts.now:
        return Plan(Situation.PREPARING, reconcile_at=timeouts.compute_next_reconcile(facts.now, start_time))
    if _may_start_unprepared(facts) and facts.now >= add_seconds(start_time, PLACEMENT_SECONDS):
        return _plan_skip(record, facts.now, f"no Job could be created for {PLACEMENT_SECONDS:.0f} s")
    is_new = facts.job.status.preparation is None
    return Plan(
        Situation.PREPARING, preparation_to_create=record.number, preparation=record if is_new else None, jobs_to_delete=_find_superseded_jobs(facts, record),
        reconcile_at=timeouts.compute_next_reconcile(facts.now, add_seconds(start_time, PLACEMENT_SECONDS)),
    )  # fmt: skip


def _find_superseded_jobs(facts: Facts, record: Preparation) -> tuple[JobView, ...]:
    """Return the finished Jobs of earlier preparations, except the newest, which is kept so that users can read its pod's logs."""
    newest_job_name = make_preparation_job_name(facts.job.name, record.number - 1)
    return tuple(job for job in facts.owned_jobs if job.name != newest_job_name and job.is_finished and not job.is_deleting)


def _compute_start_time(facts: Facts, record: Preparation) -> datetime:
    """Return the earliest start of the preparation: after the end of a suspension, and after the pause that follows a failed preparation."""
    suspended_condition, ended_at = facts.condition(Condition.SUSPENDED), record.end_time
    failed_count = record.number - 1
    pause_seconds = compute_pause_seconds(failed_count, facts.config.retry) if failed_count else 0.0
    earliest_starts = [record.start_time, add_seconds(ended_at, pause_seconds) if ended_at else None]
    if suspended_condition is not None:
        earliest_starts.append(facts.now if suspended_condition.status == "True" else suspended_condition.last_transition_time)
    return max(time for time in earliest_starts if time is not None)


def _plan_running(facts: Facts, record: Preparation, job: JobView, pods: tuple[PodView, ...]) -> Plan:
    if timeouts.find_pods_of_lost_nodes(pods, facts.config.lost_node_seconds, facts.now):
        next_preparation = record.model_copy(update={"number": record.number + 1, "end_time": facts.now, "message": "the node of the pod is lost"})
        return Plan(Situation.PREPARING, jobs_to_delete=(job,), preparation=next_preparation)
    # If the pod's status does not show why the pod does not start, events may show it: a missing ConfigMap, a volume or a quota.
    blocking_condition = find_blocking_condition_in_pods(pods) or facts.blocking_condition
    is_waiting = blocking_condition is not None or not any(pod.node for pod in pods)
    placement_deadline = add_seconds(job.created_at, PLACEMENT_SECONDS)
    if is_waiting and _may_start_unprepared(facts) and facts.now >= placement_deadline:
        problem = blocking_condition.message if blocking_condition else "no node could take the pod"
        return _plan_skip(record, facts.now, f"the pod of the preparation did not start within {PLACEMENT_SECONDS:.0f} s: {problem}")
    deletion_times = [pod.deletion_timestamp for pod in pods if pod.deletion_timestamp]
    node_lost_at = add_seconds(min(deletion_times), facts.config.lost_node_seconds + 1) if deletion_times else None
    return Plan(
        Situation.PREPARING, blocking_condition=blocking_condition, pod_to_scrape=_find_pod_to_read(facts, pods),
        reconcile_at=timeouts.compute_next_reconcile(facts.now, placement_deadline if is_waiting else None, node_lost_at),
    )  # fmt: skip


def _find_pod_to_read(facts: Facts, pods: tuple[PodView, ...]) -> PodView | None:
    """Return the running pod whose progress the operator reads. Return None if `isolation.secret` is false, because the pod then refuses all requests."""
    running_pods = (pod for pod in pods if pod.phase == "Running" and pod.ip and not pod.is_deleted)
    return next(running_pods, None) if facts.config.isolation.secret else None


def _plan_success(facts: Facts, record: Preparation, ended_at: datetime) -> Plan:
    message = next((message for pod in facts.preparation_pods if (message := pod.termination_message) is not None), None)
    if message is not None and message.output is not None and message.output.adopted_uid and facts.spec.policy.on_existing_result is OnExistingResult.ADOPT:
        reason = Reason.EXISTING_RESULT_ADOPTED
        ended_preparation = record.model_copy(update={"end_time": ended_at, "reason": reason.value, "message": None})
        return Plan(Situation.PREPARING, preparation=ended_preparation, preparation_message=message, job_end=JobEnd(Outcome.SUCCEEDED, reason))
    ended_preparation = record.model_copy(update={"end_time": ended_at, "reason": Reason.PREPARED.value, "message": None})
    return Plan(Situation.PREPARING, preparation=ended_preparation, preparation_message=message)


def _plan_failure(facts: Facts, record: Preparation, job: JobView, pods: tuple[PodView, ...]) -> Plan:
    """Return the plan after a failed preparation: repeat it, skip it or fail the job."""
    assert job.failed_at is not None  # noqa: S101 -- the caller checks
    cause = _find_cause_of_preparation(job, pods)
    is_final = _is_users_mistake(facts, job, cause, pods)
    if not is_final and _may_repeat(facts, record, job, cause):
        failure_count = record.failures + (cause.retry_policy is RetryPolicy.COUNTED)
        next_preparation = Preparation(
            number=record.number + 1, failures=failure_count, start_time=record.start_time, end_time=job.failed_at, message=clean(cause.failure.message)
        )
        return Plan(Situation.PREPARING, preparation=next_preparation)
    if _may_start_unprepared(facts) and not is_final:
        return _plan_skip(record, job.failed_at, f"the preparation failed: {cause.failure.message}")
    reason = Reason.RETRIES_EXHAUSTED if cause.retry_policy is RetryPolicy.COUNTED else cause.reason
    ended_preparation = record.model_copy(update={"end_time": job.failed_at, "reason": reason.value, "message": clean(cause.failure.message)})
    return Plan(Situation.PREPARING, preparation=ended_preparation, job_end=JobEnd(Outcome.FAILED, reason, cause.failure))


def _find_cause_of_preparation(job: JobView, pods: tuple[PodView, ...]) -> FailureCause:
    """Return why the preparation failed. Hints name the fields of the preparation instead of those of training pods."""
    cause = find_cause(job, pods)
    failure, changed_fields = cause.failure, {}
    if job.failed_reason == DEADLINE_REASON:
        message = "the preparation was ended because it took longer than six hours"
        failure = Failure(class_=FailureClass.INFRASTRUCTURE, code="PreparationTooSlow", message=message)
        return FailureCause(Reason.STALLED, failure, RetryPolicy.NEVER)
    if cause.retry_policy is RetryPolicy.ADAPT_MEMORY:
        changed_fields = {"hint": "raise prepare.resources.memory"}
    elif failure.code in ("LocalDiskTooSmall", "LocalDiskFull"):
        changed_fields = {"hint": "raise prepare.resources.ephemeralStorage"}
    return replace(cause, failure=failure.model_copy(update=changed_fields))


def _is_users_mistake(facts: Facts, job: JobView, cause: FailureCause, pods: tuple[PodView, ...]) -> bool:
    """Whether the failure is a mistake of the user that would also end a training pod, so that no attempt can succeed."""
    if job.failed_reason == DEADLINE_REASON:
        return False
    has_termination_message = any(pod.termination_message is not None for pod in pods)
    if cause.retry_policy is not RetryPolicy.NEVER or not has_termination_message or cause.failure.code in PREPARATION_ONLY_CODES:
        return False
    # Without a credentials Secret, a pod can get its rights from the role of its node. The training pods run on other nodes, so their rights can
    # differ from those of the preparation pod.
    has_secret = facts.spec.storage.credentials_secret_ref is not None
    return has_secret or cause.failure.exit_code != ExitCode.CREDENTIALS_REFUSED


def _may_repeat(facts: Facts, record: Preparation, job: JobView, cause: FailureCause) -> bool:
    """Whether the preparation may be repeated, because the next preparation may succeed."""
    if job.failed_reason == DEADLINE_REASON or (_may_start_unprepared(facts) and record.number >= MAX_AUTO_PREPARATIONS):
        return False
    match cause.retry_policy:
        case RetryPolicy.NOT_COUNTED:
            return True
        case RetryPolicy.WAIT:
            return not _may_start_unprepared(facts)
        case RetryPolicy.COUNTED:
            allowed_retries = facts.spec.policy.retries if facts.spec.policy.retries is not None else DEFAULT_RETRIES
            return record.failures < allowed_retries
        case _:
            return False


def _plan_skip(record: Preparation, ended_at: datetime, problem: str) -> Plan:
    message = clean(f"{problem}; the training pods check storage, model and data instead")
    skipped_preparation = record.model_copy(update={"end_time": ended_at, "reason": Reason.PREPARATION_SKIPPED.value, "message": message})
    return Plan(Situation.PREPARING, preparation=skipped_preparation)


def _may_start_unprepared(facts: Facts) -> bool:
    """Whether the job may start without a preparation: with strategy auto, unless the user wrote `policy.onExistingResult: adopt` or `fail`."""
    return facts.spec.prepare.strategy is PrepareStrategy.AUTO and not facts.requires_result_comparison


def describe_preparation(record: Preparation, blocking_condition: BlockingCondition | None) -> tuple[Reason, str]:
    """Return the reason and the message for the conditions of a job that is being prepared."""
    if blocking_condition is not None:
        return blocking_condition.reason, f"preparation {record.number} waits: {blocking_condition.message}"
    earlier_failure = f"; the preparation before it failed: {record.message}" if record.message else ""
    return Reason.PREPARING, f"preparation {record.number} checks storage, model and data without a GPU{earlier_failure}"
