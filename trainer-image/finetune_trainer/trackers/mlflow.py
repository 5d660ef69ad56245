"""Sends a run to an MLflow server: a parent run for the job, and a child run for each phase.

Another attempt finds these runs by the tag with the FineTuneJob's uid, and continues them. It finds them even if the server's answer to the create
request was lost. MLflow keeps every value that it receives, even a second value of the same step. The tracker therefore first asks the server for the
newest step of each metric, and sends only values of later steps. If a resumed attempt repeats a step, MLflow keeps the value of the earlier attempt.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.names import Reason

from finetune_trainer.addresses import refuse_metadata_address
from finetune_trainer.results.log_entry import LineKind, LogEntry
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
    TrackedPhase,
)

MAX_METRICS_PER_REQUEST = 500
MAX_PARAMETERS_PER_REQUEST = 100
MAX_PARAMETER_LENGTH = 500
MAX_DIGEST_LENGTH = 36
REDIRECTS_VARIABLE = "MLFLOW_ALLOW_HTTP_REDIRECTS"
PARENT_RUN_PART = "job"
"""Value of the tag `finetune.part` of the parent run. Child runs have the name of their phase."""
RUN_NAME_SUFFIXES = {TrackedPhase.TRAIN: "_finetuning", TrackedPhase.INFER: "_inferencing", TrackedPhase.EVALUATE: "_evaluation"}
"""Suffixes of the names of child runs."""
STATUS_BY_RUN_END = {RunEnd.FINISHED: "FINISHED", RunEnd.FAILED: "FAILED", RunEnd.KILLED: "KILLED", RunEnd.INTERRUPTED: "SCHEDULED"}
"""The status that MLflow shows for a run after an attempt has ended. SCHEDULED means that the job waits for its next attempt."""
ENDED_STATUSES = ("FINISHED", "FAILED", "KILLED")


class _RemoteRun:
    """One run on the server, with the newest step of each metric."""

    def __init__(self, run: Any) -> None:
        self.id = run.info.run_id
        self.status = run.info.status
        self.parameters = dict(run.data.params)
        self.last_step_by_metric = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}


class Mlflow:
    """The runs of one job on an MLflow server."""

    name = "mlflow"

    def __init__(self, run: TrackedRun, tracking_uri: str, experiment: str | None) -> None:
        self._run, self._uri, self._experiment_name = run, tracking_uri, experiment or run.project
        self._client: Any = None
        self._experiment_id = ""
        self._runs: dict[str, _RemoteRun] = {}

    @property
    def run_address(self) -> str | None:
        parent_run = self._runs.get(PARENT_RUN_PART)
        return None if parent_run is None else f"{self._uri.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{parent_run.id}"

    def open(self) -> None:
        try:
            refuse_metadata_address(self._uri, "tracking.mlflow.trackingUri")
        except ConfigError as error:
            raise TrackerError(Reason.TRACKER_FAILED, error.message) from error
        os.environ[REDIRECTS_VARIABLE] = "false"  # a redirect could lead to a metadata address
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        self._runs = {}
        self._experiment_id = self._find_or_create_experiment()
        parent_run = self._find_or_create_run(PARENT_RUN_PART, self._run.name, self._run.started_at.timestamp())
        self._log_parameters(parent_run)
        self._log_tags(parent_run, self._run.tags)
        self._set_running(parent_run)

    def send(self, events: Sequence[Event]) -> None:
        metrics: dict[str, list[Any]] = {}
        for event in events:
            match event:
                case LogEvent(entry=entry):
                    self._add_new_metrics(metrics, TrackedPhase.TRAIN, logged_values(entry), entry.step, entry.unix_time)
                    if entry.kind is LineKind.SUMMARY:
                        self._add_new_metrics(metrics, PARENT_RUN_PART, _build_summary_values(entry), entry.step, entry.unix_time)
                case SystemEvent():
                    self._add_new_metrics(metrics, PARENT_RUN_PART, event.values, event.seconds, event.time)
                case PhaseEvent():
                    self._send_phase(event, metrics)
                case DataEvent():
                    self._send_data(event)
                case ArtifactEvent():
                    self._log_tags(self._runs[PARENT_RUN_PART], {f"artifact.{event.name}": event.uri})
                case EndEvent():
                    self._send_metrics(metrics)
                    self._end_runs(event)
        self._send_metrics(metrics)

    def flush(self) -> None:
        """Do nothing, because nothing is buffered."""

    def explain(self, error: Exception) -> TrackerError:
        from mlflow.exceptions import MlflowException

        if isinstance(error, MlflowException):
            status = error.get_http_status_code()
            error_text = str(error)
            if status in (401, 403) or re.search(r"\b(401|403)\b|[Uu]nauthori[sz]ed|PERMISSION_DENIED", error_text):
                hint = "check the variables MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in placement.env"
                return build_rejected_credentials_error(self.name, self._uri, hint)
            if "API request to" not in error_text and status < 500:
                return TrackerError(Reason.TRACKER_FAILED, f"mlflow refused a request with the error {error.error_code}")
        return build_connection_error(self.name, self._uri, error)

    # ---- runs ----

    def _find_or_create_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self._experiment_name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(self._experiment_name))
            except MlflowException as error:  # Another job may have created the experiment after the search.
                experiment = self._client.get_experiment_by_name(self._experiment_name)
                if experiment is None:
                    raise error
        return str(experiment.experiment_id)

    def _find_or_create_run(self, part: str, name: str, start_time: float) -> _RemoteRun:
        search_filter = f"tags.`finetune.uid` = '{self._run.uid}' and tags.`finetune.part` = '{part}'"
        existing_runs = self._client.search_runs([self._experiment_id], filter_string=search_filter, max_results=1)
        if existing_runs:
            remote_run = _RemoteRun(existing_runs[0])
        else:
            tags = {**self._run.tags, "finetune.part": part, "mlflow.user": self._run.namespace}
            if part != PARENT_RUN_PART:
                tags["mlflow.parentRunId"] = self._runs[PARENT_RUN_PART].id
            remote_run = _RemoteRun(self._client.create_run(self._experiment_id, start_time=int(start_time * 1000), tags=tags, run_name=name))
        self._runs[part] = remote_run
        return remote_run

    def _get_phase_run(self, phase: TrackedPhase, start_time: float | None = None) -> _RemoteRun:
        return self._runs.get(phase) or self._find_or_create_run(phase, self._run.name + RUN_NAME_SUFFIXES[phase], start_time or time.time())

    def _set_running(self, remote_run: _RemoteRun) -> None:
        if remote_run.status != "RUNNING":
            self._client.update_run(remote_run.id, status="RUNNING")
            remote_run.status = "RUNNING"

    def _end_runs(self, event: EndEvent) -> None:
        self._find_started_phases()
        status, end_time = STATUS_BY_RUN_END[event.end], int(event.time * 1000)
        for part, remote_run in self._runs.items():
            if part != PARENT_RUN_PART and remote_run.status in ENDED_STATUSES:
                continue  # This phase ended earlier, so its run keeps its status.
            if event.end is RunEnd.INTERRUPTED:
                self._client.update_run(remote_run.id, status=status)
            else:
                self._client.set_terminated(remote_run.id, status=status, end_time=end_time)
        if event.reason is not None:
            self._log_tags(self._runs[PARENT_RUN_PART], {"finetune.failure": event.reason})
        if event.end is RunEnd.FINISHED:
            seconds = event.time - self._run.started_at.timestamp()
            metrics: dict[str, list[Any]] = {}
            self._add_new_metrics(metrics, PARENT_RUN_PART, {"pipeline_total_duration_seconds": seconds}, 0, event.time)
            self._send_metrics(metrics)

    def _find_started_phases(self) -> None:
        """Search the server for child runs that this process does not know yet."""
        search_filter = f"tags.`finetune.uid` = '{self._run.uid}'"
        for run in self._client.search_runs([self._experiment_id], filter_string=search_filter, max_results=10):
            self._runs.setdefault(run.data.tags.get("finetune.part", PARENT_RUN_PART), _RemoteRun(run))

    # ---- values ----

    def _log_parameters(self, parent_run: _RemoteRun) -> None:
        """Log the parameters. A value that an adaptation has changed is logged as a tag, because MLflow refuses to change a parameter."""
        from mlflow.entities import Param

        values = {_to_mlflow_name(name): value[:MAX_PARAMETER_LENGTH] for name, value in self._run.parameters.items()}
        new_parameters = [Param(name, value) for name, value in values.items() if name not in parent_run.parameters]
        for start in range(0, len(new_parameters), MAX_PARAMETERS_PER_REQUEST):
            self._client.log_batch(parent_run.id, params=new_parameters[start : start + MAX_PARAMETERS_PER_REQUEST])
        changed_values = {name: value for name, value in values.items() if parent_run.parameters.get(name, value) != value}
        self._log_tags(parent_run, {f"attempt-{self._run.attempt}.{name}": value for name, value in changed_values.items()})

    def _log_tags(self, remote_run: _RemoteRun, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self._client.log_batch(remote_run.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def _add_new_metrics(self, metrics: dict[str, list[Any]], part: str, values: dict[str, float], step: int, unix_time: float | None) -> None:
        """Append to `metrics` those values that the server does not have yet."""
        from mlflow.entities import Metric

        remote_run = self._runs[PARENT_RUN_PART] if part == PARENT_RUN_PART else self._get_phase_run(TrackedPhase(part))
        milliseconds = int((unix_time or time.time()) * 1000)
        for name, value in values.items():
            key = _to_mlflow_name(name)
            if step > remote_run.last_step_by_metric.get(key, -1):
                remote_run.last_step_by_metric[key] = step
                metrics.setdefault(part, []).append(Metric(key, value, milliseconds, step))

    def _send_metrics(self, metrics: dict[str, list[Any]]) -> None:
        for part in list(metrics):
            unsent_metrics = metrics.pop(part)
            for start in range(0, len(unsent_metrics), MAX_METRICS_PER_REQUEST):
                self._client.log_batch(self._runs[part].id, metrics=unsent_metrics[start : start + MAX_METRICS_PER_REQUEST])

    def _send_phase(self, event: PhaseEvent, metrics: dict[str, list[Any]]) -> None:
        remote_run = self._get_phase_run(event.phase, event.start_time)
        if event.end_time is None or event.end is None:
            self._set_running(remote_run)
            return
        values = {f"eval_{name}": value for name, value in event.values.items()}
        for part in (event.phase, PARENT_RUN_PART):
            self._add_new_metrics(metrics, part, values, event.step, event.end_time)
        if event.phase is TrackedPhase.TRAIN:
            self._add_new_metrics(metrics, PARENT_RUN_PART, {"finetuning_duration_seconds": event.end_time - event.start_time}, event.step, event.end_time)
        self._send_metrics(metrics)
        self._client.set_terminated(remote_run.id, status=STATUS_BY_RUN_END[event.end], end_time=int(event.end_time * 1000))
        remote_run.status = STATUS_BY_RUN_END[event.end]

    def _send_data(self, event: DataEvent) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset_inputs = [
            DatasetInput(
                Dataset(
                    name=data_source.source[-200:], digest=data_source.digest[:MAX_DIGEST_LENGTH], source_type="uri",
                    source=f'{{"uri": "{data_source.source}"}}',
                ),
                [InputTag("mlflow.data.context", data_source.context)],
            )
            for data_source in event.sources
        ]
        self._client.log_inputs(self._get_phase_run(TrackedPhase.TRAIN).id, datasets=dataset_inputs)


def _build_summary_values(entry: LogEntry) -> dict[str, float]:
    values = logged_values(entry)
    summary_values = {
        "final_training_loss": values.get("train_loss"), "total_training_steps": float(entry.step), "total_epochs": entry.epoch,
    }  # fmt: skip
    return {name: value for name, value in summary_values.items() if value is not None}


def _to_mlflow_name(name: str) -> str:
    """Return the name without characters that MLflow rejects."""
    return re.sub(r"[^\w./ -]", "_", name)

