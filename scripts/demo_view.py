"""Show a running job: phase, progress, loss, remaining time and events.

On a terminal, the view is updated in place. Without a terminal, each change is printed as a line. The view only reads the job's status and events.
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
SHOWN_EVENT_COUNT = 8


@dataclass(frozen=True)
class Event:
    """One Kubernetes event about the job."""

    time: datetime
    reason: str
    note: str
    is_warning: bool

    @property
    def line(self) -> str:
        """The event as one line of text."""
        return f"{self.time.astimezone():%H:%M:%S}  {self.reason}: {self.note}"


@dataclass(frozen=True)
class Snapshot:
    """Status and events of a job at one time. `status` is None until the operator has written a phase."""

    status: FineTuneJobStatus | None
    events: tuple[Event, ...]

    @property
    def phase(self) -> str:
        """The job's phase, or a text that says that the operator has not written a phase yet."""
        return str(self.status.phase) if self.status and self.status.phase else "Waiting for the operator"

    @property
    def is_finished(self) -> bool:
        """Whether the phase is final."""
        return self.status is not None and self.status.phase in FINAL_PHASES


class JobReader(Protocol):
    """An object that reads the current status and events of a job."""

    def read(self) -> Snapshot:
        """Return the current status and events."""


@dataclass
class Job:
    """A FineTuneJob in a cluster."""

    kubeconfig: Path
    namespace: str
    name: str
    _api_clients: tuple[Any, Any] | None = field(default=None, repr=False)

    def read(self) -> Snapshot:
        """Return the current status and events from the API server."""
        custom_objects_api, events_api = self._get_api_clients()
        resource = custom_objects_api.get_namespaced_custom_object(GROUP, VERSION, self.namespace, PLURAL, self.name)
        status = resource.get("status") or {}
        selector = f"regarding.kind=FineTuneJob,regarding.uid={resource['metadata']['uid']}"
        event_list = events_api.list_namespaced_event(self.namespace, field_selector=selector)
        return Snapshot(
            FineTuneJobStatus.model_validate(status) if status.get("phase") else None,
            tuple(sorted((_parse_event(item) for item in event_list.items), key=lambda event: event.time)),
        )

    def _get_api_clients(self) -> tuple[Any, Any]:
        if self._api_clients is None:
            from kubernetes import client, config

            api_client = config.new_client_from_config(str(self.kubeconfig))
            self._api_clients = client.CustomObjectsApi(api_client), client.EventsV1Api(api_client)
        return self._api_clients


def _parse_event(item: Any) -> Event:
    event_time = item.event_time or item.metadata.creation_timestamp or datetime.now(UTC)
    return Event(event_time, item.reason or "", item.note or "", item.type == "Warning")


def follow_job(job: JobReader, console: Console, *, timeout_seconds: float) -> Snapshot:
    """Show the job until it has finished. Returns its last snapshot. Errors: TimeoutError after `timeout_seconds`."""
    return _follow_live(job, console, timeout_seconds) if console.is_terminal else _follow_as_lines(job, console, timeout_seconds)


def _poll_snapshots(job: JobReader, timeout_seconds: float) -> Iterator[Snapshot]:
    deadline = time.monotonic() + timeout_seconds
    while True:
        snapshot = job.read()
        yield snapshot
        if snapshot.is_finished:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"the job has not finished within {timeout_seconds:.0f} s; its phase is {snapshot.phase}")
        time.sleep(POLL_SECONDS)


def _follow_live(job: JobReader, console: Console, timeout_seconds: float) -> Snapshot:
    started_at = time.monotonic()
    with Live(console=console, refresh_per_second=8) as live:
        for snapshot in _poll_snapshots(job, timeout_seconds):
            live.update(render_panel(snapshot, time.monotonic() - started_at))
    return snapshot


def _follow_as_lines(job: JobReader, console: Console, timeout_seconds: float) -> Snapshot:
    """Print one line for each change of the phase, for each event, and for each fifth of the steps. Returns the last snapshot."""
    printed_lines: set[str] = set()
    for snapshot in _poll_snapshots(job, timeout_seconds):
        for line in [f"phase {snapshot.phase}", *(event.line for event in snapshot.events), *_make_milestone_lines(snapshot)]:
            if line not in printed_lines:
                printed_lines.add(line)
                console.print(f"    {line}", highlight=False, markup=False)
    return snapshot


def _make_milestone_lines(snapshot: Snapshot) -> list[str]:
    """Return the line `N % of the steps done` for the last milestone that the job has reached (20, 40, 60, 80 or 100 %), or no line below 20 %."""
    progress = snapshot.status.progress if snapshot.status else None
    percent = (progress.percent or 0) // 20 * 20 if progress else 0
    return [f"{percent} % of the steps done"] if percent else []


def render_panel(snapshot: Snapshot, elapsed_seconds: float) -> RenderableType:
    """Render a snapshot for the live view. `elapsed_seconds` is the time since the view started."""
    status = snapshot.status or FineTuneJobStatus()
    header_row = Table.grid(padding=(0, 2))
    attempt = f"attempt {status.attempt}" if status.attempt else ""
    workers = f"{status.workers.display} pods ready" if status.workers else ""
    header_row.add_row(Text(snapshot.phase, style="bold cyan"), attempt, workers, f"[dim]{elapsed_seconds:.0f} s[/]")
    panel_rows: list[RenderableType] = [header_row, _render_progress(status), _render_metrics(status)]
    if snapshot.events:
        panel_rows.append(Text())
        panel_rows += [Text(event.line, style="yellow" if event.is_warning else "dim") for event in snapshot.events[-SHOWN_EVENT_COUNT:]]
    return Panel(Group(*panel_rows), title="FineTuneJob", title_align="left", border_style="blue")


def _render_progress(status: FineTuneJobStatus) -> RenderableType:
    progress = status.progress
    step, total_steps = (progress.step or 0, progress.total_steps or 0) if progress else (0, 0)
    row = Table.grid(padding=(0, 1))
    progress_text = progress.display if progress and progress.display else "no step yet"
    row.add_row(ProgressBar(total=total_steps or 100, completed=step, width=46), progress_text)
    return row


def _render_metrics(status: FineTuneJobStatus) -> RenderableType:
    metric_texts = []
    if status.metrics and status.metrics.train_loss is not None:
        metric_texts.append(f"loss {status.metrics.train_loss:.3f}")
    if status.progress and status.progress.eta and not status.completion_time:
        metric_texts.append(f"ready in {status.progress.eta}")
    if status.progress and status.progress.tokens_per_second:
        metric_texts.append(f"{status.progress.tokens_per_second:.0f} tokens/s")
    if status.latest_checkpoint:
        metric_texts.append(f"checkpoint {status.latest_checkpoint.split('/checkpoints/')[-1].split('/')[0]}")
    return Text("   ".join(metric_texts))
