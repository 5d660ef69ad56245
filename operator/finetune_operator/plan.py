"""What a look at a job leads to: the plan that `decide` makes, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finetune_api.names import Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Adaptation, Failure

from finetune_operator.policies.acceptance import Refused
from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.views import JobView, PodView


class Situation(StrEnum):
    """Where a job stands, in the operator's eyes."""

    DELETING = "deleting"
    """The FineTuneJob is being deleted; the garbage collector does the rest."""
    REFUSED = "refused"
    """The spec cannot be run, or not yet."""
    SUSPENDED = "suspended"
    BLOCKED = "blocked"
    """Something of an earlier attempt, or somebody else's object, must go first."""
    BACKING_OFF = "backing off"
    """Between two attempts."""
    STARTING = "starting"
    """An attempt is to be created now."""
    ACTIVE = "active"
    """An attempt's Job exists and may run."""
    TERMINATING = "terminating"
    """The attempt is being ended by us."""
    ENDED = "ended"
    """The attempt is over: to be recorded, with what comes next."""
    FINISHED = "finished"


class Outcome(StrEnum):
    """How a job finishes."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


@dataclass(frozen=True)
class Finish:
    """The end of the job."""

    outcome: Outcome
    reason: Reason
    failure: Failure | None = None


@dataclass(frozen=True)
class AttemptEnd:
    """The end of the current attempt, as it is to be recorded."""

    reason: Reason
    time: datetime
    failure: Failure | None = None
    termination_message: TerminationMessage | None = None
    """Rank 0's, if it left any."""
    counted: bool = False
    progressed: bool = False
    committed_step: int | None = None
    next_attempt: int | None = None
    adaptation: Adaptation | None = None


@dataclass(frozen=True)
class Termination:
    """Why the current attempt is to be ended; written to status before anything is deleted."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Plan:
    """What to do now, and what to say."""

    situation: Situation
    create_attempt: int | None = None
    """Number of the attempt whose Job is to be created."""
    delete_jobs: tuple[JobView, ...] = ()
    delete_pods: tuple[PodView, ...] = ()
    """Pods without a Job: to be deleted with their grace period."""
    force_delete_pods: tuple[PodView, ...] = ()
    """Pods of lost nodes: their objects are to be removed."""
    termination: Termination | None = None
    attempt_end: AttemptEnd | None = None
    finish: Finish | None = None
    blocking: BlockingCondition | None = None
    scrape_pod: PodView | None = None
    reconcile_at: datetime | None = None
    refused: Refused | None = None
    is_clean: bool = False
    """A finished job with nothing left to do."""


@dataclass(frozen=True)
class ActionResult:
    """What came of a plan."""

    created_job: JobView | None = None
    blocking: BlockingCondition | None = None
    """Why the Job, or its Service, could not be created."""
    deleted_count: int = 0
    warnings: tuple[str, ...] = ()
