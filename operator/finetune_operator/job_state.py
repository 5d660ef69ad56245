"""State of a job that only the operator process keeps. This state is empty after a restart, so correct decisions must not depend on it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from finetune_api.spec import FineTuneJobSpec

from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import AcceptedSpec, RefusedSpec
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.throttle import PendingChanges

FIRST_EVENT_READ_SECONDS = 15.0
"""Seconds between the first two reads of events about missing pods. The interval doubles after each read."""
SPEC_NOT_NEEDED = AcceptedSpec(FineTuneJobSpec())
"""Placeholder that replaces the resolved spec of a finished job to save memory, because later reconciles do not use this spec."""


@dataclass
class EventReadState:
    """The blocking condition that was found in events about a job's missing pods, and the time at which these events are read again."""

    blocking_condition: BlockingCondition | None = None
    due_at: float | None = None
    """Event loop time at which the events are read again, or None if no pod is missing."""
    interval_seconds: float = FIRST_EVENT_READ_SECONDS


class StoredStatus(NamedTuple):
    """The stored status of a job as JSON text, and the resourceVersion of the job with this status. The text needs a fifth of the memory that the
    parsed JSON would need.
    """

    resource_version: str
    text: str

    @classmethod
    def store(cls, resource_version: str, status: Object) -> StoredStatus:
        """Return the status as text."""
        return cls(resource_version, json.dumps(status, separators=(",", ":"), ensure_ascii=False))

    def read(self) -> Object:
        """Return the status as JSON objects."""
        status: Object = json.loads(self.text)
        return status


@dataclass
class JobState:
    """In-process state of one FineTuneJob."""

    uid: str = ""
    generation: int = 0
    spec: Object = field(default_factory=dict)
    """The spec from which `acceptance` was computed. `generation` is the FineTuneJob's generation with this spec."""
    choices: dict[str, Any] = field(default_factory=dict)
    """The values that the plan chose, from which `acceptance` was also computed."""
    acceptance: AcceptedSpec | RefusedSpec = SPEC_NOT_NEEDED
    event_read: EventReadState = field(default_factory=EventReadState)
    pending_changes: PendingChanges = field(default_factory=PendingChanges)
    is_first_status_deferred: bool = False
    """Whether the job's first status write is deferred, because many new jobs wait for their Jobs."""
    status_rejection: str = ""
    """The API server's last error message about a rejected status of this job. The same message is logged only once."""
    stored_status: StoredStatus | None = None
    """The stored status at the time of the last comparison with a new status. It is None for a finished job."""
    pruned_status_write: tuple[str, Object] | None = None
    """The last status write from which an older CRD removed new fields: the resulting resourceVersion, and the status that was sent.
    While the object has this resourceVersion, sending the same status again would change nothing."""

    @property
    def crd_lacks_preparation_field(self) -> bool:
        """Whether an older CRD removed `preparation` from the last status write."""
        return self.pruned_status_write is not None and "preparation" in self.pruned_status_write[1]
