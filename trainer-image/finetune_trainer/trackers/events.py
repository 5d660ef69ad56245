"""Defines the events of a run that trackers receive, and the file in which events wait until they are sent.

The supervisor appends events to the file, one JSON object per line. Each tracker reads the file from its own position, so a tracker that
is down loses no events and does not delay other trackers. A new attempt writes a new file, which begins with the log entries of the run up
to the checkpoint from which the attempt resumes.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from finetune_trainer.results.log_entry import LogEntry

MAX_EVENTS_PER_BATCH = 200
MAX_BYTES_PER_READ = 1024 * 1024


class TrackedPhase(StrEnum):
    """A phase of the job. Each value is the name of a field of `spec.phases`."""

    TRAIN = "train"
    INFER = "infer"
    EVALUATE = "evaluate"


class RunEnd(StrEnum):
    """How an attempt ended."""

    FINISHED = "finished"
    """All phases are done."""
    FAILED = "failed"
    """The attempt failed. If the operator starts another attempt, the new attempt sets the status of the run to running again."""
    INTERRUPTED = "interrupted"
    """The pod was stopped, for example by a preemption. Another attempt continues the run."""
    KILLED = "killed"
    """The user ended a local run with Ctrl-C."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LogEvent(_Event):
    """One log entry of the run."""

    kind: Literal["log"] = "log"
    entry: LogEntry


class DataSource(_Event):
    """One data source of the run, with its digest."""

    context: str = Field(description="`training`, `validation` or `testing`.")
    source: str = Field(description="URI of the source, without secrets.")
    digest: str = Field(description="sha256 (hex) of this source, or of all training data.")


class DataEvent(_Event):
    """The data sources of the run."""

    kind: Literal["data"] = "data"
    sources: tuple[DataSource, ...]


class PhaseEvent(_Event):
    """The start or the end of a phase."""

    kind: Literal["phase"] = "phase"
    phase: TrackedPhase
    start_time: float = Field(description="Seconds since 1970.")
    end_time: float | None = Field(default=None, description="Seconds since 1970. None: the phase is running.")
    end: RunEnd | None = None
    values: dict[str, float] = Field(default_factory=dict, description="Results of the phase, by name.")
    step: int = Field(default=0, description="Number of optimizer steps after which the values were measured.")


class ArtifactEvent(_Event):
    """A file or folder that the run has stored. Trackers get the address of the file or folder, not its contents."""

    kind: Literal["artifact"] = "artifact"
    name: str
    uri: str
    sha256: str | None = None


class SystemEvent(_Event):
    """One sample of CPU, memory and GPU usage."""

    kind: Literal["system"] = "system"
    time: float = Field(description="Seconds since 1970.")
    seconds: int = Field(description="Seconds since the start of the run's first attempt.")
    values: dict[str, float]


class EndEvent(_Event):
    """The end of the attempt. No event follows."""

    kind: Literal["end"] = "end"
    end: RunEnd
    time: float = Field(description="Seconds since 1970.")
    reason: str | None = Field(default=None, description="Code of the failure. None if the attempt did not fail.")


Event = LogEvent | DataEvent | PhaseEvent | ArtifactEvent | SystemEvent | EndEvent
_EVENT_ADAPTER: TypeAdapter[Any] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def event_to_line(event: Event) -> str:
    """Return the event as one line of the file."""
    return event.model_dump_json(exclude_none=True) + "\n"


def append_events(path: Path, events: Iterable[Event]) -> None:
    """Append events to a file: all of them, or none if the disk is full. Errors: OSError."""
    data = "".join(event_to_line(event) for event in events).encode()
    with path.open("ab", buffering=0) as stream:
        old_size = stream.tell()
        try:
            while data:
                data = data[stream.write(data) :]
        except OSError:
            stream.truncate(old_size)  # The next event must not continue an unfinished line.
            raise


class EventReader:
    """Reads events from the complete lines of a growing file. `position`: number of bytes whose events were read and handled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.position = 0
        self._next_position = 0

    def read(self) -> list[Event]:
        """Return the next events, at most `MAX_EVENTS_PER_BATCH`. Until `confirm` is called, each call returns the same events."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self.position)
                data = stream.read(MAX_BYTES_PER_READ)
        except FileNotFoundError:
            return []
        lines = data.splitlines(keepends=True)[:MAX_EVENTS_PER_BATCH]
        complete_lines = [line for line in lines if line.endswith(b"\n")]
        self._next_position = self.position + sum(map(len, complete_lines))
        return [_EVENT_ADAPTER.validate_json(line) for line in complete_lines]

    def confirm(self) -> None:
        """Record that the events of the last `read` are handled, so that the next `read` returns later events."""
        self.position = self._next_position
