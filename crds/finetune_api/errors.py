"""Exception classes, one for each exit code of the trainer. `code` identifies the failure, and `hint` says what the user can write instead.

The trainer turns these exceptions into exit codes and termination messages. The CLI and the operator raise only ConfigError. An error
message states the invalid value and why it cannot work. Error messages never contain secrets.
"""

from __future__ import annotations

from typing import ClassVar

from finetune_api.exits import EXIT_POLICIES
from finetune_api.names import ExitCode, FailureClass


class FineTuneError(Exception):
    """An error with a failure class, a code, a message and a hint.

    `code` is a CamelCase word (`DatasetEmpty`). Codes do not change between releases, so programs may compare codes.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL_ERROR
    follows_other_rank: ClassVar[bool] = False
    """Whether an error of this class only means that another rank has failed, so it is not the root cause."""

    def __init__(self, code: str, message: str, *, hint: str | None = None, failure_class: FailureClass | None = None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.failure_class = failure_class or EXIT_POLICIES[self.exit_code].failure_class

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.hint})" if self.hint else "")

    def __reduce__(self) -> tuple[object, ...]:
        """Make errors picklable, because ranks send errors to the supervisor."""
        return _rebuild_error, (type(self), self.code, self.message, self.hint, self.failure_class)


def _rebuild_error(
    cls: type[FineTuneError], code: str, message: str, hint: str | None, failure_class: FailureClass
) -> FineTuneError:
    return cls(code, message, hint=hint, failure_class=failure_class)


class ConfigError(FineTuneError):
    """Exit code 64: the configuration cannot work. The user must change the spec."""

    exit_code = ExitCode.CONFIG_INVALID


class DataError(FineTuneError):
    """Exit code 65: the data cannot be used for training."""

    exit_code = ExitCode.DATA_INVALID


class NotFoundError(FineTuneError):
    """Exit code 66: a model or data set is missing or gated."""

    exit_code = ExitCode.SOURCE_NOT_FOUND


class StorageSetupError(FineTuneError):
    """Exit code 67: storage is wrongly configured (bucket, region, addressing, TLS)."""

    exit_code = ExitCode.STORAGE_SETUP


class StorageError(FineTuneError):
    """Exit code 69: storage was unreachable, even after retries."""

    exit_code = ExitCode.STORAGE_UNREACHABLE


class InternalError(FineTuneError):
    """Exit code 70: the failure belongs to no other class."""

    exit_code = ExitCode.INTERNAL_ERROR


class MemoryExhaustedError(FineTuneError):
    """Exit code 71: GPU memory was exhausted."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(FineTuneError):
    """Exit code 72: loss or gradient norm was not finite."""

    exit_code = ExitCode.TRAINING_DIVERGED


class NoCheckpointError(FineTuneError):
    """Exit code 73: the job has committed checkpoints, but none of them can be loaded."""

    exit_code = ExitCode.NO_CHECKPOINT


class PeerError(FineTuneError):
    """Exit code 74: another rank or a collective operation failed, or training hung."""

    exit_code = ExitCode.PEER_FAILED
    follows_other_rank = True


class CredentialsError(FineTuneError):
    """Exit code 77: credentials are missing or wrong, or lack a permission."""

    exit_code = ExitCode.CREDENTIALS_REFUSED


class InstallationBrokenError(FineTuneError):
    """Exit code 78: the trainer image lacks a compiler or library, or the pod has no GPU driver. Retries cannot succeed."""

    exit_code = ExitCode.INSTALLATION_BROKEN


class TooOldError(FineTuneError):
    """Exit code 79: this trainer release does not know a field that the user set."""

    exit_code = ExitCode.TRAINER_TOO_OLD


class GateFailedError(FineTuneError):
    """Exit code 80: the trained model failed a gate of `evaluation.gates`."""

    exit_code = ExitCode.GATE_FAILED


class VerificationFailedError(FineTuneError):
    """Exit code 81: the stored final model is damaged, or differs from the trained model."""

    exit_code = ExitCode.VERIFICATION_FAILED


ERROR_OF_EXIT_CODE: dict[int, type[FineTuneError]] = {int(cls.exit_code): cls for cls in FineTuneError.__subclasses__()}
"""The error class of each exit code that the trainer reports by raising an error."""
