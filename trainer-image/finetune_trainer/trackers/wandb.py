"""Sends a run to Weights & Biases, or writes its files below `tracking/wandb/` if `WANDB_MODE` is offline.

The id of the run is the FineTuneJob's uid, so another attempt continues the run. W&B accepts steps only in increasing order, and joins all values of
one step into one row. With a server, the server returns the step from which a resumed run continues. Without a server (offline), each attempt writes
the whole run again, and the user uploads the files with `wandb sync`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_api.names import Reason

from finetune_trainer.trackers.base import (
    FileStorage,
    TrackedRun,
    TrackerError,
    build_connection_error,
    build_rejected_credentials_error,
    logged_values,
)
from finetune_trainer.trackers.events import ArtifactEvent, DataEvent, EndEvent, Event, LogEvent, PhaseEvent, RunEnd

STORAGE_FOLDER = "tracking/wandb"
OFFLINE_MODES = ("offline", "dryrun")
CONNECT_SECONDS = 60
GROWTH_BEFORE_UPLOAD = 1.5
"""A file is stored again only after it has grown by this factor, because each upload contains the whole file."""
DEFAULT_URL = "https://api.wandb.ai"


def is_offline(environment: Mapping[str, str]) -> bool:
    """Whether `WANDB_MODE` says that W&B writes files instead of sending values to a server. `environment`: the variables of `placement.env`."""
    return environment.get("WANDB_MODE") in OFFLINE_MODES


class Wandb:
    """Writes one run to Weights & Biases."""

    name = "wandb"

    def __init__(
        self, run: TrackedRun, folder: Path, storage: FileStorage, *, project: str | None, entity: str | None, system_metrics: bool,
    ) -> None:  # fmt: skip
        self._run, self._folder, self._storage = run, folder, storage
        self._project, self._entity, self._sends_system_metrics = project or run.project, entity, system_metrics
        self._is_offline = is_offline(os.environ)
        self._remote_run: Any = None
        self._first_step = 0
        self._stored_bytes = 0
        self._is_finished = False

    @property
    def run_address(self) -> str | None:
        if self._is_offline:
            return f"{self._run.storage_uri}/{STORAGE_FOLDER}"
        return getattr(self._remote_run, "url", None)

    def open(self) -> None:
        """Create or continue the run. Only the first call does this, because W&B's library repeats failed requests by itself."""
        import wandb

        if self._remote_run is not None:
            return
        if self._is_offline:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._remote_run = wandb.init(
            project=self._project, entity=self._entity, id=self._run.uid, name=self._run.name, dir=self._folder,
            mode="offline" if self._is_offline else "online", resume=None if self._is_offline else "allow",
            config={"parameters": self._run.parameters, **{name.replace(".", "_"): value for name, value in self._run.tags.items()}},
            allow_val_change=True, save_code=False,
            settings=wandb.Settings(
                console="off", disable_git=True, init_timeout=CONNECT_SECONDS, silent=True, x_disable_stats=not self._sends_system_metrics,
                x_disable_meta=True, x_save_requirements=False,
            ),
        )  # fmt: skip
        self._first_step = 0 if self._is_offline else int(self._remote_run.step)

    def send(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case LogEvent(entry=entry) if entry.step >= self._first_step:
                    self._remote_run.log(logged_values(entry), step=entry.step)
                case PhaseEvent(values=values) if values:
                    for name, value in values.items():
                        self._remote_run.summary[f"{event.phase}/{name}"] = value
                case DataEvent(sources=sources):
                    self._remote_run.config.update({"data": [source.model_dump() for source in sources]}, allow_val_change=True)
                case ArtifactEvent():
                    self._remote_run.summary[f"artifact/{event.name}"] = event.uri
                case EndEvent():
                    self._finish(event.end)

    def _finish(self, end: RunEnd) -> None:
        import wandb

        if end is RunEnd.INTERRUPTED and not self._is_offline:
            self._remote_run.mark_preempting()  # W&B then shows the run as preempted instead of failed.
        self._remote_run.finish(exit_code=0 if end is RunEnd.FINISHED or (end is RunEnd.INTERRUPTED and self._is_offline) else 1)
        wandb.teardown()  # After `finish`, a process of the library still writes the file. This call waits until the process has ended.
        self._is_finished = True

    def flush(self) -> None:
        """Store the file of an offline run at the end of the run, or if the file has grown by half. The name of the file is the same in all attempts."""
        if not self._is_offline:
            return
        for path in self._folder.glob("wandb/offline-run-*/run-*.wandb"):
            file_size = path.stat().st_size
            if self._is_finished or file_size > GROWTH_BEFORE_UPLOAD * self._stored_bytes:
                self._storage.put_file(path, f"{STORAGE_FOLDER}/offline-run-{self._run.started_at:%Y%m%d_%H%M%S}-{self._run.uid}/{path.name}")
                self._stored_bytes = file_size

    def explain(self, error: Exception) -> TrackerError:
        from wandb.errors import AuthenticationError, UsageError

        url = os.environ.get("WANDB_BASE_URL", DEFAULT_URL)
        if self._is_offline:
            return TrackerError(Reason.TRACKER_FAILED, f"wandb: the files of the run could not be stored: {type(error).__name__}")
        error_text = str(error).lower()
        if isinstance(error, AuthenticationError) or any(word in error_text for word in ("api_key", "api key", "401", "403", "permission denied")):
            return build_rejected_credentials_error(self.name, url, "check the API key in the Secret of tracking.wandb.apiKeySecretRef")
        if isinstance(error, UsageError):
            return TrackerError(Reason.TRACKER_FAILED, "wandb refused the run; check tracking.wandb.project and tracking.wandb.entity")
        return build_connection_error(self.name, url, error)
