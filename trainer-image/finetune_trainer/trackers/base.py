"""Defines the interface of a tracker, the facts about the run that each tracker gets, and the errors of trackers.

Events are sent again after an error and in a new attempt, so a tracker must handle events that it has already received. To avoid duplicates, a tracker
asks its server for the newest step of each value, writes its records under fixed keys, or writes its files anew. The number of sent events is not
stored, because a process may be killed after it sends events and before it stores their number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from finetune_api.names import Reason
from pydantic import BaseModel, ConfigDict, Field

from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.trackers.events import Event

NOT_SENT_FIELDS = frozenset({"step", "unix_time"})
"""Fields of a log entry that are not sent as values, because they only give the step and the time of the other fields."""


class TrackerError(Exception):
    """A tracker did not accept events.

    The message contains neither credentials nor texts from the server, because these texts may repeat credentials.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class TrackedRun(BaseModel):
    """The facts about the run that each tracker gets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Name of the run in trackers. All attempts have the same name.")
    project: str = Field(description="`output.project`, or the namespace.")
    namespace: str
    job: str = Field(description="Name of the FineTuneJob.")
    uid: str = Field(description="uid of the FineTuneJob. It identifies the run in every tracker.")
    attempt: int
    model: str = Field(description="Source of the base model, without secrets.")
    storage_uri: str = Field(description="Folder of the job in storage.")
    started_at: datetime = Field(description="Start of the run's first attempt.")
    resumed_from_step: int | None = Field(default=None, description="Optimizer step that this attempt continues from. None if it does not train.")
    parameters: dict[str, str] = Field(description="Values of the spec with all defaults, by path, without secrets.")

    @property
    def tags(self) -> dict[str, str]:
        """Labels of the run in trackers."""
        return {
            "finetune.namespace": self.namespace, "finetune.name": self.job, "finetune.uid": self.uid,
            "finetune.attempt": str(self.attempt), "finetune.storage": self.storage_uri,
        }  # fmt: skip


class FileStorage(Protocol):
    """The storage for the files of those trackers that write files."""

    def put_file(self, path: Path, key: str) -> None:
        """Store a file, unless a later attempt has begun. `key`: relative to the job's folder."""


class Tracker(Protocol):
    """An experiment tracker. One thread calls all methods. Errors: TrackerError, or any exception of the tracker's library."""

    name: str

    def open(self) -> None:
        """Connect, and create or continue the run in the tracker. This method is called again after each error."""

    def send(self, events: Sequence[Event]) -> None:
        """Send events. An event that the tracker already has is skipped or replaced."""

    def flush(self) -> None:
        """Send or store everything that `send` has only buffered. This method is called at intervals, and after the last event."""

    def explain(self, error: Exception) -> TrackerError:
        """Return the TrackerError for an exception of the tracker's library."""

    @property
    def run_address(self) -> str | None:
        """Address or id of the run in the tracker. None until the address or id is known."""


def logged_values(entry: LogEntry) -> dict[str, float]:
    """Return the finite numbers of a log entry, without its step and time."""
    return {
        name: float(value)
        for name, value in entry.to_wire().items()
        if name not in NOT_SENT_FIELDS and isinstance(value, int | float) and not isinstance(value, bool)
    }


def strip_to_server(address: str) -> str:
    """Return the scheme, host and port of an address, without user, password, path and query."""
    match = re.match(r"^([\w+.-]+://)?(?:[^/@]*@)?([^/?#]*)", address)
    return f"{match[1] or ''}{match[2]}" if match else "the server"


def build_connection_error(tracker: str, address: str, error: Exception) -> TrackerError:
    """Return the error for a server that does not answer.

    The text of the exception only decides which of three reasons the message gives; the message does not contain the text.
    """
    error_text = str(error).lower()
    if "refused" in error_text:
        reason = "the connection was refused"
    elif "resol" in error_text or "name or service" in error_text or "getaddrinfo" in error_text:
        reason = "its name cannot be resolved"
    else:
        reason = f"its response is not valid ({type(error).__name__})"
    return TrackerError(Reason.TRACKER_UNAVAILABLE, f"{tracker} at {strip_to_server(address)} could not be reached: {reason}")


def build_rejected_credentials_error(tracker: str, address: str, hint: str) -> TrackerError:
    """Return the error for credentials that the server does not accept."""
    return TrackerError(Reason.TRACKER_CREDENTIALS_REJECTED, f"{tracker} at {strip_to_server(address)} does not accept the credentials; {hint}")
