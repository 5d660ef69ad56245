"""Finds out why the pods of an attempt do not run, from messages of the scheduler, the kubelet and admission controllers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_api.names import Reason

from finetune_operator.objects import Object
from finetune_operator.text import clean
from finetune_operator.views import PodView

IMAGE_REASONS = (
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError", "RegistryUnavailable",
)  # fmt: skip
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
SLOW_NODE_PHRASES = ("context deadline exceeded", "failed to reserve container name")
"""Messages of the container runtime when the node is too slow to create a container; the kubelet tries again."""
ADMISSION_PHRASES = ("admission webhook", "ValidatingAdmissionPolicy", "failed calling webhook")
MOUNT_REASONS = ("FailedMount", "FailedAttachVolume")


@dataclass(frozen=True)
class BlockingCondition:
    """Why the pods cannot run now. The cluster, the platform team or the user must resolve the condition."""

    reason: Reason
    message: str


def blocking_condition_of_pods(pods: Iterable[PodView]) -> BlockingCondition | None:
    """Return the most important blocking condition in the status of the pods, or None if the pods are not blocked."""
    conditions = [found for pod in pods if not pod.is_finished and (found := _blocking_condition_of_pod(pod)) is not None]
    reason_order = (Reason.CONFIG_MISSING, Reason.IMAGE_PULL_FAILED, Reason.UNSCHEDULABLE, Reason.PODS_NOT_READY)
    return min(conditions, key=lambda condition: reason_order.index(condition.reason), default=None)


def _blocking_condition_of_pod(pod: PodView) -> BlockingCondition | None:
    if pod.unschedulable_message:
        return BlockingCondition(Reason.UNSCHEDULABLE, clean(pod.unschedulable_message))
    detail = clean(f"{pod.waiting_reason}: {pod.waiting_message}" if pod.waiting_message else pod.waiting_reason)
    if pod.waiting_reason in IMAGE_REASONS:
        return BlockingCondition(Reason.IMAGE_PULL_FAILED, detail)
    if any(phrase in detail for phrase in SLOW_NODE_PHRASES):
        return BlockingCondition(Reason.PODS_NOT_READY, detail)
    if pod.waiting_reason in CONFIG_REASONS:
        return BlockingCondition(Reason.CONFIG_MISSING, detail)
    if pod.terminated is not None and pod.phase == "Running":
        message = (
            f"the trainer in pod {pod.name} ended with exit code {pod.terminated.exit_code}, but another container of the pod still runs: "
            "make that container a native sidecar, or disable its injection in placement.annotations"
        )
        return BlockingCondition(Reason.PODS_NOT_READY, message)
    return None


def blocking_condition_of_events(events: Sequence[Object]) -> BlockingCondition | None:
    """Find a blocking condition in Warning events: a quota or a policy refuses the pods, or the kubelet cannot mount a volume."""
    newest_first = sorted(events, key=_event_time, reverse=True)
    for event in newest_first:
        reason, note = str(event.get("reason", "")), clean(str(event.get("message") or event.get("note") or ""))
        if reason == "FailedCreate":
            return BlockingCondition(reason_of_refusal(note), note)
        if reason in MOUNT_REASONS:
            return BlockingCondition(Reason.CONFIG_MISSING, note)
    return None


def _event_time(event: Object) -> str:
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
        or (event.get("metadata") or {}).get("creationTimestamp") or ""
    )  # fmt: skip


def is_admission_refusal(message: str) -> bool:
    """Whether an admission policy or webhook refused the object. The object itself may then be valid."""
    return any(phrase in message for phrase in ADMISSION_PHRASES)


def reason_of_refusal(message: str) -> Reason:
    """Return the reason for the API server's error message: a quota or an admission policy refused the object."""
    return Reason.QUOTA_EXCEEDED if "quota" in message.lower() else Reason.FORBIDDEN_BY_POLICY
