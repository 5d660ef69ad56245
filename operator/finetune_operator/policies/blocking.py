"""Finds out why the pods of an attempt do not run, from messages of the scheduler, the kubelet and admission controllers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_api.names import Reason

from finetune_operator.objects import Object
from finetune_operator.text import clean
from finetune_operator.views import PodView

IMAGE_PULL_REASONS = (
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError", "RegistryUnavailable",
)  # fmt: skip
CONTAINER_CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
SLOW_NODE_PHRASES = ("context deadline exceeded", "failed to reserve container name")
"""Parts of the messages that the container runtime writes if the node is too slow to create a container. The kubelet then tries again."""
ADMISSION_PHRASES = ("admission webhook", "ValidatingAdmissionPolicy", "failed calling webhook")
MOUNT_REASONS = ("FailedMount", "FailedAttachVolume")


@dataclass(frozen=True)
class BlockingCondition:
    """Why pods cannot run now. The pods run once the cluster, the platform team or the user has resolved the problem."""

    reason: Reason
    message: str


def find_blocking_condition_in_pods(pods: Iterable[PodView]) -> BlockingCondition | None:
    """Return the most important blocking condition in the statuses of the pods, or None if no pod is blocked."""
    conditions = [condition for pod in pods if not pod.is_finished and (condition := _find_blocking_condition_in_pod(pod)) is not None]
    reason_order = (Reason.CONFIG_MISSING, Reason.IMAGE_PULL_FAILED, Reason.UNSCHEDULABLE, Reason.PODS_NOT_READY)
    return min(conditions, key=lambda condition: reason_order.index(condition.reason), default=None)


def _find_blocking_condition_in_pod(pod: PodView) -> BlockingCondition | None:
    if pod.unschedulable_message:
        return BlockingCondition(Reason.UNSCHEDULABLE, clean(pod.unschedulable_message))
    detail = clean(f"{pod.waiting_reason}: {pod.waiting_message}" if pod.waiting_message else pod.waiting_reason)
    if pod.waiting_reason in IMAGE_PULL_REASONS:
        return BlockingCondition(Reason.IMAGE_PULL_FAILED, detail)
    if any(phrase in detail for phrase in SLOW_NODE_PHRASES):
        return BlockingCondition(Reason.PODS_NOT_READY, detail)
    if pod.waiting_reason in CONTAINER_CONFIG_REASONS:
        return BlockingCondition(Reason.CONFIG_MISSING, detail)
    if pod.terminated is not None and pod.phase == "Running":
        message = (
            f"the trainer in pod {pod.name} ended with exit code {pod.terminated.exit_code}, but another container of the pod still runs: "
            "make that container a native sidecar, or disable its injection in placement.annotations"
        )
        return BlockingCondition(Reason.PODS_NOT_READY, message)
    return None


def find_blocking_condition_in_events(events: Sequence[Object]) -> BlockingCondition | None:
    """Return the newest blocking condition in Warning events: a quota or a policy refuses pods, or the kubelet cannot mount a volume."""
    events_newest_first = sorted(events, key=_get_event_time, reverse=True)
    for event in events_newest_first:
        reason, note = str(event.get("reason", "")), clean(str(event.get("message") or event.get("note") or ""))
        if reason == "FailedCreate":
            return BlockingCondition(choose_refusal_reason(note), note)
        if reason in MOUNT_REASONS:
            return BlockingCondition(Reason.CONFIG_MISSING, note)
    return None


def _get_event_time(event: Object) -> str:
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
        or (event.get("metadata") or {}).get("creationTimestamp") or ""
    )  # fmt: skip


def is_admission_refusal(message: str) -> bool:
    """Whether an admission policy or webhook refused the object. The object itself may then be valid."""
    return any(phrase in message for phrase in ADMISSION_PHRASES)


def choose_refusal_reason(message: str) -> Reason:
    """Return why an object was refused, according to the API server's error message: because of a quota or because of an admission policy."""
    return Reason.QUOTA_EXCEEDED if "quota" in message.lower() else Reason.FORBIDDEN_BY_POLICY
