"""Starts the tracker process, passes the events of the run to it, and reports its problems.

The tracker process sends the run to experiment trackers. Its problems never delay training and never end a run. If the tracker process crashes, it
is started again, at most `MAX_RESTARTS` times. Only rank 0's pod tracks the run.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from finetune_api.lineage import remove_secrets
from finetune_api.names import HUB_TOKEN, JUDGE_KEY, Env, ExitCode, Reason, Storage
from finetune_api.pod import RunConfig
from finetune_api.sources import redact_source
from finetune_api.status import EvaluationResult, Output
from pydantic import ValidationError

from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import RestoreResult
from finetune_trainer.processes import ChildProcess, spare_process
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.results.run_names import build_run_name
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor.exit_decision import ExitDecision
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.trackers.base import TrackedRun
from finetune_trainer.trackers.events import (
    ArtifactEvent,
    DataEvent,
    DataSource,
    EndEvent,
    Event,
    LogEvent,
    PhaseEvent,
    RunEnd,
    TrackedPhase,
    append_events,
)
from finetune_trainer.trackers.process import (
    ENDING_FILE,
    EVENTS_FILE,
    STATE_FILE,
    TASK_FILE,
    TrackerState,
    TrackingState,
)

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
MAX_RESTARTS = 3
RESTART_PAUSE_SECONDS = 5.0
END_TIMEOUT_SECONDS = 120.0
"""Maximum wait for trackers at the end of an attempt, if no tracker has a problem."""
PROBLEM_TIMEOUT_SECONDS = 30.0
"""Maximum wait for trackers at the end of an attempt if a tracker has a problem."""
STOP_TIMEOUT_SECONDS = 5.0
"""Maximum wait for trackers after a stop request. The wait is short, because the next attempt sends the remaining values, or because a user waits at
the terminal after Ctrl-C."""
UNTRACKED_SPEC_FIELDS = ("placement", "storage", "policy")
"""Top-level fields of the spec that are not sent as parameters of the run, for example because `placement.env` may contain secrets."""
UNNEEDED_CREDENTIAL_VARIABLES = (JUDGE_KEY, HUB_TOKEN, Env.HF_TOKEN)
"""Environment variables with credentials that the tracker process does not need."""
TRACKER_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "DO_NOT_TRACK": "true",
}  # fmt: skip
WRITABLE_FOLDER_VARIABLES = ("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")
"""Environment variables that name the folders to which libraries write. These variables are set because the pod's root file system is read-only."""


def is_tracked(run: RunConfig, node_rank: int) -> bool:
    """Whether this pod sends values to trackers or records system metrics."""
    return node_rank == 0 and bool(run.spec.tracking.report_to or run.spec.tracking.system_metrics)


class RunTracking:
    """Tracks one attempt. Events before `start` are dropped. If the job has neither trackers nor system metrics, all events are dropped."""

    def __init__(self, run: RunConfig, settings: Settings, run_state: RunState) -> None:
        self._run, self._settings, self._state = run, settings, run_state
        self._is_enabled = is_tracked(run, settings.node_rank)
        self._folder = settings.work_folder / "tracking"
        self._lock = threading.Lock()
        self._process: ChildProcess | None = None
        self._monitor: threading.Thread | None = None
        self._is_ending = threading.Event()
        self._training_start_time: float | None = None
        self._last_step = 0

    def start(self, started_at: datetime, past_entries: Sequence[LogEntry], *, resumed_from_step: int | None) -> None:
        """Start the tracker process. `started_at`: when the first attempt started. `past_entries`: the log lines of earlier attempts.

        `resumed_from_step`: the step from which this attempt trains; None if it does not train.
        """
        if not self._is_enabled:
            return
        try:
            self._start(started_at, past_entries, resumed_from_step)
        except Exception as error:
            log.warning("the run is not tracked", exc_info=error)
            self._state.add_note(f"the run is not sent to trackers: {type(error).__name__}")

    def _start(self, started_at: datetime, past_entries: Sequence[LogEntry], resumed_from_step: int | None) -> None:
        self._last_step = past_entries[-1].step if past_entries else 0
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        task = describe_tracked_run(self._run, started_at, resumed_from_step=resumed_from_step)
        (self._folder / TASK_FILE).write_text(task.model_dump_json())
        append_events(self._folder / EVENTS_FILE, (LogEvent(entry=entry) for entry in past_entries))
        self._process = self._start_process()
        self._monitor = threading.Thread(target=self._watch, name="tracking", daemon=True)
        self._monitor.start()

    # ---- events ----

    def record_events(self, *events: Event) -> None:
        """Pass events to the tracker process, if it was started and the attempt has not ended."""
        if self._process is None or self._is_ending.is_set():
            return
        with self._lock:
            try:
                append_events(self._folder / EVENTS_FILE, events)
            except OSError as error:  # For example, the disk is full.
                self._state.set_tracker_problem(f"{Reason.TRACKER_FAILED}: a value was not recorded for trackers: {error.strerror}")

    def record_log_line(self, step: int, values: dict[str, Any]) -> None:
        """Pass a log line to the tracker process."""
        self._last_step = step
        self.record_events(LogEvent(entry=LogEntry.model_validate({"step": step, **values})))

    def record_training(self, facts: RunFacts) -> None:
        """Pass the data sets and the start of training to the tracker process."""
        self._training_start_time = time.time()
        self.record_events(DataEvent(sources=list_data_sources(self._run, facts)), PhaseEvent(phase=TrackedPhase.TRAIN, start_time=self._training_start_time))

    def record_model(self, output: Output) -> None:
        """Pass the address of the committed model and the end of training to the tracker process."""
        self.record_events(ArtifactEvent(name="model", uri=output.uri or "", sha256=output.sha256))
        if self._training_start_time is not None:
            self.record_events(
                PhaseEvent(phase=TrackedPhase.TRAIN, start_time=self._training_start_time, end_time=time.time(), end=RunEnd.FINISHED, step=self._last_step)
            )

    def record_evaluation(self, evaluation: EvaluationResult | None, start_time: float) -> None:
        """Pass the results of the stages after training to the tracker process."""
        if evaluation is None:
            return
        metric_values = {name: metric.value for name, metric in (evaluation.metrics or {}).items() if metric.value is not None}
        end_fields: dict[str, Any] = {"start_time": start_time, "end_time": time.time(), "end": RunEnd.FINISHED, "step": self._last_step}
        if self._run.spec.phases.infer:
            self.record_events(PhaseEvent(phase=TrackedPhase.INFER, **end_fields))
        if metric_values:
            self.record_events(PhaseEvent(phase=TrackedPhase.EVALUATE, values=metric_values, **end_fields))
        self.record_events(ArtifactEvent(name="evaluation", uri=f"{self._run.storage.uri}/{Storage.EVALUATION}"))

    # ---- end ----

    def finish(self, decision: ExitDecision, *, is_ended_by_user: bool, get_latest_end: Callable[[], float]) -> None:
        """Pass the end of the attempt to the tracker process, and wait until it has sent all events. If values were not sent, add a note.

        `get_latest_end`: returns the monotonic time at which the wait must end. This function is called repeatedly, because the pod can be stopped
        during the wait.
        """
        if self._process is None:
            return
        run_end = to_run_end(decision, is_ended_by_user=is_ended_by_user)
        failure_code = decision.failure.error.code if decision.failure is not None else None
        self.record_events(EndEvent(end=run_end, time=time.time(), reason=failure_code))
        self._is_ending.set()
        (self._folder / ENDING_FILE).touch()
        started_at = time.monotonic()
        while self._process.poll() is None and time.monotonic() < min(started_at + self._choose_max_wait_seconds(run_end), get_latest_end()):
            threading.Event().wait(POLL_SECONDS / 4)
        self._process.stop()
        if run_end is not RunEnd.INTERRUPTED:  # After an interruption, the next attempt sends the values that are missing.
            for note in self._list_notes_on_unsent_events():
                self._state.add_note(note)

    def _choose_max_wait_seconds(self, end: RunEnd) -> float:
        if end in (RunEnd.INTERRUPTED, RunEnd.KILLED):
            return STOP_TIMEOUT_SECONDS
        return END_TIMEOUT_SECONDS if self._describe_problems() is None else PROBLEM_TIMEOUT_SECONDS

    def _list_notes_on_unsent_events(self) -> Iterator[str]:
        state_by_tracker = self._read_state().trackers
        for name in self._run.spec.tracking.report_to or []:
            tracker_state = state_by_tracker.get(name, TrackerState())
            if not tracker_state.has_ended:
                cause = tracker_state.problem or f"{name} did not accept all values in time"
                yield f"{cause}; values are missing there, but {self._run.storage.uri}/{Storage.METRICS}/ contains all values"

    # ---- the process ----

    def _start_process(self) -> ChildProcess:
        process = ChildProcess([sys.executable, "-m", "finetune_trainer", "track", str(self._folder)], self._build_environment())
        spare_process(process.pid)
        return process

    def _build_environment(self) -> dict[str, str]:
        """Return the environment of the tracker process.

        The environment contains the credentials of trackers and storage, and makes libraries write only below the folder `tracking`.
        """
        inherited_variables = {name: value for name, value in os.environ.items() if name not in UNNEEDED_CREDENTIAL_VARIABLES}
        home_folder = str(self._folder / "home")
        return {
            **TRACKER_ENVIRONMENT, **inherited_variables, **dict.fromkeys(WRITABLE_FOLDER_VARIABLES, home_folder), "OMP_NUM_THREADS": "1",
            Env.RUN_FILE: str(self._settings.run_file), Env.WORK_DIR: str(self._settings.work_folder),
        }  # fmt: skip

    def _watch(self) -> None:
        """Report problems of trackers, and start the tracker process again if it has ended."""
        restart_count = 0
        while not self._is_ending.wait(POLL_SECONDS):
            self._state.set_tracker_problem(self._describe_problems())
            if self._process is None or self._process.poll() is None:
                continue
            if restart_count == MAX_RESTARTS:
                self._state.set_tracker_problem(f"{Reason.TRACKER_FAILED}: the tracker process has ended {restart_count + 1} times; see the pod's log")
                return
            restart_count += 1
            log.warning("the tracker process has ended with %s; it is started again", self._process.poll())
            if self._is_ending.wait(RESTART_PAUSE_SECONDS):
                return
            self._process = self._start_process()

    def _describe_problems(self) -> str | None:
        states_with_problem = [state for state in self._read_state().trackers.values() if state.problem is not None]
        if not states_with_problem:
            return None
        return f"{states_with_problem[0].reason}: " + "; ".join(state.problem or "" for state in states_with_problem)

    def _read_state(self) -> TrackingState:
        try:
            return TrackingState.model_validate_json((self._folder / STATE_FILE).read_text())
        except (OSError, ValidationError):
            return TrackingState()


def to_run_end(decision: ExitDecision, *, is_ended_by_user: bool) -> RunEnd:
    """Return how the attempt ended. A requested stop is not a failure, because another attempt continues the run."""
    if decision.exit_code == ExitCode.OK:
        return RunEnd.FINISHED
    if decision.failure is not None:
        return RunEnd.FAILED
    return RunEnd.KILLED if is_ended_by_user else RunEnd.INTERRUPTED


def describe_tracked_run(run: RunConfig, started_at: datetime, *, resumed_from_step: int | None = None) -> TrackedRun:
    """Return the description of the run that trackers get."""
    spec = run.spec
    return TrackedRun(
        name=build_run_name(spec.output.run_name, job_name=run.name, started_at=started_at), project=spec.output.project or run.namespace,
        namespace=run.namespace, job=run.name, uid=run.uid, attempt=run.attempt, model=redact_source(spec.model.source or ""),
        storage_uri=run.storage.uri, started_at=started_at, resumed_from_step=resumed_from_step, parameters=flatten_parameters(run),
    )  # fmt: skip


def flatten_parameters(run: RunConfig) -> dict[str, str]:
    """Return the values of the spec with all defaults, by path. Secrets and names of Secrets are left out."""
    spec, _ = remove_secrets({name: value for name, value in run.spec.to_wire().items() if name not in UNTRACKED_SPEC_FIELDS})
    return dict(sorted(_flatten(spec)))


def _flatten(value: Any, spec_path: str = "") -> Iterator[tuple[str, str]]:
    match value:
        case dict():
            for name, child in value.items():
                if not name.endswith("SecretRef"):
                    yield from _flatten(child, f"{spec_path}.{name}" if spec_path else name)
        case str():
            yield spec_path, value
        case _:
            yield spec_path, json.dumps(value, ensure_ascii=False)


def list_data_sources(run: RunConfig, facts: RunFacts) -> tuple[DataSource, ...]:
    """Return the sources of training, validation and test data, with their digests."""
    dataset_spec = run.spec.dataset
    training_sources = [dataset_spec.train, *(item.source for item in dataset_spec.mixture or [])]
    sources = [DataSource(context="training", source=redact_source(source), digest=facts.dataset_digest) for source in training_sources if source]
    for context, source, input_name in (("validation", dataset_spec.validation, "validation data"), ("testing", dataset_spec.test, "test data")):
        if source:
            sources.append(DataSource(context=context, source=redact_source(source), digest=facts.other_inputs.get(input_name, "")))
    return tuple(sources)


def read_checkpoint_log(restore_result: RestoreResult) -> list[LogEntry]:
    """Return the log lines of all attempts up to the restored checkpoint. The Trainer's state in the checkpoint contains these lines."""
    if restore_result.local_folder is None:
        return []
    try:
        history = json.loads((restore_result.local_folder / "trainer_state.json").read_text())["log_history"]
        return [LogEntry.model_validate(line) for line in history]
    except (OSError, ValueError, KeyError):
        log.warning("the log lines in the restored checkpoint cannot be read")
        return []


def parse_log(data: bytes | None) -> list[LogEntry]:
    """Return the log lines in the content of `log.jsonl`."""
    return [LogEntry.from_json(line) for line in (data or b"").decode().splitlines()]

