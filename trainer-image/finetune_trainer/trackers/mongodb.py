"""Writes a run to MongoDB: one document per job to `training_runs`, one per log entry to `step_metrics`, one per phase to `final_metrics`.

The id of each document is computed from the job, step or phase that it describes, so a document that is sent again replaces its first copy. When an
attempt begins, the documents of the steps that the attempt will repeat are removed. Log entries are sent in order, so entries up to the newest stored
entry are skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from finetune_api.names import Reason

from finetune_trainer.results.log_entry import LineKind
from finetune_trainer.trackers.base import (
    TrackedRun,
    TrackerError,
    build_connection_error,
    build_rejected_credentials_error,
    logged_values,
)
from finetune_trainer.trackers.events import (
    ArtifactEvent,
    DataEvent,
    EndEvent,
    Event,
    LogEvent,
    PhaseEvent,
    RunEnd,
    SystemEvent,
)

TIMEOUT_MILLISECONDS = 5000
MAX_DOCUMENTS_PER_REQUEST = 50
AUTHENTICATION_CODES = (13, 18)
"""MongoDB's error codes for missing permission and failed authentication."""
STATUS_BY_RUN_END = {
    RunEnd.FINISHED: "completed", RunEnd.FAILED: "failed", RunEnd.KILLED: "killed", RunEnd.INTERRUPTED: "interrupted",
}  # fmt: skip
DEFAULT_DATABASE = "finetuning"


class Mongodb:
    """Writes the documents of one run to MongoDB."""

    name = "mongodb"

    def __init__(self, run: TrackedRun, uri: str, database: str | None) -> None:
        self._run, self._uri, self._database_name = run, uri, database or DEFAULT_DATABASE
        self._client: Any = None
        self._has_removed_repeated_steps = False
        self._last_step_by_kind: dict[str, int] = {}

    @property
    def run_address(self) -> str | None:
        return f"{self._database_name}.training_runs/{self._run.uid}"

    def open(self) -> None:
        from pymongo import MongoClient

        if self._client is not None:
            self._client.close()
        self._client = MongoClient(
            self._uri, serverSelectionTimeoutMS=TIMEOUT_MILLISECONDS, connectTimeoutMS=TIMEOUT_MILLISECONDS, socketTimeoutMS=4 * TIMEOUT_MILLISECONDS,
            appname="finetune-trainer",
        )  # fmt: skip
        run = self._run
        self._update_run(
            {
                **self._build_identifying_fields(), "namespace": run.namespace, "name": run.job, "attempt": run.attempt, "status": "running",
                "started_at": run.started_at, "storage_uri": run.storage_uri, "parameters": _replace_dots(run.parameters),
            }
        )  # fmt: skip
        if not self._has_removed_repeated_steps and run.resumed_from_step is not None:
            self._get_collection("step_metrics").delete_many({"run_id": run.uid, "step": {"$gt": run.resumed_from_step}})
            self._has_removed_repeated_steps = True
        self._last_step_by_kind = {kind: self._read_newest_step(kind) for kind in LineKind}

    def _read_newest_step(self, kind: LineKind) -> int:
        """Return the largest step of the stored log entries of a kind, or -1 if no entry is stored."""
        newest_document = self._get_collection("step_metrics").find_one({"run_id": self._run.uid, "kind": str(kind)}, sort=[("step", -1)])
        return -1 if newest_document is None else int(newest_document["step"])

    def send(self, events: Sequence[Event]) -> None:
        documents_by_collection: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            match event:
                case LogEvent(entry=entry) if entry.step > self._last_step_by_kind.get(entry.kind, -1):
                    values = _replace_dots(logged_values(entry))
                    document = {"_id": f"{self._run.uid}:{entry.step}:{entry.kind}", "step": entry.step, "kind": str(entry.kind), **values}
                    documents_by_collection.setdefault("step_metrics", []).append(document | {"timestamp": _to_datetime(entry.unix_time)})
                case SystemEvent():
                    document = {"_id": f"{self._run.uid}:{event.seconds}", "seconds": event.seconds, **_replace_dots(event.values)}
                    documents_by_collection.setdefault("system_metrics", []).append(document | {"timestamp": _to_datetime(event.time)})
                case PhaseEvent(values=values) if values:
                    document = {"_id": f"{self._run.uid}:{event.phase}", "phase": str(event.phase), "step": event.step, **_replace_dots(values)}
                    documents_by_collection.setdefault("final_metrics", []).append(document | {"timestamp": _to_datetime(event.end_time)})
                case DataEvent(sources=sources):
                    self._update_run({"data": [source.model_dump() for source in sources]})
                case ArtifactEvent():
                    self._update_run({f"artifacts.{event.name}": {"uri": event.uri, "sha256": event.sha256}})
                case EndEvent():
                    self._write(documents_by_collection)
                    self._update_run({"status": STATUS_BY_RUN_END[event.end], "ended_at": _to_datetime(event.time), "failure": event.reason})
        self._write(documents_by_collection)

    def flush(self) -> None:
        """Do nothing, because nothing is buffered."""

    def explain(self, error: Exception) -> TrackerError:
        from pymongo.errors import ConfigurationError, InvalidURI, OperationFailure

        address = self._uri.replace("mongodb+srv://", "mongodb://")
        if isinstance(error, OperationFailure):
            if error.code in AUTHENTICATION_CODES:
                return build_rejected_credentials_error(self.name, address, "check the user and password in the Secret of tracking.mongodb.uriSecretRef")
            return TrackerError(Reason.TRACKER_FAILED, f"mongodb refused an operation with the error code {error.code}")
        if isinstance(error, InvalidURI | ConfigurationError):
            return TrackerError(
                Reason.TRACKER_FAILED, "mongodb: the Secret of tracking.mongodb.uriSecretRef does not contain a valid connection URI"
            )
        return build_connection_error(self.name, address, error)

    def _build_identifying_fields(self) -> dict[str, Any]:
        return {"run_id": self._run.uid, "run_name": self._run.name, "project": self._run.project, "model": self._run.model}

    def _get_collection(self, name: str) -> Any:
        return self._client[self._database_name][name]

    def _update_run(self, values: dict[str, Any]) -> None:
        self._get_collection("training_runs").update_one({"_id": self._run.uid}, {"$set": values}, upsert=True)

    def _write(self, documents_by_collection: dict[str, list[dict[str, Any]]]) -> None:
        from pymongo import ReplaceOne

        for collection_name in list(documents_by_collection):
            requests = [
                ReplaceOne({"_id": document["_id"]}, self._build_identifying_fields() | document, upsert=True)
                for document in documents_by_collection.pop(collection_name)
            ]
            for start in range(0, len(requests), MAX_DOCUMENTS_PER_REQUEST):
                self._get_collection(collection_name).bulk_write(requests[start : start + MAX_DOCUMENTS_PER_REQUEST], ordered=True)


def _to_datetime(unix_time: float | None) -> datetime | None:
    return None if unix_time is None else datetime.fromtimestamp(unix_time, UTC)


def _replace_dots(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values under names without dots and dollar signs, which have a special meaning in MongoDB."""
    return {name.replace(".", "_").replace("$", "_"): value for name, value in values.items()}
