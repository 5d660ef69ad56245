"""Error classes, one per exit code. An error's `code` identifies the failure, and its hint says what to write instead.

The trainer turns errors into exit codes and termination messages. The CLI and the operator raise ConfigError only. A message says
what was found and why it cannot work. Messages never contain secrets.
"""

from __future__ import annotations

from typing import ClassVar

from finetune_api.exits import EXIT_POLICIES
from finetune_api.names import ExitCode, FailureClass


class FineTuneError(Exception):
    """A failure with a failure class, a code, a message and a hint.

    `code` is a stable CamelCase word (`DatasetEmpty`) that programs may match on.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.INTERNAL

    def __init__(self, code: str, message: str, *, hint: str | None = None, failure_class: FailureClass | None = None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.failure_class = failure_class or EXIT_POLICIES[self.exit_code].failure_class

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.hint})" if self.hint else "")

    def __reduce__(self) -> tuple[object, ...]:
        """Make errors picklable: ranks send them to the supervisor."""
        return _rebuild, (type(self), self.code, self.message, self.hint, self.failure_class)


def _rebuild(
    cls: type[FineTuneError], code: str, message: str, hint: str | None, failure_class: FailureClass
) -> FineTuneError:
    return cls(code, message, hint=hint, failure_class=failure_class)


class ConfigError(FineTuneError):
    """64: the configuration cannot work; only another spec helps."""

    exit_code = ExitCode.CONFIG


class DataError(FineTuneError):
    """65: the data cannot be trained on."""

    exit_code = ExitCode.DATA


class NotFoundError(FineTuneError):
    """66: a model or data set is missing or gated."""

    exit_code = ExitCode.NOT_FOUND


class StorageSetupError(FineTuneError):
    """67: storage is wrongly configured (bucket, region, addressing, TLS)."""

    exit_code = ExitCode.STORAGE_SETUP


class StorageError(FineTuneError):
    """69: storage could not be reached after retries."""

    exit_code = ExitCode.STORAGE


class InternalError(FineTuneError):
    """70: unclassified."""

    exit_code = ExitCode.INTERNAL


class MemoryExhaustedError(FineTuneError):
    """71: GPU memory was exhausted."""

    exit_code = ExitCode.OUT_OF_MEMORY


class DivergedError(FineTuneError):
    """72: loss or gradient norm was not finite."""

    exit_code = ExitCode.DIVERGED


class NoCheckpointError(FineTuneError):
    """73: checkpoints were committed, but none can be loaded."""

    exit_code = ExitCode.NO_CHECKPOINT


class PeerError(FineTuneError):
    """74: another rank or a collective operation failed, or training hung."""

    exit_code = ExitCode.PEER


class CredentialsError(FineTuneError):
    """77: credentials or permissions are missing or wrong."""

    exit_code = ExitCode.CREDENTIALS


class InstallationBrokenError(FineTuneError):
    """78: the trainer image lacks a compiler or library; retrying cannot help."""

    exit_code = ExitCode.INSTALLATION_BROKEN


class TooOldError(FineTuneError):
    """79: this program does not know a field that the user set."""

    exit_code = ExitCode.TOO_OLD


class GateFailedError(FineTuneError):
    """80: the trained model missed a gate."""

    exit_code = ExitCode.GATE_FAILED


ERROR_OF_CODE: dict[int, type[FineTuneError]] = {int(cls.exit_code): cls for cls in FineTuneError.__subclasses__()}
"""The error class of each exit code that the trainer raises."""
