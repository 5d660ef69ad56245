"""Why do the pods of an attempt not run yet? In the scheduler's, the kubelet's or the admission's own words."""

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
ADMISSION_WORDS = ("admission webhook", "ValidatingAdmissionPolicy", "failed calling webhook")
MOUNT_REASONS = ("FailedMount", "FailedAttachVolume")


@dataclass(frozen=True)
class BlockingCondition:
    """Something the cluster must mend before a pod runs."""

    reason: Reason
    message: str


def blocking_condition_of_pods(pods: Iterable[PodView]) -> BlockingCondition | None:
    """The gravest obstacle that the pods themselves tell of; None: there is none, they only need time."""
    found = [waiting for pod in pods if not pod.is_finished and (waiting := _blocking_condition_of_pod(pod)) is not None]
    order = (Reason.CONFIG_MISSING, Reason.IMAGE_PULL_FAILED, Reason.UNSCHEDULABLE, Reason.PODS_NOT_READY)
    return min(found, key=lambda waiting: order.index(waiting.reason), default=None)


def _blocking_condition_of_pod(pod: PodView) -> BlockingCondition | None:
    if pod.unschedulable:
        return BlockingCondition(Reason.UNSCHEDULABLE, clean(pod.unschedulable))
    detail = clean(f"{pod.waiting_reason}: {pod.waiting_message}" if pod.waiting_message else pod.waiting_reason)
    if pod.waiting_reason in IMAGE_REASONS:
        return BlockingCondition(Reason.IMAGE_PULL_FAILED, detail)
    if pod.waiting_reason in CONFIG_REASONS:
        return BlockingCondition(Reason.CONFIG_MISSING, detail)
    if pod.terminated is not None and pod.phase == "Running":
        code = pod.terminated.exit_code
        words = f"the trainer in pod {pod.name} ended with exit code {code}, and a container beside it still runs"
        return BlockingCondition(Reason.PODS_NOT_READY, f"{words}: make it a native sidecar, or keep it out by placement.annotations")
    return None


def blocking_condition_of_events(events: Sequence[Object]) -> BlockingCondition | None:
    """What warnings about a Job or a Pod say: refused by quota or policy, or a volume that does not come."""
    newest_first = sorted(events, key=_when, reverse=True)
    for event in newest_first:
        reason, note = str(event.get("reason", "")), clean(str(event.get("message") or event.get("note") or ""))
        if reason == "FailedCreate":
            return BlockingCondition(reason_of_refusal(note), note)
        if reason in MOUNT_REASONS:
            return BlockingCondition(Reason.CONFIG_MISSING, note)
    return None


def _when(event: Object) -> str:
    series = event.get("series") or {}
    return str(
        series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
        or (event.get("metadata") or {}).get("creationTimestamp") or ""
    )  # fmt: skip


def is_admission_refusal(message: str) -> bool:
    """Whether the API server's words tell of a policy or a webhook, which others may mend, and not of the object itself."""
    return any(words in message for words in ADMISSION_WORDS)


def reason_of_refusal(note: str) -> Reason:
    """What refused, by the words of the API server."""
    return Reason.QUOTA_EXCEEDED if "quota" in note.lower() else Reason.FORBIDDEN_BY_POLICY
