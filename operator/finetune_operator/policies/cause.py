"""Why did an attempt end? When several pods failed, one of them is the cause and the others are its consequences.

User, data, model and storage errors come before memory and divergence, those before what nobody classified, then the cluster
taking a pod away, then peers that noticed, then pods that stopped because they were told to. Among equals a rank that failed by
itself comes before one that noticed, and the earlier before the later.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.exits import EXIT_POLICIES, REASON_OF_CLASS, ExitPolicy, Precedence, RetryPolicy, attempt_reason
from finetune_api.names import ExitCode, FailureClass, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Failure

from finetune_operator.text import clean
from finetune_operator.views import JobView, PodView


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended without success."""

    reason: Reason
    failure: Failure
    retry: RetryPolicy
    precedence: Precedence = Precedence.UNKNOWN


NODE_LOST = ("DeletionByTaintManager", "DeletionByPodGC")
"""Reasons of DisruptionTarget that mean: the node went away."""
OOM_KILLED = "OOMKilled"
EVICTED = "Evicted"
FOREVER = 2**63


def cause_of(job: JobView | None, pods: Iterable[PodView]) -> Cause:
    """Why the attempt that these pods belong to ended; the Job is asked where no pod tells."""
    found = [(cause, pod) for pod in pods if (cause := pod_cause(pod)) is not None]
    if found:
        return min(found, key=lambda pair: _order(*pair))[0]
    return _job_cause(job)


def _order(cause: Cause, pod: PodView) -> tuple[int, bool, int, int]:
    words = pod.termination_message
    noticed = words is not None and words.origin is False
    when = words.time_ns if words is not None and words.time_ns else None
    if when is None and pod.terminated and pod.terminated.finished_at:
        when = int(pod.terminated.finished_at.timestamp() * 1e9)
    return cause.precedence, noticed, when if when is not None else FOREVER, pod.index


def pod_cause(pod: PodView) -> Cause | None:
    """What one pod's end says; None if it did not fail, or has not ended."""
    if not pod.is_finished or pod.phase == "Succeeded" or (pod.terminated and pod.terminated.exit_code == ExitCode.OK):
        return None
    code = pod.terminated.exit_code if pod.terminated else None
    policy = EXIT_POLICIES.get(code) if code is not None else None
    if pod.terminated is not None and pod.terminated.reason == OOM_KILLED:
        return _host_memory(pod)
    # An eviction explains a crash that nobody classified, a stop or a lost peer; a disruption explains a stop or a lost peer.
    if pod.reason == EVICTED and not pod.disruption and (policy is None or policy.precedence >= Precedence.UNKNOWN):
        return _over_its_limit(pod)
    if policy is not None and not (pod.disruption and policy.precedence >= Precedence.PEER):
        return _exit(pod, policy)
    if pod.disruption:
        return _disrupted(pod)
    if code is not None:
        return _unknown_exit(pod, code)
    return _without_container(pod)


def _exit(pod: PodView, policy: ExitPolicy) -> Cause:
    words = pod.termination_message or TerminationMessage()
    failure_class = words.class_ or policy.failure_class
    message = words.message or _raw(pod) or f"exit code {policy.code:d}"
    failure = _failure(pod, failure_class, words.code or policy.word, message, policy.hint)
    return Cause(attempt_reason(policy, failure_class), failure, policy.retry, policy.precedence)


def _host_memory(pod: PodView) -> Cause:
    message = "the kernel killed the trainer: the pod's memory limit was reached"
    failure = _failure(pod, FailureClass.OUT_OF_MEMORY, OOM_KILLED, message)
    hint = "raise resources.memory, or lower training.batchSizePerDevice"
    failure = failure.model_copy(update={"hint": hint})
    return Cause(Reason.OUT_OF_MEMORY, failure, RetryPolicy.ADAPT_MEMORY, Precedence.NUMERIC)


def _over_its_limit(pod: PodView) -> Cause:
    """Evicted for what it did itself: a kubelet that needs room for others says so with a disruption."""
    failure = _failure(pod, FailureClass.INFRASTRUCTURE, EVICTED, pod.message or "the node evicted the pod")
    hint = "raise resources.ephemeralStorage, or resources.sharedMemory if its words name a volume"
    return Cause(Reason.PREEMPTED, failure.model_copy(update={"hint": hint}), RetryPolicy.COUNTED, Precedence.CLUSTER)


def _disrupted(pod: PodView) -> Cause:
    lost = pod.disruption in NODE_LOST
    message = pod.disruption_message or ("the node went away" if lost else "the cluster took the pod")
    failure = _failure(pod, FailureClass.PREEMPTED, pod.disruption, message)
    return Cause(Reason.NODE_LOST if lost else Reason.PREEMPTED, failure, RetryPolicy.FREE, Precedence.CLUSTER)


def _unknown_exit(pod: PodView, code: int) -> Cause:
    if code in (ExitCode.TERMINATED, ExitCode.KILLED) and pod.deletion_timestamp is not None:
        failure = _failure(
            pod, FailureClass.PREEMPTED, "PreemptedNotSaved", "the pod was deleted and did not save in time"
        )
        return Cause(Reason.PREEMPTED, failure, RetryPolicy.FREE, Precedence.STOPPED)
    words = pod.termination_message or TerminationMessage()
    failure_class = words.class_ or FailureClass.INTERNAL
    message = words.message or _raw(pod) or f"the trainer ended with exit code {code}"
    return Cause(
        REASON_OF_CLASS[failure_class],
        _failure(pod, failure_class, words.code or f"ExitCode{code}", message),
        RetryPolicy.COUNTED,
    )


def _without_container(pod: PodView) -> Cause:
    """No container ever ended: rejected by the kubelet, evicted before it ran, or deleted."""
    if pod.init_failed:
        failure = _failure(pod, FailureClass.INFRASTRUCTURE, "InitContainerFailed", pod.init_failed)
        return Cause(Reason.PEER_FAILED, failure, RetryPolicy.COUNTED, Precedence.CLUSTER)
    if pod.phase == "Failed":
        message = pod.message or "the node refused the pod"
        failure = _failure(pod, FailureClass.INFRASTRUCTURE, pod.reason or "PodRejected", message)
        return Cause(Reason.PEER_FAILED, failure, RetryPolicy.COUNTED, Precedence.CLUSTER)
    failure = _failure(pod, FailureClass.PREEMPTED, "PodDeleted", "the pod was deleted")
    return Cause(Reason.PREEMPTED, failure, RetryPolicy.FREE, Precedence.STOPPED)


def _job_cause(job: JobView | None) -> Cause:
    code = (job.failed_reason if job else "") or "PodsLost"
    message = (job.failed_message if job else "") or "the pods are gone and nobody saw how they ended"
    failure = Failure(class_=FailureClass.INFRASTRUCTURE, code=code, message=clean(message))
    return Cause(Reason.PEER_FAILED, failure, RetryPolicy.COUNTED, Precedence.CLUSTER)


def _failure(pod: PodView, failure_class: FailureClass, code: str, message: str, hint: str = "") -> Failure:
    words = pod.termination_message or TerminationMessage()
    return Failure(
        class_=failure_class,
        code=clean(code, 128),
        message=clean(message),
        hint=clean(words.hint or hint) or None,
        node=pod.node or None,
        rank=words.rank if words.rank is not None else None,
        step=words.step,
        exit_code=pod.terminated.exit_code if pod.terminated else None,
    )


def _raw(pod: PodView) -> str:
    """The last line of a container that left no words of ours (the kubelet then keeps the end of the log)."""
    text = pod.terminated.message if pod.terminated else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines and not text.startswith("{") else ""
