"""The plan that `decide` makes for one reconcile of a job, and the result of carrying it out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finetune_api.names import Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Adaptation, Failure

from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.policies.verdict import Refused
from finetune_operator.views import JobView, PodView


class Situation(StrEnum):
    """The state of a job."""

    DELETING = "deleting"
    """The FineTuneJob is being deleted. The garbage collector deletes its Jobs and pods."""
    REFUSED = "refused"
    """The spec cannot be run, or cannot be run yet."""
    SUSPENDED = "suspended"
    """The user suspended the job and none of its pods is left."""
    BLOCKED = "blocked"
    """The next attempt waits until Jobs and pods of earlier attempts, or a Job of another owner, are gone."""
    BACKING_OFF = "backing off"
    """The next attempt waits for the end of the backoff."""
    STARTING = "starting"
    """The Job of an attempt is created now."""
    ACTIVE = "active"
    """The Job of an attempt exists and may run."""
    TERMINATING = "terminating"
    """The Job of the attempt is being deleted."""
    ENDED = "ended"
    """The attempt has ended. Its end and the next attempt, or the end of the job, are recorded now."""
    FINISHED = "finished"
    """The job starts no further attempt."""


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
    """The end of the current attempt, as the status records it."""

    reason: Reason
    time: datetime
    failure: Failure | None = None
    termination_message: TerminationMessage | None = None
    """The newest termination message of rank 0."""
    counted: bool = False
    """Whether the attempt counts against `policy.retries`."""
    progressed: bool = False
    """Whether the attempt committed a newer step than all earlier attempts."""
    committed_step: int | None = None
    next_attempt: int | None = None
    adaptation: Adaptation | None = None


@dataclass(frozen=True)
class Termination:
    """Why the operator ends the current attempt. The reason is written to the status before the Job is deleted."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Plan:
    """The actions of this reconcile, and the input for the status."""

    situation: Situation
    create_attempt: int | None = None
    """Number of the attempt whose Job is created."""
    delete_jobs: tuple[JobView, ...] = ()
    delete_pods: tuple[PodView, ...] = ()
    """Pods without a Job, which are deleted with their grace period."""
    force_delete_pods: tuple[PodView, ...] = ()
    """Pods of lost nodes, whose objects are removed without waiting for the kubelet."""
    termination: Termination | None = None
    attempt_end: AttemptEnd | None = None
    finish: Finish | None = None
    blocking_condition: BlockingCondition | None = None
    scrape_pod: PodView | None = None
    """The pod whose progress is read from now on."""
    reconcile_at: datetime | None = None
    """When a time limit makes another reconcile necessary."""
    refused: Refused | None = None
    is_clean: bool = False
    """Whether the job is finished and none of its Jobs and pods needs to be deleted now."""


@dataclass(frozen=True)
class ActionResult:
    """The result of carrying out a plan."""

    created_job: JobView | None = None
    blocking_condition: BlockingCondition | None = None
    """Why the Job or its Service could not be created."""
    deleted_count: int = 0
    warnings: tuple[str, ...] = ()
