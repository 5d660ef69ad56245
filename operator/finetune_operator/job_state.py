"""In-process state of a job between two reconciles. A restarted operator starts without this state, so it must not affect correctness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune_api.spec import FineTuneJobSpec

from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import AcceptedSpec, RefusedSpec
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.throttle import PendingChanges

FIRST_EVENT_READ_SECONDS = 15.0
"""Seconds between the first two reads of events about missing pods. The interval doubles after each read."""
SPEC_NOT_NEEDED = AcceptedSpec(FineTuneJobSpec())
"""Placeholder for the resolved spec of a finished job. Later reconciles do not use that spec, so the placeholder saves memory."""


@dataclass
class EventReadState:
    """The blocking condition found in events about a job's missing pods, and the time of the next read of these events."""

    blocking_condition: BlockingCondition | None = None
    due_at: float | None = None
    """Event loop time of the next read, or None if no pod is missing."""
    interval_seconds: float = FIRST_EVENT_READ_SECONDS


@dataclass
class JobState:
    """In-process state of one FineTuneJob."""

    uid: str = ""
    generation: int = 0
    spec: Object = field(default_factory=dict)
    """The spec from which `acceptance` was computed. `generation` is the generation of this spec."""
    choices: dict[str, Any] = field(default_factory=dict)
    """The values that the job's plan chose, with which `acceptance` was computed."""
    acceptance: AcceptedSpec | RefusedSpec = SPEC_NOT_NEEDED
    event_read: EventReadState = field(default_factory=EventReadState)
    pending_changes: PendingChanges = field(default_factory=PendingChanges)
    first_status_due: float | None = None
    """The job's first status write may be deferred until this event loop time during a burst."""
    status_rejection: str = ""
    """The API server's last error message that rejected this job's status. If the same message is repeated, it is not logged again."""
    stored_status: tuple[str, Object] | None = None
    """The resourceVersion and the JSON of the last status that was compared. None for a finished job."""
    pruned_write: tuple[str, Object] | None = None
    """The last status write from which an older CRD removed new fields: the resulting resourceVersion and the status as it was sent.
    As long as the object has this resourceVersion, the same write would change nothing."""

    @property
    def removes_preparation(self) -> bool:
        """Whether an older CRD removed `preparation` from the last status write."""
        return self.pruned_write is not None and "preparation" in self.pruned_write[1]
