"""Data types: the plan that `decide` makes for one reconcile of a job, and the result of carrying out the plan."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from finetune_api.names import Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Adaptation, Failure, Preparation

from finetune_operator.policies.blocking import BlockingCondition
from finetune_operator.policies.verdict import RefusedSpec
from finetune_operator.views import JobView, PodView


class Situation(StrEnum):
    """The situation of a job, as `decide` determined it."""

    DELETING = "deleting"
    """The FineTuneJob is being deleted. The garbage collector deletes its Jobs and pods."""
    REFUSED = "refused"
    """The operator cannot run the spec now."""
    SUSPENDED = "suspended"
    """The user suspended the job, and all of its pods have ended."""
    PREPARING = "preparing"
    """A pod without GPUs checks storage, model and data before the first attempt."""
    BLOCKED = "blocked"
    """The next attempt waits until the Jobs and pods of earlier attempts are gone, or until a Job of another owner is gone."""
    BACKING_OFF = "backing off"
    """The next attempt waits until the backoff ends."""
    STARTING = "starting"
    """This reconcile creates the Job of an attempt."""
    ACTIVE = "active"
    """The Job of an attempt exists and may run."""
    TERMINATING = "terminating"
    """The Job of the attempt is being deleted."""
    ENDED = "ended"
    """The attempt has ended. This reconcile records the end of the attempt, and whether the next attempt starts or the job ends."""
    FINISHED = "finished"
    """The job is finished and starts no further attempt."""


class Outcome(StrEnum):
    """Whether a finished job succeeded, failed or was cancelled."""

    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


@dataclass(frozen=True)
class JobEnd:
    """How and why the job finishes."""

    outcome: Outcome
    reason: Reason
    failure: Failure | None = None


@dataclass(frozen=True)
class AttemptEnd:
    """How the current attempt ended, as the status records it, and what follows."""

    reason: Reason
    ended_at: datetime
    failure: Failure | None = None
    termination_message: TerminationMessage | None = None
    """The newest termination message of rank 0."""
    is_counted: bool = False
    """Whether the attempt counts against `policy.retries`."""
    made_progress: bool = False
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
    """The actions of one reconcile, and values from which the new status is computed."""

    situation: Situation
    attempt_to_create: int | None = None
    """Number of the attempt whose Job this reconcile creates, or None."""
    preparation_to_create: int | None = None
    """Number of the preparation whose Job this reconcile creates, or None."""
    preparation: Preparation | None = None
    """The new record of the preparation, or None if the record does not change."""
    preparation_message: TerminationMessage | None = None
    """The termination message of a preparation that has succeeded."""
    jobs_to_delete: tuple[JobView, ...] = ()
    pods_to_delete: tuple[PodView, ...] = ()
    """Pods that have no Job any more. This reconcile deletes these pods and gives them their grace period."""
    pods_to_force_delete: tuple[PodView, ...] = ()
    """Pods of lost nodes that this reconcile deletes without a grace period, because the kubelet does not answer."""
    termination: Termination | None = None
    attempt_end: AttemptEnd | None = None
    job_end: JobEnd | None = None
    blocking_condition: BlockingCondition | None = None
    pod_to_scrape: PodView | None = None
    """The pod whose progress report the scraper reads."""
    reconcile_at: datetime | None = None
    """When the job must be reconciled again because a time limit passes."""
    refusal: RefusedSpec | None = None
    is_cleaned_up: bool = False
    """Whether the job is finished and this reconcile deletes none of its Jobs and pods."""

    @property
    def writes_decision(self) -> bool:
        """Whether this reconcile only writes a decision to the status, and the next reconcile carries it out."""
        ends_preparation = self.preparation is not None and self.preparation_to_create is None
        return ends_preparation or self.termination is not None or self.attempt_end is not None or self.job_end is not None


@dataclass(frozen=True)
class ActionResult:
    """The result of carrying out a plan."""

    created_job: JobView | None = None
    """The Job of an attempt."""
    created_preparation: JobView | None = None
    """The Job of a preparation."""
    blocking_condition: BlockingCondition | None = None
    """Why the operator could not create the Job or an object that belongs to the Job, such as its Service."""
    deleted_count: int = 0
    warnings: tuple[str, ...] = ()
