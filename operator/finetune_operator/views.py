"""What the operator keeps of the objects it watches: small frozen views, cut from JSON at the border.

A Job's template carries the whole run configuration and a Pod's managed fields are longer than its status; a cache of thousands
must hold neither. Reading never raises: whatever another version, a person or a broken node wrote becomes a view or None.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from finetune_api.names import CONTAINER, KIND, MANAGER, Annotation, Label
from finetune_api.pod import TerminationMessage
from finetune_api.status import FineTuneJobStatus
from pydantic import ValidationError

from finetune_operator.objects import Object
from finetune_operator.pod_reports import read_termination_message

logger = logging.getLogger(__name__)

INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
INITIALIZING = "PodInitializing"
GATED = "SchedulingGated"
MAX_TEXT = 2048
"""Characters kept of a message somebody else wrote."""


@dataclass(frozen=True)
class JobView:
    """A batch/v1 Job that carries our labels."""

    namespace: str
    name: str
    uid: str
    version: int
    owner_uid: str
    is_owned: bool
    """Whether a FineTuneJob of uid `owner_uid` is its controller."""
    job_name: str
    """Name of that FineTuneJob, from the label."""
    attempt: int
    created_at: datetime
    is_deleting: bool = False
    is_suspended: bool = False
    """Its own `spec.suspend`: a queue holds it."""
    suspended_since: datetime | None = None
    """Since when its controller holds it: also for a moment after it was let go, with the start of the time before."""
    queue: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    failed_reason: str = ""
    failed_message: str = ""
    nodes: int = 0
    """Number of pods (`spec.completions`); 0: unknown."""
    config_sha256: str = ""

    @property
    def is_finished(self) -> bool:
        """Over, and none of its pods runs any more."""
        return self.completed_at is not None or self.failed_at is not None


@dataclass(frozen=True)
class Terminated:
    """How the trainer container ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    finished_at: datetime | None = None


@dataclass(frozen=True)
class PodView:
    """A pod that carries our labels. `gone`: the object was deleted; this is the last that was seen of it."""

    namespace: str
    name: str
    uid: str
    version: int
    job_uid: str
    """uid of the Job that owns it."""
    owner_uid: str
    """uid of the FineTuneJob, from the label."""
    job_name: str
    attempt: int
    index: int
    created_at: datetime
    phase: str = "Pending"
    is_ready: bool = False
    ip: str = ""
    node: str = ""
    deletion_timestamp: datetime | None = None
    """When it should be gone: the time of the delete plus its grace period."""
    reason: str = ""
    message: str = ""
    scheduled_at: datetime | None = None
    """When it got its node."""
    unschedulable: str = ""
    """The scheduler's words, if it finds no node."""
    waiting_reason: str = ""
    waiting_message: str = ""
    running_since: datetime | None = None
    disruption: str = ""
    """Reason of the DisruptionTarget condition."""
    disruption_message: str = ""
    terminated: Terminated | None = None
    init_failed: str = ""
    """How an init container failed, in words: somebody's admission put it there."""
    image_id: str = ""
    is_deleted: bool = False

    @property
    def is_finished(self) -> bool:
        """It will never run again."""
        return self.is_deleted or self.phase in ("Succeeded", "Failed")

    @property
    def termination_message(self) -> TerminationMessage | None:
        """Its termination message, if it is one of ours."""
        return read_termination_message(self.terminated.message) if self.terminated else None


@dataclass(frozen=True)
class JobObject:
    """A FineTuneJob: metadata that matters, the spec as written, the status as it was."""

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
    """Kubernetes' time, or None."""
    if not isinstance(text, str):
        return None
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def read_status(raw: Any) -> FineTuneJobStatus:
    """A status, whatever is in it: what cannot be read is dropped, an item or a field, so that the rest is not lost."""
    value = dict(raw) if isinstance(raw, dict) else {}
    while True:
        try:
            return FineTuneJobStatus.model_validate(value)
        except ValidationError as error:
            bad = [item["loc"] for item in error.errors() if item["loc"] and item["loc"][0] in value]
            if not bad:
                return FineTuneJobStatus()
            logger.warning("parts of a status cannot be read and are dropped: %s", bad)
            for field_ in {loc[0] for loc in bad}:
                items = {loc[1] for loc in bad if loc[0] == field_ and len(loc) > 1 and isinstance(loc[1], int)}
                if items and isinstance(value[field_], list):
                    value[field_] = [one for number, one in enumerate(value[field_]) if number not in items]
                else:
                    del value[field_]


def read_finetunejob(body: Object) -> JobObject:
    """View of a FineTuneJob."""
    meta = body["metadata"]
    return JobObject(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=_version(meta),
        resource_version=str(meta.get("resourceVersion", "")),
        generation=int(meta.get("generation", 1)),
        created_at=parse_time(meta.get("creationTimestamp")) or datetime.now(UTC),
        is_deleting=bool(meta.get("deletionTimestamp")),
        spec=body.get("spec") or {},
        status=read_status(body.get("status")),
    )


def read_job(body: Object) -> JobView | None:
    """View of a Job that carries our labels or is controlled by a FineTuneJob; None of any other."""
    meta = body["metadata"]
    labels = meta.get("labels") or {}
    identity = _labelled(labels) or _named(meta)
    if identity is None:
        return None
    job_name, attempt = identity
    status, spec = body.get("status") or {}, body.get("spec") or {}
    owner = _controller(meta, KIND)
    conditions = {c.get("type"): c for c in status.get("conditions") or [] if c.get("status") == "True"}
    failed = conditions.get("Failed", {})
    return JobView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=_version(meta),
        owner_uid=owner or str(labels.get(Label.UID, "")),
        is_owned=owner is not None,
        job_name=job_name,
        attempt=attempt,
        created_at=parse_time(meta.get("creationTimestamp")) or datetime.now(UTC),
        is_deleting=bool(meta.get("deletionTimestamp")),
        is_suspended=bool(spec.get("suspend")),
        suspended_since=_since(conditions.get("Suspended")),
        queue=labels.get(Label.QUEUE),
        started_at=parse_time(status.get("startTime")),
        completed_at=_since(conditions.get("Complete")),
        failed_at=_since(failed),
        failed_reason=str(failed.get("reason", "")),
        failed_message=str(failed.get("message", ""))[:MAX_TEXT],
        nodes=_number(spec.get("completions")) or 0,
        config_sha256=str((meta.get("annotations") or {}).get(Annotation.RUN_CONFIG_SHA256, "")),
    )


def _labelled(labels: Object) -> tuple[str, int] | None:
    """FineTuneJob and attempt, as our labels say."""
    attempt = _number(labels.get(Label.ATTEMPT))
    if labels.get(Label.MANAGED_BY) != MANAGER or not labels.get(Label.NAME) or attempt is None:
        return None
    return str(labels[Label.NAME]), attempt


def _named(meta: Object) -> tuple[str, int] | None:
    """The same from owner and name: somebody who takes a label off a running Job must not start a second one beside it."""
    owners = meta.get("ownerReferences") or []
    owner = next((str(o.get("name")) for o in owners if o.get("kind") == KIND and o.get("controller")), "")
    name, _, number = str(meta["name"]).rpartition("-")
    return (owner, int(number)) if owner and name == owner and number.isdigit() else None


def read_pod(body: Object) -> PodView | None:
    """View of a Pod, or None if it does not carry our labels."""
    meta = body["metadata"]
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    attempt = _number(labels.get(Label.ATTEMPT))
    if labels.get(Label.MANAGED_BY) != MANAGER or not labels.get(Label.NAME) or attempt is None:
        return None
    status = body.get("status") or {}
    conditions = {c.get("type"): c for c in status.get("conditions") or []}
    container = _trainer(status)
    state = container.get("state") or {}
    waiting, disruption = _waits(status, state), conditions.get("DisruptionTarget", {})
    disrupted = disruption.get("status") == "True"
    scheduled = conditions.get("PodScheduled", {})
    unschedulable = scheduled.get("status") == "False" and scheduled.get("reason") in ("Unschedulable", GATED)
    return PodView(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        version=_version(meta),
        job_uid=_controller(meta, "Job") or "",
        owner_uid=str(labels.get(Label.UID, "")),
        job_name=labels[Label.NAME],
        attempt=attempt,
        index=_number(annotations.get(INDEX_ANNOTATION) or labels.get(INDEX_ANNOTATION)) or 0,
        created_at=parse_time(meta.get("creationTimestamp")) or datetime.now(UTC),
        phase=str(status.get("phase", "Pending")),
        is_ready=conditions.get("Ready", {}).get("status") == "True",
        ip=str(status.get("podIP", "")),
        node=str((body.get("spec") or {}).get("nodeName", "")),
        deletion_timestamp=parse_time(meta.get("deletionTimestamp")),
        reason=str(status.get("reason", "")),
        message=str(status.get("message", ""))[:MAX_TEXT],
        scheduled_at=_since(scheduled) if scheduled.get("status") == "True" else None,
        unschedulable=_no_node(body, scheduled)[:MAX_TEXT] if unschedulable else "",
        waiting_reason=str(waiting.get("reason", "")),
        waiting_message=str(waiting.get("message", ""))[:MAX_TEXT],
        running_since=parse_time((state.get("running") or {}).get("startedAt")),
        disruption=str(disruption.get("reason", "") or "DisruptionTarget") if disrupted else "",
        disruption_message=str(disruption.get("message", ""))[:MAX_TEXT] if disrupted else "",
        terminated=_terminated(state.get("terminated")),
        init_failed=_init_failed(status)[:MAX_TEXT],
        image_id=str(container.get("imageID", "")),
    )


def _trainer(status: Object) -> Object:
    """The trainer among the containers: admission may have put others beside it, and a kubelet sorts them by name."""
    found: list[Object] = status.get("containerStatuses") or [{}]
    return next((one for one in found if one.get("name") == CONTAINER), found[0])


def _waits(status: Object, state: Object) -> Object:
    """What the trainer waits for; while init containers are at work, what the first of them waits for."""
    own: Object = state.get("waiting") or {}
    if own.get("reason") != INITIALIZING:
        return own
    states = [(one.get("state") or {}).get("waiting") or {} for one in status.get("initContainerStatuses") or []]
    return next((one for one in states if one.get("reason") not in (None, INITIALIZING)), own)


def _init_failed(status: Object) -> str:
    for one in status.get("initContainerStatuses") or []:
        ended = (one.get("state") or {}).get("terminated") or {}
        code = _number(ended.get("exitCode"))
        if code:
            words = str(ended.get("message") or ended.get("reason") or "").strip()
            return f"init container {one.get('name')} ended with exit code {code}" + (f": {words}" if words else "")
    return ""


def _no_node(body: Object, scheduled: Object) -> str:
    """The scheduler's words, and the gates that hold the pod back."""
    gates = [str(one.get("name")) for one in (body.get("spec") or {}).get("schedulingGates") or []]
    return str(scheduled.get("message", "")) + (f" ({', '.join(gates)})" if gates else "")


def as_deleted(pod: PodView) -> PodView:
    """The last that was seen of a pod whose object is deleted."""
    return replace(pod, is_deleted=True, is_ready=False)


def _terminated(value: Object | None) -> Terminated | None:
    if not value:
        return None
    return Terminated(
        exit_code=_number(value.get("exitCode")) or 0,
        reason=str(value.get("reason", "")),
        message=str(value.get("message", "")),
        finished_at=parse_time(value.get("finishedAt")),
    )


def _since(condition: Object | None) -> datetime | None:
    if not condition:
        return None
    return parse_time(condition.get("lastTransitionTime")) or datetime.now(UTC)


def _controller(meta: Object, kind: str) -> str | None:
    owners = meta.get("ownerReferences") or []
    return next((o.get("uid") for o in owners if o.get("kind") == kind and o.get("controller")), None)


def _version(meta: Object) -> int:
    return _number(meta.get("resourceVersion")) or 0


def _number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
