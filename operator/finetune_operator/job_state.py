"""In-process state of a job between two reconciles. Correctness never depends on it: a restarted operator begins with an empty state."""

from __future__ import annotations

from dataclasses import dataclass, field

from finetune_api.spec import FineTuneJobSpec

from finetune_operator.objects import Object
from finetune_operator.policies.acceptance import Accepted, Refused
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.throttle import PendingChanges

FIRST_EVENT_READ_SECONDS = 15.0
"""Seconds between the first two reads of events about missing pods; the interval doubles."""
SPEC_NOT_NEEDED = Accepted(FineTuneJobSpec())
"""Saves memory: replaces the resolved spec of a finished job, which later reconciles do not use."""


@dataclass
class EventReadState:
    """The blocking condition that events about the missing pods of a job show, and when the events are read next."""

    condition: BlockingCondition | None = None
    due: float | None = None
    """Time of the next read, in loop time; None: no pod is missing."""
    interval: float = FIRST_EVENT_READ_SECONDS


@dataclass
class JobState:
    """In-process state of one FineTuneJob."""

    uid: str = ""
    generation: int = 0
    spec: Object = field(default_factory=dict)
    """Spec of the generation `generation` that `acceptance` was computed from."""
    acceptance: Accepted | Refused = SPEC_NOT_NEEDED
    event_read: EventReadState = field(default_factory=EventReadState)
    pending: PendingChanges = field(default_factory=PendingChanges)
    first_status_due: float | None = None
    """Loop time until which the job's first status write may be deferred during a burst."""
    status_rejection: str = ""
    """The last message with which the API server rejected this job's status. A repeated message is not reported again."""
