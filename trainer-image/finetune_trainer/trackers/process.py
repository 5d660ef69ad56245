"""The process that sends a run to its trackers: `finetune-trainer track FOLDER`.

The supervisor of rank 0's pod starts this process. The process reads `task.json` and the events in the folder, and writes the state of each
tracker to `state.json`. The process ends after all trackers have received the end event. Only this process imports the libraries of trackers, so that
these libraries cannot slow down or break a rank.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from finetune_api.base import WireModel
from finetune_api.names import MONGODB_URI, Reason, Storage
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import Tracker as TrackerName
from pydantic import Field

from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.files import replace_file
from finetune_trainer.logs import configure_logging
from finetune_trainer.settings import Settings, load_run
from finetune_trainer.storage.base import Store, join_key
from finetune_trainer.storage.roots import open_store
from finetune_trainer.trackers.base import TrackedRun, Tracker
from finetune_trainer.trackers.events import SystemEvent, append_events
from finetune_trainer.trackers.sender import Sender
from finetune_trainer.trackers.system_metrics import SystemSampler

TASK_FILE = "task.json"
EVENTS_FILE = "events.jsonl"
STATE_FILE = "state.json"
ENDING_FILE = "ending"
"""File that the supervisor creates after it has written the end event."""
SYSTEM_METRICS_FILE = "system_metrics.jsonl"
STATE_KEY = f"{Storage.RUN}/trackers.json"
"""Key of the stored copy of `state.json`, relative to the job's folder."""
TICK_SECONDS = 0.2
"""Pause between two checks for the end of the attempt. At each check, `state.json` is written if it has changed."""
PARENT_POLL_SECONDS = 1.0
SAMPLE_SECONDS = 15.0
UPLOAD_SECONDS = 60.0
UPLOAD_BYTES = 4 * 1024 * 1024
"""The file with the samples is always uploaded as a whole. The time between two uploads therefore grows by `UPLOAD_SECONDS` for each `UPLOAD_BYTES` of
the file."""
NICENESS = 10
"""This number is added to the niceness of this process, so that the ranks have priority on the CPU."""


class TrackerState(WireModel):
    """The state of one tracker."""

    address: str | None = Field(default=None, description="Address or id of the run in the tracker.")
    sent: int = Field(default=0, description="Number of events that this attempt has sent.")
    has_ended: bool = Field(default=False, description="Whether all events were sent, including the end of the attempt.")
    reason: Reason | None = Field(default=None, description="Kind of the current problem. None if events can be sent.")
    problem: str | None = Field(default=None, description="Why events cannot be sent at present. None if events can be sent.")


class TrackingState(WireModel):
    """The contents of `state.json` and of `run/trackers.json`, its copy in storage."""

    trackers: dict[str, TrackerState] = {}


@dataclass(frozen=True)
class RunStorage:
    """Stores files of trackers, unless a later attempt has begun."""

    store: Store
    attempt: int

    def put_file(self, path: Path, key: str) -> None:
        """Store a file, unless a later attempt has begun. Errors: those of storage."""
        if not CheckpointTree(self.store).is_superseded(self.attempt):
            self.store.put_file(path, key)


class SystemMetrics:
    """Samples the usage of CPU, memory and GPUs, and stores all samples of the run as `metrics/system_metrics.jsonl`."""

    def __init__(self, path: Path, run: TrackedRun, storage: RunStorage) -> None:
        self._path, self._run, self._storage = path, run, storage
        self._sampler = SystemSampler()
        self._key = join_key(Storage.METRICS, SYSTEM_METRICS_FILE)
        self._next_sample_time = self._next_upload_time = time.monotonic()
        if not path.exists():
            with replace_file(path) as partial_file:
                partial_file.write_bytes(storage.store.get(self._key) or b"")

    def sample_and_upload_if_due(self) -> None:
        """Take a sample if `SAMPLE_SECONDS` have passed, and upload the file of samples if its next upload is due."""
        now = time.monotonic()
        if now >= self._next_sample_time:
            self._next_sample_time = now + SAMPLE_SECONDS
            self._sample()
        if now >= self._next_upload_time:
            self._next_upload_time = now + UPLOAD_SECONDS * (1 + self._path.stat().st_size // UPLOAD_BYTES)
            self.upload()

    def _sample(self) -> None:
        unix_time = time.time()
        seconds = int(unix_time - self._run.started_at.timestamp())
        append_events(self._path, [SystemEvent(time=round(unix_time, 3), seconds=seconds, values=self._sampler.sample())])

    def upload(self) -> None:
        """Store the file with all samples. An error is only logged, because the next upload contains the same samples."""
        try:
            self._storage.put_file(self._path, self._key)
        except Exception as error:
            logging.warning("the system metrics were not stored: %s", type(error).__name__)


def build_trackers(config: RunConfig, run: TrackedRun, folder: Path, storage: RunStorage) -> list[Tracker]:
    """Return the trackers of `tracking.reportTo`. The library of a tracker is imported when the tracker is opened."""
    from finetune_trainer.trackers.mlflow import Mlflow
    from finetune_trainer.trackers.mongodb import Mongodb
    from finetune_trainer.trackers.tensorboard import TensorBoard
    from finetune_trainer.trackers.wandb import Wandb

    tracking = config.spec.tracking
    trackers: list[Tracker] = []
    for name in tracking.report_to or []:
        match name:
            case TrackerName.TENSORBOARD:
                trackers.append(TensorBoard(run, folder / "tensorboard", storage))
            case TrackerName.MLFLOW:
                mlflow = tracking.mlflow
                trackers.append(Mlflow(run, (mlflow and mlflow.tracking_uri) or "", mlflow.experiment_name if mlflow else None))
            case TrackerName.WANDB:
                wandb = tracking.wandb
                options = {"project": wandb.project if wandb else None, "entity": wandb.entity if wandb else None}
                trackers.append(Wandb(run, folder / "wandb", storage, system_metrics=bool(tracking.system_metrics), **options))
            case TrackerName.MONGODB:
                trackers.append(Mongodb(run, os.environ.get(MONGODB_URI, ""), tracking.mongodb.database if tracking.mongodb else None))
    return trackers


def main(arguments: list[str]) -> int:
    """Run the process, and return its exit code. `arguments`: the folder with the task."""
    _end_with_supervisor(os.getppid())
    os.nice(NICENESS)
    configure_logging("tracker", logging.WARNING)
    folder = Path(arguments[0])
    config, _ = load_run(Settings.from_env())
    run = TrackedRun.model_validate_json((folder / TASK_FILE).read_text())
    storage = RunStorage(open_store(config.storage), run.attempt)
    system_metrics = SystemMetrics(folder / SYSTEM_METRICS_FILE, run, storage) if config.spec.tracking.system_metrics else None
    event_files = [folder / EVENTS_FILE, *([folder / SYSTEM_METRICS_FILE] if system_metrics else [])]
    senders = [Sender(tracker, event_files) for tracker in build_trackers(config, run, folder, storage)]
    _send_all(senders, system_metrics, folder, storage)
    return 0


def _end_with_supervisor(supervisor_pid: int) -> None:
    """Start a thread that ends this process when the supervisor ends.

    PR_SET_PDEATHSIG cannot be used: the kernel sends this signal as soon as the thread that started this process ends, even if the
    supervisor still runs.
    """

    def watch() -> None:
        while os.getppid() == supervisor_pid:
            time.sleep(PARENT_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _send_all(senders: list[Sender], system_metrics: SystemMetrics | None, folder: Path, storage: RunStorage) -> None:
    """Run the senders until each of them has sent the end event. Until the attempt ends, take samples of the pod's CPU, memory and GPU usage too."""
    is_ending = threading.Event()
    threads = [threading.Thread(target=sender.run, args=(is_ending,), name=sender.tracker.name, daemon=True) for sender in senders]
    for thread in threads:
        thread.start()
    written_state = TrackingState()
    while not is_ending.is_set() or any(thread.is_alive() for thread in threads):
        if not is_ending.is_set() and (folder / ENDING_FILE).exists():
            is_ending.set()
        if system_metrics is not None and not is_ending.is_set():
            system_metrics.sample_and_upload_if_due()
        written_state = _write_state(senders, folder, written_state)
        is_ending.wait(TICK_SECONDS) if not is_ending.is_set() else threading.Event().wait(TICK_SECONDS)
    if system_metrics is not None:
        system_metrics.upload()
    _write_state(senders, folder, written_state)
    _store_state(folder, storage)


def _write_state(senders: list[Sender], folder: Path, state_before: TrackingState) -> TrackingState:
    """Return the current state, and write it to `state.json` if it differs from `state_before`, the last written state."""
    state = TrackingState(trackers={sender.tracker.name: _build_tracker_state(sender) for sender in senders})
    if state != state_before:
        with replace_file(folder / STATE_FILE) as partial_file:
            partial_file.write_text(state.model_dump_json(by_alias=True))
    return state


def _build_tracker_state(sender: Sender) -> TrackerState:
    problem = sender.problem
    return TrackerState(
        address=sender.tracker.run_address, sent=sender.sent, has_ended=sender.has_ended,
        reason=problem.reason if problem else None, problem=problem.message if problem else None,
    )  # fmt: skip


def _store_state(folder: Path, storage: RunStorage) -> None:
    """Store `state.json`, in which users find the address of the run in each tracker."""
    try:
        storage.put_file(folder / STATE_FILE, STATE_KEY)
    except Exception as error:
        logging.warning("%s was not stored: %s", STATE_KEY, type(error).__name__)
