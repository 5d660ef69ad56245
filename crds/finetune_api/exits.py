"""The exit policy table: what each exit code of a trainer pod means and what the operator does about it.

This is the only place that maps exit codes. The operator's retry rules, the Job's podFailurePolicy, the trainer's choice of
the root cause among several failing ranks, the default hints and the reference documentation all read it. A new exit code
needs a member of `names.ExitCode`, a row here and, if the trainer raises it, an error class in `errors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from finetune_api.names import ExitCode, FailureClass, Reason


class RetryPolicy(StrEnum):
    """What the operator does after an attempt ended with a failure."""

    NEVER = "never"
    """End the job: no further attempt can succeed."""
    FREE = "free"
    """Start another attempt. The failed attempt does not count against `policy.retries`."""
    COUNTED = "counted"
    """Start another attempt after a backoff. The failed attempt counts against `policy.retries`, unless it committed a newer step."""
    ADAPT_MEMORY = "adaptMemory"
    """Start another attempt with a smaller memory footprint, if a further reduction is possible; otherwise end the job."""
    ROLL_BACK = "rollBack"
    """Start another attempt from an earlier healthy checkpoint with a lower learning rate, if a further rollback is allowed; otherwise end the job."""
    WAIT = "wait"
    """Start another attempt after a backoff, without limit; it does not count against `policy.retries`."""


class Precedence(IntEnum):
    """If several pods or ranks failed, the failure with the lowest precedence value explains the attempt."""

    INPUT = 0
    """Configuration, data, model, storage or installation: a person can fix the cause."""
    NUMERIC = 1
    """GPU memory was exhausted, or training diverged."""
    UNKNOWN = 2
    """Unclassified."""
    CLUSTER = 3
    """The cluster removed or rejected the pod."""
    PEER = 4
    """The rank noticed that another rank failed."""
    STOPPED = 5
    """The pod stopped on request."""


@dataclass(frozen=True)
class ExitPolicy:
    """What one exit code of a trainer pod means.

    `failure_class`, `default_failure_code` and `default_hint` apply only where the termination message sets no other value.
    """

    code: ExitCode
    failure_class: FailureClass
    retry: RetryPolicy
    precedence: Precedence
    reason: Reason
    """Reason of the ended attempt."""
    default_failure_code: str
    """Value of `status.failure.code` if the termination message has no code."""
    default_hint: str
    """What the user or the platform team can do. Shown if the termination message has no hint."""

    @property
    def fails_job(self) -> bool:
        """Whether the podFailurePolicy ends the Job as soon as one pod exits with this code.

        All other codes fail the Job through `backoffLimit: 0`. A podFailurePolicy rule for them would also fail a suspended Job, whose
        pods exit with 75.
        """
        return self.retry in (RetryPolicy.NEVER, RetryPolicy.ROLL_BACK, RetryPolicy.WAIT)


EXIT_POLICIES: dict[int, ExitPolicy] = {
    policy.code: policy
    for policy in (
        ExitPolicy(
            ExitCode.CONFIG, FailureClass.USER, RetryPolicy.NEVER, Precedence.INPUT, Reason.USER_ERROR,
            "ConfigurationInvalid", "create a new FineTuneJob with a corrected spec",
        ),
        ExitPolicy(
            ExitCode.DATA, FailureClass.DATA, RetryPolicy.NEVER, Precedence.INPUT, Reason.DATA_ERROR,
            "DataInvalid", "correct the data set, then create a new FineTuneJob",
        ),
        ExitPolicy(
            ExitCode.NOT_FOUND, FailureClass.MODEL, RetryPolicy.NEVER, Precedence.INPUT, Reason.MODEL_ERROR,
            "NotFound", "check the name of the model or data set, and the token if it is gated",
        ),
        ExitPolicy(
            ExitCode.STORAGE_SETUP, FailureClass.STORAGE, RetryPolicy.NEVER, Precedence.INPUT, Reason.STORAGE_ERROR,
            "StorageWronglySetUp", "check bucket, region, endpoint and addressingStyle in spec.storage",
        ),
        ExitPolicy(
            ExitCode.STORAGE, FailureClass.STORAGE, RetryPolicy.COUNTED, Precedence.INPUT, Reason.STORAGE_ERROR,
            "StorageUnreachable", "check that the pods can reach the storage endpoint",
        ),
        ExitPolicy(
            ExitCode.INTERNAL, FailureClass.INTERNAL, RetryPolicy.COUNTED, Precedence.UNKNOWN, Reason.INTERNAL_ERROR,
            "Unclassified", "see the log of the pod",
        ),
        ExitPolicy(
            ExitCode.OUT_OF_MEMORY, FailureClass.OUT_OF_MEMORY, RetryPolicy.ADAPT_MEMORY, Precedence.NUMERIC, Reason.OUT_OF_MEMORY,
            "GpuOutOfMemory", "lower training.batchSizePerDevice or dataset.maxSequenceLength, or use method qlora",
        ),
        ExitPolicy(
            ExitCode.DIVERGED, FailureClass.DIVERGED, RetryPolicy.ROLL_BACK, Precedence.NUMERIC, Reason.DIVERGED,
            "Diverged", "lower training.learningRate or training.maxGradNorm",
        ),
        ExitPolicy(
            ExitCode.NO_CHECKPOINT, FailureClass.STORAGE, RetryPolicy.COUNTED, Precedence.INPUT, Reason.STORAGE_ERROR,
            "NoLoadableCheckpoint", "check the checkpoints below spec.storage.uri with `finetune checkpoints`",
        ),
        ExitPolicy(
            ExitCode.PEER, FailureClass.INFRASTRUCTURE, RetryPolicy.COUNTED, Precedence.PEER, Reason.PEER_FAILED,
            "PeerFailed", "see the log of the rank that failed first",
        ),
        ExitPolicy(
            ExitCode.PREEMPTED_SAVED, FailureClass.PREEMPTED, RetryPolicy.FREE, Precedence.STOPPED, Reason.PREEMPTED,
            "PreemptedSaved", "nothing to do: the next attempt resumes from the saved step",
        ),
        ExitPolicy(
            ExitCode.PREEMPTED_UNSAVED, FailureClass.PREEMPTED, RetryPolicy.FREE, Precedence.STOPPED, Reason.PREEMPTED,
            "PreemptedNotSaved", "raise policy.terminationGracePeriodSeconds so that a checkpoint can be saved in time",
        ),
        ExitPolicy(
            ExitCode.CREDENTIALS, FailureClass.STORAGE, RetryPolicy.NEVER, Precedence.INPUT, Reason.STORAGE_ERROR,
            "CredentialsRefused", "check the keys and their permissions in the Secret",
        ),
        ExitPolicy(
            ExitCode.INSTALLATION_BROKEN, FailureClass.INFRASTRUCTURE, RetryPolicy.NEVER, Precedence.INPUT,
            Reason.INSTALLATION_BROKEN, "InstallationBroken", "use a trainer image that contains what the message names",
        ),
        ExitPolicy(
            ExitCode.TOO_OLD, FailureClass.INFRASTRUCTURE, RetryPolicy.WAIT, Precedence.INPUT, Reason.TRAINER_TOO_OLD,
            "TrainerTooOld", "use a trainer image of the operator's version, or remove the fields that the message names",
        ),
        ExitPolicy(
            ExitCode.GATE_FAILED, FailureClass.MODEL, RetryPolicy.NEVER, Precedence.INPUT, Reason.GATE_FAILED,
            "GateFailed", "the model is kept in status.output; see status.evaluation for the metric that missed its gate",
        ),
    )
}  # fmt: skip
"""Policy of every exit code by which a trainer pod reports a failure."""

REASON_OF_CLASS: dict[FailureClass, Reason] = {
    FailureClass.USER: Reason.USER_ERROR,
    FailureClass.DATA: Reason.DATA_ERROR,
    FailureClass.MODEL: Reason.MODEL_ERROR,
    FailureClass.STORAGE: Reason.STORAGE_ERROR,
    FailureClass.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY,
    FailureClass.DIVERGED: Reason.DIVERGED,
    FailureClass.PREEMPTED: Reason.PREEMPTED,
    FailureClass.INFRASTRUCTURE: Reason.PEER_FAILED,
    FailureClass.INTERNAL: Reason.INTERNAL_ERROR,
}
"""Reason of an attempt by failure class, for a termination message whose class differs from that of the exit code's policy."""


def attempt_reason(policy: ExitPolicy, failure_class: FailureClass) -> Reason:
    """Return the reason of an attempt that ended with this policy's exit code and reported `failure_class`."""
    return policy.reason if failure_class is policy.failure_class else REASON_OF_CLASS[failure_class]


def codes_that_fail_the_job() -> list[int]:
    """Return the exit codes of the podFailurePolicy's FailJob rule, sorted."""
    return sorted(int(code) for code, policy in EXIT_POLICIES.items() if policy.fails_job)
