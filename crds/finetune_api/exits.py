"""Meaning and retry policy of each exit code of a trainer pod.

No other module maps exit codes. The operator's retry rules, the Job's podFailurePolicy, the default hints and the reference
documentation use the table `EXIT_POLICIES`. If several ranks fail, the trainer uses this table to choose the root cause. A new exit code
needs a member of `names.ExitCode`, an entry in this table and, if the trainer raises an error for it, a class in `errors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from finetune_api.names import ExitCode, FailureClass, Reason


class RetryPolicy(StrEnum):
    """What the operator does after an attempt has failed."""

    NEVER = "never"
    """End the job: no further attempt can succeed."""
    NOT_COUNTED = "free"
    """Start another attempt. The failed attempt does not count against `policy.retries`."""
    COUNTED = "counted"
    """Start another attempt after a backoff. The failed attempt counts against `policy.retries`, unless it committed a newer step."""
    ADAPT_MEMORY = "adaptMemory"
    """Start another attempt with a smaller memory footprint, if a further reduction is possible; otherwise end the job."""
    ROLL_BACK = "rollBack"
    """Start another attempt from an earlier healthy checkpoint with a lower learning rate, if a further rollback is allowed; otherwise end the job."""
    WAIT = "wait"
    """Start another attempt after a backoff. The number of attempts is not limited, and the failed attempt does not count against `policy.retries`."""


class FailurePrecedence(IntEnum):
    """Which failure decides the attempt's reason if several pods or ranks fail: the one with the lowest value."""

    FIXABLE_INPUT = 0
    """Failures of configuration, data, model, storage or installation, which a person can fix."""
    NUMERIC_FAILURE = 1
    """GPU memory was exhausted, or training diverged."""
    UNKNOWN_CAUSE = 2
    """The cause is unknown."""
    REMOVED_BY_CLUSTER = 3
    """The cluster removed or rejected the pod."""
    PEER_FAILURE = 4
    """A rank stopped because another rank failed."""
    STOPPED_ON_REQUEST = 5
    """The pod stopped on request."""


@dataclass(frozen=True)
class ExitPolicy:
    """Meaning and retry policy of one exit code of a trainer pod.

    The failure class, failure code and hint of the termination message take precedence over the values of this policy.
    """

    exit_code: ExitCode
    failure_class: FailureClass
    retry_policy: RetryPolicy
    precedence: FailurePrecedence
    reason: Reason
    """Reason in the status of an attempt that ends with this exit code."""
    default_failure_code: str
    """Value of `status.failure.code` if the termination message has no code."""
    default_hint: str
    """Hint for the user or the platform team if the termination message has no hint."""

    @property
    def fails_job(self) -> bool:
        """Whether the podFailurePolicy fails the Job as soon as one pod exits with this code.

        All other exit codes fail the Job through `backoffLimit: 0`. The podFailurePolicy must not contain code 75, with which the pods of a
        suspended Job exit: a rule for this code would fail the suspended Job.
        """
        return self.retry_policy in (RetryPolicy.NEVER, RetryPolicy.ROLL_BACK, RetryPolicy.WAIT)


EXIT_POLICIES: dict[int, ExitPolicy] = {
    policy.exit_code: policy
    for policy in (
        ExitPolicy(
            ExitCode.CONFIG_INVALID, FailureClass.USER, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT, Reason.USER_ERROR,
            "ConfigurationInvalid", "create a new FineTuneJob with a corrected spec",
        ),
        ExitPolicy(
            ExitCode.DATA_INVALID, FailureClass.DATA, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT, Reason.DATA_ERROR,
            "DataInvalid", "correct the data set, then create a new FineTuneJob",
        ),
        ExitPolicy(
            ExitCode.SOURCE_NOT_FOUND, FailureClass.MODEL, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT, Reason.MODEL_ERROR,
            "NotFound", "check the name of the model or data set; a gated model or data set also needs a token",
        ),
        ExitPolicy(
            ExitCode.STORAGE_SETUP, FailureClass.STORAGE, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT, Reason.STORAGE_ERROR,
            "StorageWronglySetUp", "check bucket, region, endpoint and addressingStyle in spec.storage",
        ),
        ExitPolicy(
            ExitCode.STORAGE_UNREACHABLE, FailureClass.STORAGE, RetryPolicy.COUNTED, FailurePrecedence.FIXABLE_INPUT, Reason.STORAGE_ERROR,
            "StorageUnreachable", "check that the pods can reach the storage endpoint",
        ),
        ExitPolicy(
            ExitCode.INTERNAL_ERROR, FailureClass.INTERNAL, RetryPolicy.COUNTED, FailurePrecedence.UNKNOWN_CAUSE, Reason.INTERNAL_ERROR,
            "Unclassified", "see the log of the pod",
        ),
        ExitPolicy(
            ExitCode.OUT_OF_MEMORY, FailureClass.OUT_OF_MEMORY, RetryPolicy.ADAPT_MEMORY, FailurePrecedence.NUMERIC_FAILURE, Reason.OUT_OF_MEMORY,
            "GpuOutOfMemory", "lower training.batchSizePerDevice or dataset.maxSequenceLength, or use method qlora",
        ),
        ExitPolicy(
            ExitCode.TRAINING_DIVERGED, FailureClass.DIVERGED, RetryPolicy.ROLL_BACK, FailurePrecedence.NUMERIC_FAILURE, Reason.DIVERGED,
            "Diverged", "lower training.learningRate or training.maxGradNorm",
        ),
        ExitPolicy(
            ExitCode.NO_CHECKPOINT, FailureClass.STORAGE, RetryPolicy.COUNTED, FailurePrecedence.FIXABLE_INPUT, Reason.STORAGE_ERROR,
            "NoLoadableCheckpoint", "check the checkpoints below spec.storage.uri with `finetune checkpoints`",
        ),
        ExitPolicy(
            ExitCode.PEER_FAILED, FailureClass.INFRASTRUCTURE, RetryPolicy.COUNTED, FailurePrecedence.PEER_FAILURE, Reason.PEER_FAILED,
            "PeerFailed", "see the log of the rank that failed first",
        ),
        ExitPolicy(
            ExitCode.PREEMPTED_SAVED, FailureClass.PREEMPTED, RetryPolicy.NOT_COUNTED, FailurePrecedence.STOPPED_ON_REQUEST, Reason.PREEMPTED,
            "PreemptedSaved", "no action is needed: the next attempt resumes from the saved step",
        ),
        ExitPolicy(
            ExitCode.PREEMPTED_UNSAVED, FailureClass.PREEMPTED, RetryPolicy.NOT_COUNTED, FailurePrecedence.STOPPED_ON_REQUEST, Reason.PREEMPTED,
            "PreemptedNotSaved", "raise policy.terminationGracePeriodSeconds so that a checkpoint can be saved in time",
        ),
        ExitPolicy(
            ExitCode.CREDENTIALS_REFUSED, FailureClass.STORAGE, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT, Reason.STORAGE_ERROR,
            "CredentialsRefused", "check the keys and their permissions in the Secret",
        ),
        ExitPolicy(
            ExitCode.INSTALLATION_BROKEN, FailureClass.INFRASTRUCTURE, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT,
            Reason.INSTALLATION_BROKEN, "InstallationBroken", "use a trainer image that contains the missing compiler or library",
        ),
        ExitPolicy(
            ExitCode.TRAINER_TOO_OLD, FailureClass.INFRASTRUCTURE, RetryPolicy.WAIT, FailurePrecedence.FIXABLE_INPUT, Reason.TRAINER_TOO_OLD,
            "TrainerTooOld", "use a trainer image of the operator's version, or remove the unknown fields from the spec",
        ),
        ExitPolicy(
            ExitCode.GATE_FAILED, FailureClass.MODEL, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT, Reason.GATE_FAILED,
            "GateFailed", "status.evaluation shows the metric that failed its gate; status.output contains the location of the trained model",
        ),
        ExitPolicy(
            ExitCode.VERIFICATION_FAILED, FailureClass.MODEL, RetryPolicy.NEVER, FailurePrecedence.FIXABLE_INPUT, Reason.VERIFICATION_FAILED,
            "VerificationFailed", "status.output.verification shows the difference; do not serve the files in status.output.uri",
        ),
    )
}  # fmt: skip
"""The policy of each exit code with which a trainer pod reports a failure."""

REASON_OF_FAILURE_CLASS: dict[FailureClass, Reason] = {
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
"""Reason of a failed attempt, by failure class.

This table is used if the failure class in the termination message differs from that in the policy of the exit code.
"""


def choose_attempt_reason(policy: ExitPolicy, failure_class: FailureClass) -> Reason:
    """Return the reason of a failed attempt. `policy`: the policy of its exit code. `failure_class`: the class in its termination message."""
    return policy.reason if failure_class is policy.failure_class else REASON_OF_FAILURE_CLASS[failure_class]


def list_exit_codes_that_fail_the_job() -> list[int]:
    """Return the exit codes for the FailJob rule of the podFailurePolicy, in ascending order."""
    return sorted(int(code) for code, policy in EXIT_POLICIES.items() if policy.fails_job)
