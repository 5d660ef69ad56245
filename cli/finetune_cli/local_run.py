"""Runs a job on the user's machine: writes the run configuration, starts the trainer and shows the progress."""

from __future__ import annotations

import copy
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.defaults import PlatformDefaults, ResolvedSpec, find_origins, keep_recorded_defaults, resolve_defaults
from finetune_api.names import Env, ExitCode, FailureClass
from finetune_api.pod import ProgressReport, ResumeConfig, RunConfig, StoreTarget, TerminationMessage, World
from finetune_api.rules import ExecutionTarget
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.status import Metrics, Stage
from pydantic import ValidationError

from finetune_cli import output
from finetune_cli.checks import check_manifest, select_errors
from finetune_cli.fields import flatten, with_values
from finetune_cli.files import make_unwritable_file_error
from finetune_cli.local_spec import (
    LocalMachine,
    LocalRunError,
    adapt_spec,
    count_gpus,
    parse_folders,
    require_s3_credentials,
)
from finetune_cli.manifests import Manifest, read_job
from finetune_cli.overrides import attribute_to_option, parse_overrides
from finetune_cli.provenance import AssignedValue
from finetune_cli.status_text import draw_progress_bar

LOCAL_NAMESPACE = "local"
POLL_SECONDS = 0.5
GRACE_SECONDS = 300
CONFIG_MAPS_FOLDER = "config-maps"
"""Folder with the local files that replace ConfigMaps."""


@dataclass(frozen=True)
class LocalRun:
    """A local run that is ready to start: all its files are written."""

    name: str
    config: RunConfig
    config_file: Path
    work_folder: Path
    log_file: Path
    notes: tuple[str, ...]
    config_maps_folder: Path
    """Folder that contains one folder for each ConfigMap."""


def prepare_run(
    file: Path, folder: Path, set_texts: list[str], config_maps: list[str], claim_texts: list[str], *, recorded_defaults: dict[str, Any] | None = None,
) -> LocalRun:  # fmt: skip
    """Read a manifest, adapt the spec to this machine and write the run configuration.

    `recorded_defaults`: the defaults of an earlier run, by spec path. They replace the defaults of this release.

    Raises InvalidInput, CommandError, or CommandExit after printing the errors of the manifest.
    """
    manifest = read_job(file)
    overrides = parse_overrides(set_texts)
    spec = with_values(manifest.spec, {path: assigned.value for path, assigned in overrides.items()})
    _check_spec(manifest, spec, overrides, only_code="ValueInvalid")
    machine = LocalMachine(
        folder.resolve(),
        file.resolve().parent,
        count_gpus(),
        parse_folders("--config-map", config_maps),
        parse_folders("--claim", claim_texts),
    )
    spec = copy.deepcopy(spec)
    notes = adapt_spec(spec, machine)
    checked_spec = _check_spec(manifest, spec, overrides)
    require_s3_credentials(spec)
    resolution = resolve_defaults(checked_spec, platform_defaults=PlatformDefaults(storage=StorageRoot(uri=spec["storage"]["uri"])))
    resolution = keep_recorded_defaults(resolution, recorded_defaults or {})
    try:
        run = _write_run(manifest.name, resolution, folder.resolve(), notes)
        _link_config_maps(run.config_maps_folder, machine.config_maps)
        return run
    except OSError as error:
        raise make_unwritable_file_error(folder, error) from None


def _check_spec(
    manifest: Manifest, spec: dict[str, Any], overrides: dict[str, AssignedValue], only_code: str | None = None
) -> FineTuneJobSpec:
    """Check a manifest with `spec` as its spec, and return the validated spec. Raises CommandExit.

    If `only_code` is given, errors with another code are not reported. If an invalid value comes from `--set`, the error names this option.
    """
    changed_manifest = Manifest(manifest.file, manifest.document_number, {**manifest.value, "spec": spec}, manifest.lines)
    checked_spec, findings = check_manifest(changed_manifest, ExecutionTarget.LOCAL)
    errors = [finding for finding in select_errors(findings) if only_code in (None, finding.code)]
    if errors or checked_spec is None:
        raise output.fail(*(attribute_to_option(finding.mistake, overrides) for finding in errors))
    return checked_spec


# --- the run configuration ------------------------------------------------------------------------------------------


def _write_run(name: str, resolution: ResolvedSpec, output_folder: Path, notes: list[str]) -> LocalRun:
    """Write the run configuration of the next attempt. A run with the same folder and name continues the same job."""
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"file://{output_folder}/{name}"))
    state_folder = output_folder / ".finetune" / name
    state_folder.mkdir(parents=True, exist_ok=True)
    job_folder = output_folder / LOCAL_NAMESPACE / name / uid
    resolution = _continue_job(state_folder / names.RUN_FILE_NAME, resolution, job_folder, name)
    counter_file = state_folder / "attempt"
    counted_attempts = int(counter_file.read_text(encoding="utf-8")) if counter_file.is_file() else 0
    # The attempts in storage are counted too, because the user may have deleted the folder of the attempt counter. This folder also contains
    # downloads, so users delete it to free disk space.
    attempt = max(counted_attempts, find_last_attempt(job_folder)) + 1
    counter_file.write_text(str(attempt), encoding="utf-8")
    spec, defaults = resolution.spec, resolution.defaults
    gpu_count = spec.resources.gpus_per_node or 0
    run = RunConfig(
        name=name,
        namespace=LOCAL_NAMESPACE,
        uid=uid,
        attempt=attempt,
        spec=spec,
        defaults=sorted(defaults),
        origins=find_origins(defaults),
        world=World(
            nodes=1, processes_per_node=spec.resources.processes_per_node or max(1, gpu_count), gpus_per_node=gpu_count,
            master_address="127.0.0.1", master_port=0, rendezvous_id=f"{uid}-{attempt}",
        ),
        storage=StoreTarget(uri=f"file://{job_folder}"),
        publish=f"file://{output_folder}/{spec.output.dir.strip('/')}" if spec.output.dir else None,
        resume=ResumeConfig(mode="auto" if attempt > 1 else spec.checkpoint.resume or "auto"),
        grace_seconds=GRACE_SECONDS,
    )  # fmt: skip
    run_file = state_folder / names.RUN_FILE_NAME
    run_file.write_bytes(run.to_bytes())
    log_file, all_notes = state_folder / f"attempt-{attempt}.log", (*notes, *resolution.notes)
    return LocalRun(name, run, run_file, state_folder / "work", log_file, all_notes, state_folder / CONFIG_MAPS_FOLDER)


def _link_config_maps(folder: Path, config_maps: dict[str, Path]) -> None:
    """For each ConfigMap, create a folder from which the trainer reads, with links to the files in the user's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, user_folder in config_maps.items():
        (folder / name).mkdir(parents=True)
        for file in (path for path in user_folder.iterdir() if path.is_file()):
            (folder / name / file.name).symlink_to(file.resolve())


def find_last_attempt(job_folder: Path) -> int:
    """Return the highest attempt number that the trainer recorded in storage, or 0 without attempts."""
    attempt_numbers = (names.parse_attempt_of_folder(path.name) for path in (job_folder / names.Storage.RUN).glob("*"))
    return max((number for number in attempt_numbers if number is not None), default=0)


def _continue_job(run_file: Path, resolution: ResolvedSpec, job_folder: Path, name: str) -> ResolvedSpec:
    """Return the resolved spec. If the job has earlier attempts with stored results, the returned spec has the defaults of these attempts.

    An earlier release with other defaults may have started the job. Raises LocalRunError if the folder holds results of a job with another spec.
    """
    if not run_file.is_file() or not any(job_folder.rglob(names.Storage.COMMITTED.value)):
        return resolution
    earlier_run = RunConfig.model_validate_json(run_file.read_bytes())
    recorded_defaults = {path: earlier_run.spec.value(path) for path in earlier_run.defaults}
    try:
        resolution = keep_recorded_defaults(resolution, {path: value for path, value in recorded_defaults.items() if value is not None})
    except ValidationError as error:
        raise LocalRunError(f"this release cannot use the defaults recorded in {run_file}: choose another folder with -o") from error
    old_values, new_values = flatten(earlier_run.spec.to_wire()), flatten(resolution.spec.to_wire())
    changed_paths = sorted(path for path in {*old_values, *new_values} if old_values.get(path) != new_values.get(path))
    if changed_paths:
        differences = "; ".join(f"{path} {old_values.get(path, '-')} -> {new_values.get(path, '-')}" for path in changed_paths[:3])
        raise LocalRunError(
            f"{job_folder} holds results of a job {name} with another spec ({differences}): choose another folder with -o, or delete this folder"
        )
    return resolution


# --- the trainer ----------------------------------------------------------------------------------------------------


def run_trainer(run: LocalRun, interpreter_path: str | None, variables: dict[str, str] | None = None) -> int:
    """Run the trainer to its end and return the exit code for `finetune run`. `variables`: further environment variables of the trainer."""
    interpreter = interpreter_path or sys.executable
    require_trainer(interpreter)
    output.print_notes(run.notes)
    output.print_notes([f"log: {run.log_file}"])
    run.work_folder.mkdir(parents=True, exist_ok=True)
    termination_file = run.work_folder / "termination-message.json"
    termination_file.unlink(missing_ok=True)
    port = find_free_port()
    command = [
        interpreter,
        "-m",
        "finetune_trainer",
        "supervise",
        "--run-file",
        str(run.config_file),
        "--work-dir",
        str(run.work_folder),
        "--port",
        str(port),
    ]
    environment = {
        **os.environ,
        **(variables or {}),
        Env.RUN_SHA256.value: RunConfig.sha256(run.config_file.read_bytes()),
        Env.TERMINATION_LOG.value: str(termination_file),
        Env.NODE_NAME.value: socket.gethostname(),
        Env.NODE_RANK.value: "0",
        Env.CONFIG_MAPS.value: str(run.config_maps_folder),
    }
    with run.log_file.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        with _treat_termination_as_interrupt():
            exit_code = _wait_for_trainer(process, port, termination_file)
    return _print_result(exit_code, termination_file, run)


def require_trainer(interpreter: str) -> None:
    """Raise LocalRunError if the interpreter has no trainer installed."""
    check_code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('finetune_trainer') is None)"
    try:
        is_installed = subprocess.run([interpreter, "-c", check_code], check=False, capture_output=True).returncode == 0
    except OSError as error:
        raise LocalRunError(f"--python {interpreter}: {error.strerror}") from None
    if not is_installed:
        raise LocalRunError(
            f"{interpreter} has no trainer: install finetune-operator[trainer] there, or choose another interpreter with --python"
        )


def find_free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def _treat_termination_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP as Ctrl-C. Without this handler, these signals would end this program, but the trainer would run on."""
    previous_handlers = {signal_number: signal.signal(signal_number, signal.default_int_handler) for signal_number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signal_number, handler in previous_handlers.items():
            signal.signal(signal_number, handler)


def _wait_for_trainer(process: subprocess.Popen[bytes], port: int, termination_file: Path) -> int:
    """Show progress until the process ends, and return its exit code.

    The last report comes from the termination message, because the process may end between two polls.
    The first Ctrl-C or SIGTERM makes the trainer save and stop; the second kills the trainer.
    """
    show_report = make_progress_printer()
    interrupt_count = 0
    while True:
        try:
            exit_code = _poll_trainer(process, port, show_report)
        except KeyboardInterrupt:
            interrupt_count += 1
            process.send_signal(signal.SIGTERM if interrupt_count == 1 else signal.SIGKILL)
            hint = "saving a checkpoint; press Ctrl-C again to stop without saving" if interrupt_count == 1 else "stopped"
            output.print_notes([hint])
            continue
        if exit_code is not None:
            show_report(read_last_report(termination_file))
            show_report(None)
            return exit_code


def _poll_trainer(process: subprocess.Popen[bytes], port: int, show_report: Callable[[ProgressReport | None], None]) -> int | None:
    """Wait for the process at most POLL_SECONDS, and return its exit code. If the process still runs, show the progress and return None."""
    try:
        return process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        report = fetch_progress(port)
        if report is not None:
            show_report(report)
        return None


def fetch_progress(port: int) -> ProgressReport | None:
    """Return the trainer's progress report, or None if the trainer does not respond."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{names.HttpPath.PROGRESS}", timeout=5) as response:
            return ProgressReport.model_validate_json(response.read())
    except (OSError, http.client.HTTPException, ValueError):  # the trainer has not started yet, or ends in the middle of its response
        return None


def make_progress_printer() -> Callable[[ProgressReport | None], None]:
    """Return a function that prints progress reports. A call with None ends the output.

    On a terminal one line is updated. Without a terminal, a line is printed at each change of the stage and every ten percent.
    """
    is_terminal = output.error_console().is_terminal
    last_shown_state: tuple[Any, Any] = (None, None)

    def show_report(report: ProgressReport | None) -> None:
        nonlocal last_shown_state
        if report is None:
            if is_terminal:
                sys.stderr.write("\n")
            return
        shown_state = (report.stage, (report.progress.percent or 0) // 10)
        if is_terminal:
            sys.stderr.write("\r\033[K" + format_report_line(report))
            sys.stderr.flush()
        elif shown_state != last_shown_state:
            output.error_console().print(format_report_line(report))
        last_shown_state = shown_state

    return show_report


def format_report_line(report: ProgressReport) -> str:
    """Format a progress report as one line."""
    parts = [str(report.stage)]
    if report.progress.step is not None:
        parts += [draw_progress_bar(report.progress.percent), report.progress.display or str(report.progress.step)]
    if report.metrics.train_loss is not None:
        parts.append(f"loss {report.metrics.train_loss:.4g}")
    if report.progress.eta:
        parts.append(f"{report.progress.eta} left")
    if report.detail and report.progress.step is None:
        parts.append(report.detail)
    return "  ".join(parts)


def _print_result(exit_code: int, termination_file: Path, run: LocalRun) -> int:
    """Print the result of the run, and return the exit code of `finetune run`."""
    termination_message = _read_termination_message(termination_file)
    if exit_code == ExitCode.OK:
        uri = termination_message.output.uri if termination_message and termination_message.output else run.config.storage.uri
        output.write(f"{run.name}: done, the model is in {uri}")
        output.print_notes([f"report: {report}" for report in [_find_report_file(run)] if report is not None])
        return output.OK
    if exit_code == ExitCode.PREEMPTED_SAVED:
        output.print_notes(
            [f"stopped and saved at step {termination_message.step if termination_message else '-'}; run the same command again to continue"]
        )
        return output.ERROR
    if termination_message is not None and termination_message.message:
        output.print_errors([f"{termination_message.class_ or ''} {termination_message.code or ''}: {termination_message.message}".strip()])
        output.print_notes([termination_message.hint] if termination_message.hint else [])
    else:
        output.print_errors([f"the trainer ended with exit code {exit_code}", *_read_last_lines(run.log_file)])
    output.print_notes([f"report: {report}" for report in [_find_report_file(run)] if report is not None])
    output.print_notes([f"log: {run.log_file}"])
    return output.JOB_FAILED


def _find_report_file(run: LocalRun) -> Path | None:
    """Return the report of the run, or None if the trainer has not written it."""
    path = Path(run.config.storage.uri.removeprefix("file://"), names.REPORT_KEY)
    return path if path.is_file() else None


def read_last_report(path: Path) -> ProgressReport | None:
    """Convert the trainer's termination message to a progress report. Return None if the message contains no step."""
    message = _read_termination_message(path)
    if message is None or message.progress is None or message.progress.step is None:
        return None
    is_preempted = message.class_ is FailureClass.PREEMPTED
    stage = Stage.DONE if message.output else Stage.FAILED if message.code and not is_preempted else Stage.STOPPING
    progress = message.progress.model_copy(update={"eta": None})
    return ProgressReport(attempt=1, uid="", stage=stage, progress=progress, metrics=message.metrics or Metrics())


def _read_termination_message(path: Path) -> TerminationMessage | None:
    try:
        return TerminationMessage.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _read_last_lines(log_file: Path) -> Iterator[str]:
    yield from log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
