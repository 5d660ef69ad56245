"""What a person sees while a job runs: phase, progress, loss, time left, events.

Drawn live on a terminal, as lines elsewhere. It reads what every user can read: the resource's status and its events.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from finetune_api.names import FINAL_PHASES, GROUP, PLURAL, VERSION
from finetune_api.status import FineTuneJobStatus
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

POLL_SECONDS = 0.5
SHOWN_EVENTS = 8


@dataclass(frozen=True)
class Event:
    """One event of the job."""

    time: datetime
    reason: str
    note: str
    warning: bool

    @property
    def line(self) -> str:
        """For people, in one line."""
        return f"{self.time.astimezone():%H:%M:%S}  {self.reason}: {self.note}"


@dataclass(frozen=True)
class Look:
    """What was seen at one moment. `status` is None before the operator has said anything."""

    status: FineTuneJobStatus | None
    events: tuple[Event, ...]

    @property
    def phase(self) -> str:
        """The phase, in words for a person who has just applied the job."""
        return str(self.status.phase) if self.status and self.status.phase else "Waiting for the operator"

    @property
    def finished(self) -> bool:
        """Whether nothing further will happen."""
        return self.status is not None and self.status.phase in FINAL_PHASES


class Watched(Protocol):
    """Anything that can be looked at again and again."""

    def look(self) -> Look:
        """The present state."""


@dataclass
class Job:
    """One FineTuneJob of a cluster, seen through its API."""

    kubeconfig: Path
    namespace: str
    name: str
    _clients: tuple[Any, Any] | None = field(default=None, repr=False)

    def look(self) -> Look:
        """Read status and events."""
        custom, events = self._api()
        found = custom.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, self.name)
        status = found.get("status") or {}
        selector = f"regarding.kind=FineTuneJob,regarding.uid={found['metadata']['uid']}"
        listed = events.list_namespaced_event(self.namespace, field_selector=selector)
        return Look(
            FineTuneJobStatus.model_validate(status) if status.get("phase") else None,
            tuple(sorted((_event(item) for item in listed.items), key=lambda event: event.time)),
        )

    def _api(self) -> tuple[Any, Any]:
        if self._clients is None:
            from kubernetes import client, config

            api = config.new_client_from_config(str(self.kubeconfig))
            self._clients = client.CustomObjectsApi(api), client.EventsV1Api(api)
        return self._clients


def _event(item: Any) -> Event:
    moment = item.event_time or item.metadata.creation_timestamp or datetime.now(UTC)
    return Event(moment, item.reason or "", item.note or "", item.type == "Warning")


def follow(job: Watched, console: Console, *, timeout: float) -> Look:
    """Show the job until it is finished; the last look. TimeoutError if it takes longer than `timeout` seconds."""
    return _live(job, console, timeout) if console.is_terminal else _lines(job, console, timeout)


def _looks(job: Watched, timeout: float) -> Iterator[Look]:
    deadline = time.monotonic() + timeout
    while True:
        look = job.look()
        yield look
        if look.finished:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"the job is {look.phase} after {timeout:.0f} s")
        time.sleep(POLL_SECONDS)


def _live(job: Watched, console: Console, timeout: float) -> Look:
    started = time.monotonic()
    with Live(console=console, refresh_per_second=8) as live:
        for look in _looks(job, timeout):
            live.update(panel(look, time.monotonic() - started))
    return look


def _lines(job: Watched, console: Console, timeout: float) -> Look:
    """Without a terminal: a line for each change of phase, each event, and each fifth of the way."""
    said: set[str] = set()
    for look in _looks(job, timeout):
        for line in [f"phase {look.phase}", *(event.line for event in look.events), *_milestone(look)]:
            if line not in said:
                said.add(line)
                console.print(f"    {line}", highlight=False, markup=False)
    return look


def _milestone(look: Look) -> list[str]:
    """A word at each fifth of the way."""
    progress = look.status.progress if look.status else None
    fifth = (progress.percent or 0) // 20 * 20 if progress else 0
    return [f"{fifth} % of the steps done"] if fifth else []


def panel(look: Look, seconds: float) -> RenderableType:
    """The picture of one moment."""
    status = look.status or FineTuneJobStatus()
    head = Table.grid(padding=(0, 2))
    attempt = f"attempt {status.attempt}" if status.attempt else ""
    workers = f"{status.workers.display} pods ready" if status.workers else ""
    head.add_row(Text(look.phase, style="bold cyan"), attempt, workers, f"[dim]{seconds:.0f} s[/]")
    parts: list[RenderableType] = [head, _bar(status), _numbers(status)]
    if look.events:
        parts.append(Text())
        parts += [Text(event.line, style="yellow" if event.warning else "dim") for event in look.events[-SHOWN_EVENTS:]]
    return Panel(Group(*parts), title="FineTuneJob", title_align="left", border_style="blue")


def _bar(status: FineTuneJobStatus) -> RenderableType:
    progress = status.progress
    step, total = (progress.step or 0, progress.total_steps or 0) if progress else (0, 0)
    row = Table.grid(padding=(0, 1))
    text = progress.display if progress and progress.display else "no step yet"
    row.add_row(ProgressBar(total=total or 100, completed=step, width=46), text)
    return row


def _numbers(status: FineTuneJobStatus) -> RenderableType:
    found = []
    if status.metrics and status.metrics.train_loss is not None:
        found.append(f"loss {status.metrics.train_loss:.3f}")
    if status.progress and status.progress.eta and not status.completion_time:
        found.append(f"ready in {status.progress.eta}")
    if status.progress and status.progress.tokens_per_second:
        found.append(f"{status.progress.tokens_per_second:.0f} tokens/s")
    if status.latest_checkpoint:
        found.append(f"checkpoint {status.latest_checkpoint.split('/checkpoints/')[-1].split('/')[0]}")
    return Text("   ".join(found))
