"""Writes TensorBoard event files and stores them below `tracking/tensorboard/` in the job's folder.

Each attempt writes the files of the whole run again: first the log entries up to the checkpoint that it resumes from, then its own log entries. The
stored files therefore contain each step once, even if an attempt repeats steps. A file that has reached `MAX_FILE_BYTES` is closed, uploaded and then
not uploaded again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune_api.names import Reason

from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.results.run_names import make_slug
from finetune_trainer.trackers.base import FileStorage, TrackedRun, TrackerError, logged_values
from finetune_trainer.trackers.events import ArtifactEvent, DataEvent, Event, LogEvent, PhaseEvent, SystemEvent

MAX_FILE_BYTES = 4 * 1024 * 1024
STORAGE_FOLDER = "tracking/tensorboard"


class TensorBoard:
    """Writes the event files of one run."""

    name = "tensorboard"

    def __init__(self, run: TrackedRun, folder: Path, storage: FileStorage) -> None:
        self._run, self._folder, self._storage = run, folder, storage
        self._key_folder = f"{STORAGE_FOLDER}/{make_slug(run.name)}"
        self._file_number = 0
        self._files_to_upload: list[Path] = []
        self._last_step_by_tag: dict[str, int] = {}
        self._is_open = False

    @property
    def run_address(self) -> str | None:
        return f"{self._run.storage_uri}/{self._key_folder}"

    def open(self) -> None:
        """Start the first file. After an error, this method is called again, but it then does nothing, and the existing files are continued."""
        if self._is_open:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._is_open = True
        time = self._run.started_at.timestamp()
        self._write([_build_file_event(time, file_version="brain.Event:2")])
        parameter_rows = "\n".join(f"| {name} | {value} |" for name, value in self._run.parameters.items())
        self._write([_build_text_event(time, "parameters", f"| parameter | value |\n|---|---|\n{parameter_rows}")])

    def send(self, events: Sequence[Event]) -> None:
        records = [record for event in events for record in self._to_records(event)]
        if records:
            self._write(records)

    def flush(self) -> None:
        """Upload the files that have changed."""
        while self._files_to_upload:
            oldest_file = self._files_to_upload[0]
            self._storage.put_file(oldest_file, f"{self._key_folder}/{oldest_file.name}")
            del self._files_to_upload[0]

    def explain(self, error: Exception) -> TrackerError:
        return TrackerError(Reason.TRACKER_FAILED, f"tensorboard: the event files could not be stored: {type(error).__name__}")

    def _to_records(self, event: Event) -> Iterable[Any]:
        match event:
            case LogEvent(entry=entry):
                values = {_build_chart_tag(name, entry): value for name, value in logged_values(entry).items()}
                yield from self._build_scalar_records(entry.unix_time or self._run.started_at.timestamp(), entry.step, values)
            case PhaseEvent(end_time=float(time), step=step, values=values) if values:
                yield from self._build_scalar_records(time, step, {f"{event.phase}/{name}": value for name, value in values.items()})
            case SystemEvent():
                yield from self._build_scalar_records(event.time, event.seconds, event.values)
            case DataEvent(sources=sources):
                yield _build_text_event(self._run.started_at.timestamp(), "data", json.dumps([source.model_dump() for source in sources]))
            case ArtifactEvent():
                yield _build_text_event(self._run.started_at.timestamp(), f"artifact/{event.name}", event.uri)

    def _build_scalar_records(self, time: float, step: int, values: dict[str, float]) -> Iterable[Any]:
        new_values = {tag: value for tag, value in values.items() if step > self._last_step_by_tag.get(tag, -1)}
        self._last_step_by_tag |= dict.fromkeys(new_values, step)
        if new_values:
            from tensorboard.compat.proto.summary_pb2 import Summary

            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in new_values.items()])
            yield _build_file_event(time, step=step, summary=summary)

    def _write(self, records: Sequence[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = self._choose_current_file()
        with path.open("ab") as stream:
            writer = RecordWriter(stream)
            for record in records:
                writer.write(record.SerializeToString())
        if path not in self._files_to_upload:
            self._files_to_upload.append(path)

    def _choose_current_file(self) -> Path:
        """Return the file to write to: a new file if the last one is full.

        The name of a new file sorts after the earlier names, because TensorBoard reads files in the order of names.
        """
        path = self._build_file_path(self._file_number)
        if path.exists() and path.stat().st_size >= MAX_FILE_BYTES:
            self._file_number += 1
            path = self._build_file_path(self._file_number)
        return path

    def _build_file_path(self, number: int) -> Path:
        return self._folder / f"events.out.tfevents.{int(self._run.started_at.timestamp())}.{self._run.uid}.{number:05d}"


def _build_file_event(time: float, **fields: Any) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event as FileEvent

    return FileEvent(wall_time=time, **fields)


def _build_text_event(time: float, tag: str, text: str) -> Any:
    from tensorboard.plugins.text.summary_v2 import text_pb

    return _build_file_event(time, step=0, summary=text_pb(tag, text))


def _build_chart_tag(name: str, entry: LogEntry) -> str:
    """Return the tag of a logged value, such as `train/loss` or `eval/loss`. TensorBoard groups charts by the text before the slash."""
    for prefix in ("eval", "test"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name.removeprefix(f'{prefix}_')}"
    return f"{entry.kind}/{name}" if entry.kind in ("evaluation", "test") else f"train/{name}"
