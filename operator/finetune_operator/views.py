"""Small immutable views of the objects that the operator watches, read from their JSON.

The cache holds thousands of objects, so it keeps only these views instead of the whole objects: a Job's template contains the whole run
configuration, and a pod's managed fields are longer than its status. A Job or pod that the operator did not create has no view.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from finetune_api.names import (
    KIND,
    MANAGER_NAME,
    MODEL_CACHE_CONTAINER,
    TRAINER_CONTAINER,
    Annotation,
    Label,
    parse_preparation_number,
)
from finetune_api.pod import TerminationMessage
from finetune_api.status import FineTuneJobStatus
from pydantic import ValidationError

from finetune_operator.objects import Object
from finetune_operator.pod_reports import read_termination_message

logger = logging.getLogger(__name__)

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
INITIALIZING_REASON = "PodInitializing"
GATED_REASON = "SchedulingGated"
MAX_TEXT_CHARACTERS = 2048
"""Maximum length of a message in characters. Longer messages are cut."""


@dataclass(frozen=True)
class JobView:
    """A batch/v1 Job that has the operator's labels or is owned by a FineTuneJob."""

    namespace: str
    name: str
    uid: str
    version: int
    owner_uid: str
    is_owned: bool
    """Whether the Job's controller is a FineTuneJob. If not, `owner_uid` comes from a label."""
    finetunejob_name: str
    """Name of the FineTuneJob, from the label."""
    attempt: int
    created_at: datetime
    is_deleting: bool = False
    is_suspended: bool = False
    """`spec.suspend` of the Job. A suspended Job waits in a queue."""
    suspended_since: datetime | None = None
    """When the queue suspended the Job, or None. The Job's Suspended condition still shows this time shortly after the queue has resumed the Job."""
    queue: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    failed_reason: str = ""
    failed_message: str = ""
    pod_count: int = 0
    """Number of pods (`spec.completions`), or 0 if the number is unknown."""
    config_sha256: str = ""
    attempt_secret_name: str = ""
    """Name of the attempt's Secret, or an empty string if the attempt has none."""
    network_policy_name: str = ""
    """Name of the attempt's NetworkPolicy, or an empty string if the attempt has none."""

    @property
    def is_finished(self) -> bool:
        """Whether the Job controller reports that the Job succeeded or failed. The Job controller reports this only after the last pod has ended."""
        return self.completed_at is not None or self.failed_at is not None


@dataclass(frozen=True)
class TerminatedState:
    """How the trainer container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: datetime | None = None
    started_at: datetime | None = None


@dataclass(frozen=True)
class PodView:
    """A pod with the operator's labels."""

    namespace: str
    name: str
    uid: str
    version: int
    job_uid: str
    """uid of the Job that owns the pod, or an empty string."""
    owner_uid: str
    """uid of the FineTuneJob, from the label."""
    finetunejob_name: str
    attempt: int
    completion_index: int
    created_at: datetime
    phase: str = "Pending"
    is_ready: bool = False
    ip: str = ""
    node: str = ""
    deletion_timestamp: datetime | None = None
    """`metadata.deletionTimestamp`: when the pod's grace period ends, or None if the pod is not being deleted."""
    removed_at: datetime | None = None
    """When this process learned that the pod no longer exists, or None while the pod exists."""
    reason: str = ""
    message: str = ""
    scheduled_at: datetime | None = None
    """When the scheduler assigned the pod to its node."""
    unschedulable_message: str = ""
    """The scheduler's message if no node fits, or an empty string."""
    waiting_reason: str = ""
    waiting_message: str = ""
    running_since: datetime | None = None
    disruption_reason: str = ""
    """Reason of the DisruptionTarget condition."""
    disruption_message: str = ""
    terminated: TerminatedState | None = None
    init_failure_message: str = ""
    """A message about a failed init container, or an empty string. The operator (for the model cache) or an admission webhook adds such containers."""
    image_id: str = ""
    is_deleted: bool = False
    """Whether the pod was deleted. The other fields then contain its last known state."""

    @property
    def is_finished(self) -> bool:
        """Whether the pod has ended or is deleted."""
        return self.is_deleted or self.phase in ("Succeeded", "Failed")

    @property
    def termination_message(self) -> TerminationMessage | None:
        """The trainer's termination message, or None if the trainer has written none."""
        return read_termination_message(self.terminated.message) if self.terminated else None


@dataclass(frozen=True)
class FineTuneJobView:
    """A FineTuneJob: the metadata that the operator uses, the spec as the user wrote it, and the status."""

    namespace: str
    name: str
    uid: str
    version: int
    resource_version: str
    generation: int
    created_at: datetime
    is_deleting: bool
    spec: Object = field(hash=False, compare=False)
    status: FineTuneJobStatus = field(hash=False, compare=False)


def parse_time(text: Any) -> datetime | None:
    """Parse a Kubernetes timestamp. Return None if `text` is not a timestamp."""
    if not isinstance(text, str):
        return None
    try:
        time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def read_status(raw_status: Any) -> FineTuneJobStatus:
    """Read the status of a FineTuneJob. Fields and list items that cannot be read are dropped."""
    try:
        return FineTuneJobStatus.model_validate(raw_status if isinstance(raw_status, dict) else {})
    except ValidationError as error:
        logger.warning("the status of a FineTuneJob cannot be read and is treated as empty: %s", error)
        return FineTuneJobStatus()


def read_finetunejob(body: Object) -> FineTuneJobView:
    """Return the view of a FineTuneJob."""
    metadata = body["metadata"]
    return FineTuneJobView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=_parse_version(metadata),
        resource_version=str(metadata.get("resourceVersion", "")),
        generation=int(metadata.get("generation", 1)),
        created_at=parse_time(metadata.get("creationTimestamp")) or datetime.now(UTC),
        is_deleting=bool(metadata.get("deletionTimestamp")),
        spec=body.get("spec") or {},
        status=read_status(body.get("status")),
    )


def read_job(body: Object) -> JobView | None:
    """Return the view of a Job, or None if the Job neither has the operator's labels nor is controlled by a FineTuneJob."""
    metadata = body["metadata"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    identity = _read_identity_from_labels(labels) or _read_identity_from_owner(metadata)
    if identity is None:
        return None
    finetunejob_name, attempt = identity
    status, spec = body.get("status") or {}, body.get("spec") or {}
    owner_uid = _find_controller_uid(metadata, KIND)
    conditions_by_type = {c.get("type"): c for c in status.get("conditions") or [] if c.get("status") == "True"}
    failed_condition = conditions_by_type.get("Failed", {})
    return JobView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=_parse_version(metadata),
        owner_uid=owner_uid or str(labels.get(Label.JOB_UID, "")),
        is_owned=owner_uid is not None,
        finetunejob_name=finetunejob_name,
        attempt=attempt,
        created_at=parse_time(metadata.get("creationTimestamp")) or datetime.now(UTC),
        is_deleting=bool(metadata.get("deletionTimestamp")),
        is_suspended=bool(spec.get("suspend")),
        suspended_since=_read_transition_time(conditions_by_type.get("Suspended")),
        queue=labels.get(Label.QUEUE),
        started_at=parse_time(status.get("startTime")),
        completed_at=_read_transition_time(conditions_by_type.get("Complete")),
        failed_at=_read_transition_time(failed_condition),
        failed_reason=str(failed_condition.get("reason", "")),
        failed_message=str(failed_condition.get("message", ""))[:MAX_TEXT_CHARACTERS],
        pod_count=_parse_number(spec.get("completions")) or 0,
        config_sha256=str(annotations.get(Annotation.RUN_CONFIG_SHA256, "")),
        attempt_secret_name=str(annotations.get(Annotation.ATTEMPT_SECRET, "")),
        network_policy_name=str(annotations.get(Annotation.NETWORK_POLICY, "")),
    )


def _read_identity_from_labels(labels: Object) -> tuple[str, int] | None:
    """Read the name of the FineTuneJob and the number of the attempt from the labels."""
    attempt = _parse_number(labels.get(Label.ATTEMPT))
    if labels.get(Label.MANAGED_BY) != MANAGER_NAME or not labels.get(Label.JOB_NAME) or attempt is None:
        return None
    return str(labels[Label.JOB_NAME]), attempt


def _read_identity_from_owner(metadata: Object) -> tuple[str, int] | None:
    """Read the FineTuneJob's name and the number of the attempt from the controller and the Job's name.

    This is needed for a Job that has lost its labels: the operator would otherwise create a second Job for the same attempt.
    """
    owners = metadata.get("ownerReferences") or []
    owner_name = next((str(o.get("name")) for o in owners if o.get("kind") == KIND and o.get("controller")), "")
    if owner_name and parse_preparation_number(str(metadata["name"]), owner_name) is not None:
        return owner_name, 0
    name, _, number = str(metadata["name"]).rpartition("-")
    return (owner_name, int(number)) if owner_name and name == owner_name and number.isdigit() else None


def read_pod(body: Object) -> PodView | None:
    """Return the view of a pod, or None if the pod lacks the operator's labels."""
    metadata = body["metadata"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    attempt = _parse_number(labels.get(Label.ATTEMPT))
    if labels.get(Label.MANAGED_BY) != MANAGER_NAME or not labels.get(Label.JOB_NAME) or attempt is None:
        return None
    status = body.get("status") or {}
    conditions_by_type = {c.get("type"): c for c in status.get("conditions") or []}
    container_status = _find_trainer_status(status)
    container_state = container_status.get("state") or {}
    waiting_state, disruption_target = _find_waiting_state(status, container_state), conditions_by_type.get("DisruptionTarget", {})
    is_disrupted = disruption_target.get("status") == "True"
    scheduled_condition = conditions_by_type.get("PodScheduled", {})
    is_unschedulable = scheduled_condition.get("status") == "False" and scheduled_condition.get("reason") in ("Unschedulable", GATED_REASON)
    return PodView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        version=_parse_version(metadata),
        job_uid=_find_controller_uid(metadata, "Job") or "",
        owner_uid=str(labels.get(Label.JOB_UID, "")),
        finetunejob_name=labels[Label.JOB_NAME],
        attempt=attempt,
        completion_index=_parse_number(annotations.get(INDEX_ANNOTATION) or labels.get(INDEX_ANNOTATION)) or 0,
        created_at=parse_time(metadata.get("creationTimestamp")) or datetime.now(UTC),
        phase=str(status.get("phase", "Pending")),
        is_ready=conditions_by_type.get("Ready", {}).get("status") == "True",
        ip=str(status.get("podIP", "")),
        node=str((body.get("spec") or {}).get("nodeName", "")),
        deletion_timestamp=parse_time(metadata.get("deletionTimestamp")),
        reason=str(status.get("reason", "")),
        message=str(status.get("message", ""))[:MAX_TEXT_CHARACTERS],
        scheduled_at=_read_transition_time(scheduled_condition) if scheduled_condition.get("status") == "True" else None,
        unschedulable_message=_build_unschedulable_message(body, scheduled_condition)[:MAX_TEXT_CHARACTERS] if is_unschedulable else "",
        waiting_reason=str(waiting_state.get("reason", "")),
        waiting_message=str(waiting_state.get("message", ""))[:MAX_TEXT_CHARACTERS],
        running_since=parse_time((container_state.get("running") or {}).get("startedAt")),
        disruption_reason=str(disruption_target.get("reason", "") or "DisruptionTarget") if is_disrupted else "",
        disruption_message=str(disruption_target.get("message", ""))[:MAX_TEXT_CHARACTERS] if is_disrupted else "",
        terminated=_read_terminated_state(container_state.get("terminated")),
        init_failure_message=_describe_init_failure(status)[:MAX_TEXT_CHARACTERS],
        image_id=str(container_status.get("imageID", "")),
    )


def _find_trainer_status(status: Object) -> Object:
    """Return the status of the trainer container. The container is found by its name, because admission webhooks may add other containers."""
    containers: list[Object] = status.get("containerStatuses") or [{}]
    return next((container for container in containers if container.get("name") == TRAINER_CONTAINER), containers[0])


def _find_waiting_state(status: Object, trainer_state: Object) -> Object:
    """Return why the trainer container waits or, if it waits for the init containers, why the first waiting init container waits."""
    trainer_waiting_state: Object = trainer_state.get("waiting") or {}
    if trainer_waiting_state.get("reason") != INITIALIZING_REASON:
        return trainer_waiting_state
    init_states = {init_status.get("name"): init_status.get("state") or {} for init_status in status.get("initContainerStatuses") or []}
    if init_states.get(MODEL_CACHE_CONTAINER, {}).get("running"):
        return {"reason": INITIALIZING_REASON, "message": f"the init container {MODEL_CACHE_CONTAINER} provides the model from model.cache"}
    waiting_states = [init_state.get("waiting") or {} for init_state in init_states.values()]
    return next((waiting for waiting in waiting_states if waiting.get("reason") not in (None, INITIALIZING_REASON)), trainer_waiting_state)


def _describe_init_failure(status: Object) -> str:
    for init_status in status.get("initContainerStatuses") or []:
        terminated_state = (init_status.get("state") or {}).get("terminated") or {}
        exit_code = _parse_number(terminated_state.get("exitCode"))
        if exit_code:
            detail = str(terminated_state.get("message") or terminated_state.get("reason") or "").strip()
            return f"init container {init_status.get('name')} ended with exit code {exit_code}" + (f": {detail}" if detail else "")
    return ""


def _build_unschedulable_message(body: Object, scheduled_condition: Object) -> str:
    """Return the scheduler's message, followed by the names of the pod's scheduling gates."""
    gate_names = [str(gate.get("name")) for gate in (body.get("spec") or {}).get("schedulingGates") or []]
    return str(scheduled_condition.get("message", "")) + (f" ({', '.join(gate_names)})" if gate_names else "")


def mark_deleted(pod: PodView) -> PodView:
    """Return the last known state of a pod, marked as deleted."""
    return replace(pod, is_deleted=True, is_ready=False, removed_at=pod.removed_at or datetime.now(UTC))


def _read_terminated_state(terminated_state: Object | None) -> TerminatedState | None:
    if not terminated_state:
        return None
    return TerminatedState(
        exit_code=_parse_number(terminated_state.get("exitCode")) or 0,
        reason=str(terminated_state.get("reason", "")),
        message=str(terminated_state.get("message", "")),
        finished_at=parse_time(terminated_state.get("finishedAt")),
        started_at=parse_time(terminated_state.get("startedAt")),
    )


def _read_transition_time(condition: Object | None) -> datetime | None:
    if not condition:
        return None
    return parse_time(condition.get("lastTransitionTime")) or datetime.now(UTC)


def _find_controller_uid(metadata: Object, kind: str) -> str | None:
    owners = metadata.get("ownerReferences") or []
    return next((o.get("uid") for o in owners if o.get("kind") == kind and o.get("controller")), None)


def _parse_version(metadata: Object) -> int:
    return _parse_number(metadata.get("resourceVersion")) or 0


def _parse_number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
