"""Finds out why an attempt ended. If several pods failed, one failure is the cause, and the other failures are its consequences.

The failure with the lowest `FailurePrecedence` is the cause. Among failures with the same precedence, a rank's own failure comes before the
report of a rank that lost contact with another rank. Among the failures that remain, the earliest is the cause.
"""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.exits import (
    EXIT_POLICIES,
    REASON_OF_FAILURE_CLASS,
    ExitPolicy,
    FailurePrecedence,
    RetryPolicy,
    choose_attempt_reason,
)
from finetune_api.names import ExitCode, FailureClass, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import REASON_OF_STAGE, Failure, Stage

from finetune_operator.policies.retry import FailureCause, PodEnd
from finetune_operator.text import clean
from finetune_operator.views import JobView, PodView

NODE_LOST_REASONS = ("DeletionByTaintManager", "DeletionByPodGC")
"""Reasons of a pod's DisruptionTarget condition if the pod's node is lost."""
OOM_KILLED_REASON = "OOMKilled"
EVICTED_REASON = "Evicted"
UNKNOWN_TIME_NS = 2**63
"""The time in nanoseconds of a failure whose time is unknown. This time is so late that a failure without a known time is sorted last."""


def find_cause(job: JobView | None, pods: Iterable[PodView], *, is_model_committed: bool = False, stage: Stage | None = None) -> FailureCause:
    """Return why the attempt ended: the cause in its pods or, if no pod failed, the cause in the conditions of its Job.

    `is_model_committed`: whether the final model is in storage. `stage`: the stage in the last report.
    """
    causes_and_pods = [(cause, pod) for pod in pods if (cause := find_pod_cause(pod, is_model_committed=is_model_committed, stage=stage)) is not None]
    if causes_and_pods:
        return min(causes_and_pods, key=lambda cause_and_pod: _compute_sort_key(*cause_and_pod))[0]
    return _explain_by_job(job)


def _compute_sort_key(cause: FailureCause, pod: PodView) -> tuple[int, bool, int, int]:
    message = pod.termination_message
    reports_other_rank = message is not None and message.origin is False
    time_ns = message.time_ns if message is not None and message.time_ns else None
    if time_ns is None and pod.terminated and pod.terminated.finished_at:
        time_ns = int(pod.terminated.finished_at.timestamp() * 1e9)
    return cause.precedence, reports_other_rank, time_ns if time_ns is not None else UNKNOWN_TIME_NS, pod.completion_index


def find_pod_cause(pod: PodView, *, is_model_committed: bool = False, stage: Stage | None = None) -> FailureCause | None:
    """Return why this pod failed, or None if the pod has not ended or has not failed. The other arguments are those of `find_cause`."""
    if not pod.is_finished or pod.phase == "Succeeded" or (pod.terminated and pod.terminated.exit_code == ExitCode.OK):
        return None
    exit_code = pod.terminated.exit_code if pod.terminated else None
    exit_policy = EXIT_POLICIES.get(exit_code) if exit_code is not None else None
    if pod.terminated is not None and pod.terminated.reason == OOM_KILLED_REASON:
        failed_stage = pod.termination_message.stage if pod.termination_message is not None else None
        if failed_stage is not None or is_model_committed:
            return _explain_memory_limit_after_training(pod, failed_stage or stage)
        return _explain_memory_limit(pod)
    # An evicted pod can exit with an unknown code, with the code of a stop request, or with the code of a lost peer. The cause is the eviction. In the
    # same way, a disruption can lead to a stop request or a lost peer.
    if pod.reason == EVICTED_REASON and not pod.disruption_reason and (exit_policy is None or exit_policy.precedence >= FailurePrecedence.UNKNOWN_CAUSE):
        return _explain_eviction(pod)
    if exit_policy is not None and not (pod.disruption_reason and exit_policy.precedence >= FailurePrecedence.PEER_FAILURE):
        return _explain_known_exit(pod, exit_policy)
    if pod.disruption_reason:
        return _explain_disruption(pod)
    if exit_code is not None:
        return _explain_unknown_exit(pod, exit_code)
    return _explain_missing_exit_code(pod)


def _explain_known_exit(pod: PodView, exit_policy: ExitPolicy) -> FailureCause:
    reported_end = pod.termination_message or TerminationMessage()
    failure_class = reported_end.class_ or exit_policy.failure_class
    message = reported_end.message or _find_last_log_line(pod) or f"exit code {exit_policy.exit_code:d}"
    failure = _build_failure(pod, failure_class, reported_end.code or exit_policy.default_failure_code, message, exit_policy.default_hint)
    if reported_end.stage is not None:
        return _explain_failed_stage(reported_end.stage, failure, exit_policy)
    advice = reported_end.plan.out_of_memory if reported_end.plan is not None else None
    return FailureCause(choose_attempt_reason(exit_policy, failure_class), failure, exit_policy.retry_policy, exit_policy.precedence, advice)


def _explain_failed_stage(stage: Stage, failure: Failure, exit_policy: ExitPolicy) -> FailureCause:
    """Return the cause if a stage after training failed. Training is complete, so values of the training are not adapted."""
    adapts_training = exit_policy.retry_policy in (RetryPolicy.ADAPT_MEMORY, RetryPolicy.ROLL_BACK)
    retry_policy = RetryPolicy.COUNTED if adapts_training else exit_policy.retry_policy
    reason = exit_policy.reason if exit_policy.reason is Reason.GATE_FAILED else REASON_OF_STAGE.get(stage, exit_policy.reason)
    return FailureCause(reason, failure, retry_policy, exit_policy.precedence)


def _build_cause(reason: Reason, failure: Failure, pod_end: PodEnd) -> FailureCause:
    return FailureCause(reason, failure, pod_end.value.retry_policy, pod_end.value.precedence)


def _explain_memory_limit(pod: PodView) -> FailureCause:
    message = "the kernel killed the trainer: the pod's memory limit was reached"
    failure = _build_failure(pod, FailureClass.OUT_OF_MEMORY, OOM_KILLED_REASON, message)
    hint = "raise resources.memory, or lower training.batchSizePerDevice"
    return _build_cause(Reason.OUT_OF_MEMORY, failure.model_copy(update={"hint": hint}), PodEnd.OUT_OF_HOST_MEMORY)


def _explain_memory_limit_after_training(pod: PodView, stage: Stage | None) -> FailureCause:
    """Return the cause if the memory limit was reached after the model was committed. The next attempt keeps all values of `spec.training`."""
    cause = _explain_memory_limit(pod)
    reason = REASON_OF_STAGE.get(stage, cause.reason) if stage is not None else cause.reason
    failure = cause.failure.model_copy(update={"hint": "raise resources.memory"})
    return FailureCause(reason, failure, RetryPolicy.COUNTED, cause.precedence)


def _explain_eviction(pod: PodView) -> FailureCause:
    """Return the cause if the kubelet evicted the pod because it used too much disk or memory. Other evictions set DisruptionTarget."""
    failure = _build_failure(pod, FailureClass.INFRASTRUCTURE, EVICTED_REASON, pod.message or "the node evicted the pod")
    hint = "raise resources.ephemeralStorage, or resources.sharedMemory if the message names a volume"
    return _build_cause(Reason.PREEMPTED, failure.model_copy(update={"hint": hint}), PodEnd.EXCEEDED_LIMIT)


def _explain_disruption(pod: PodView) -> FailureCause:
    is_node_lost = pod.disruption_reason in NODE_LOST_REASONS
    message = pod.disruption_message or ("the node is lost" if is_node_lost else "the cluster removed the pod")
    failure = _build_failure(pod, FailureClass.PREEMPTED, pod.disruption_reason, message)
    return _build_cause(Reason.NODE_LOST if is_node_lost else Reason.PREEMPTED, failure, PodEnd.DISRUPTED)


def _explain_unknown_exit(pod: PodView, exit_code: int) -> FailureCause:
    if exit_code in (ExitCode.SIGTERM, ExitCode.SIGKILL) and pod.deletion_timestamp is not None:
        message = "the pod was deleted, and the trainer was killed before it had saved a checkpoint"
        failure = _build_failure(pod, FailureClass.PREEMPTED, "PreemptedNotSaved", message)
        return _build_cause(Reason.PREEMPTED, failure, PodEnd.DELETED_UNSAVED)
    reported_end = pod.termination_message or TerminationMessage()
    failure_class = reported_end.class_ or FailureClass.INTERNAL
    message = reported_end.message or _find_last_log_line(pod) or f"the trainer ended with exit code {exit_code}"
    failure = _build_failure(pod, failure_class, reported_end.code or f"ExitCode{exit_code}", message)
    return _build_cause(REASON_OF_FAILURE_CLASS[failure_class], failure, PodEnd.UNKNOWN_EXIT)


def _explain_missing_exit_code(pod: PodView) -> FailureCause:
    """Return the cause if the trainer has no exit code: an init container failed, the kubelet rejected the pod, or the pod was deleted."""
    if pod.init_failure_message:
        failure = _build_failure(pod, FailureClass.INFRASTRUCTURE, "InitContainerFailed", pod.init_failure_message)
        return _build_cause(Reason.PEER_FAILED, failure, PodEnd.NOT_STARTED)
    if pod.phase == "Failed":
        message = pod.message or "the node rejected the pod"
        failure = _build_failure(pod, FailureClass.INFRASTRUCTURE, pod.reason or "PodRejected", message)
        return _build_cause(Reason.PEER_FAILED, failure, PodEnd.NOT_STARTED)
    failure = _build_failure(pod, FailureClass.PREEMPTED, "PodDeleted", "the pod was deleted")
    return _build_cause(Reason.PREEMPTED, failure, PodEnd.DELETED)


def _explain_by_job(job: JobView | None) -> FailureCause:
    code = (job.failed_reason if job else "") or "PodsLost"
    message = (job.failed_message if job else "") or "the pods were deleted before the operator read their exit codes"
    failure = Failure(class_=FailureClass.INFRASTRUCTURE, code=code, message=clean(message))
    return _build_cause(Reason.PEER_FAILED, failure, PodEnd.UNKNOWN)


def _build_failure(pod: PodView, failure_class: FailureClass, code: str, message: str, hint: str = "") -> Failure:
    reported_end = pod.termination_message or TerminationMessage()
    return Failure(
        class_=failure_class,
        code=clean(code, 128),
        message=clean(message),
        hint=clean(reported_end.hint or hint) or None,
        node=pod.node or None,
        rank=reported_end.rank,
        step=reported_end.step,
        exit_code=pod.terminated.exit_code if pod.terminated else None,
    )


def _find_last_log_line(pod: PodView) -> str:
    """Return the last log line of a trainer that wrote no termination message. The kubelet then stores the end of the log in place of the message."""
    text = pod.terminated.message if pod.terminated else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines and not text.startswith("{") else ""
