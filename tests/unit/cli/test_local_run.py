"""`finetune run --local`: numbers of attempts, defaults that later attempts keep, and the last progress report."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.defaults import ResolvedSpec, resolve_defaults
from finetune_api.spec import FineTuneJobSpec
from finetune_cli import local_run
from finetune_cli.local_run import _link_config_maps, _write_run, fetch_progress, find_last_attempt, read_last_report
from finetune_cli.local_spec import LocalRunError


@pytest.mark.parametrize(
    ("message", "stage"),
    [
        ({"class": "Preempted", "code": "StoppedSaved", "message": "saved at step 12"}, "stopping"),
        ({"class": "Data", "code": "DatasetEmpty", "message": "no rows"}, "failed"),
        ({"output": {"uri": "file:///m/model"}}, "done"),
    ],
)
def test_last_report_shows_the_final_stage(message: dict[str, Any], stage: str, tmp_path: Path) -> None:
    (tmp_path / "termination-message.json").write_text(
        json.dumps({"progress": {"step": 12, "totalSteps": 100}, **message})
    )
    report = read_last_report(tmp_path / "termination-message.json")
    assert report is not None and report.stage == stage


def test_attempts_are_counted_from_storage(tmp_path: Path) -> None:
    assert find_last_attempt(tmp_path) == 0
    for name in ("attempt-9", "attempt-10", "attempt-x", "other"):
        (tmp_path / "run" / name).mkdir(parents=True)
    assert find_last_attempt(tmp_path) == 10


EARLIER_DEFAULTS = {"model.ligerKernels": False, "method.lora.dropout": 0.05}


def resolve_local(method: dict[str, Any]) -> ResolvedSpec:
    spec = {"model": {"source": "org/name"}, "dataset": {"train": "file:///train.jsonl"}, "storage": {"uri": "file:///out"}, "method": method}
    return resolve_defaults(FineTuneJobSpec.model_validate(spec))


@pytest.mark.parametrize(
    ("has_checkpoint", "method", "expected"),
    [(True, {}, (False, 0.05)), (False, {}, (None, 0)), (True, {"lora": {"rank": 8}}, "method.lora.rank 16 -> 8")],
    ids=["continued job", "job without checkpoints", "another spec"],
)
def test_continued_job_keeps_the_defaults_of_an_earlier_release(
    has_checkpoint: bool, method: dict[str, Any], expected: tuple[bool | None, float] | str, tmp_path: Path
) -> None:
    resolution = resolve_local({})
    earlier_resolution = ResolvedSpec(resolution.spec.with_values(EARLIER_DEFAULTS), {**resolution.defaults, **EARLIER_DEFAULTS})
    first_run = _write_run("job", earlier_resolution, tmp_path, [])
    if has_checkpoint:
        folder = Path(first_run.config.storage.uri.removeprefix("file://")) / "checkpoints/step-00000100"
        folder.mkdir(parents=True)
        (folder / names.Storage.COMMITTED.value).touch()
    if isinstance(expected, str):
        with pytest.raises(LocalRunError) as caught:
            _write_run("job", resolve_local(method), tmp_path, [])
        assert f"another spec ({expected})" in str(caught.value)
        return
    run = _write_run("job", resolve_local(method), tmp_path, []).config
    assert run.spec.method.lora is not None
    assert (run.spec.model.liger_kernels, run.spec.method.lora.dropout, "model.ligerKernels" in run.defaults) == (*expected, has_checkpoint)


def test_the_trainer_finds_the_files_of_config_maps(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "prompts.txt").write_text("Hello")
    for _ in range(2):
        _link_config_maps(tmp_path / "maps", {"prompts": tmp_path / "mine"})
    assert (tmp_path / "maps" / "prompts" / "prompts.txt").read_text() == "Hello"


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_command_stops_the_trainer(signal_number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = "import os, signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(75)); print('ready', flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    poll_functions = iter([lambda: os.kill(os.getpid(), signal_number), process.wait])
    monkeypatch.setattr(local_run, "_poll_trainer", lambda *_: next(poll_functions)())
    handler_before = signal.getsignal(signal.SIGTERM)
    with local_run._treat_termination_as_interrupt():
        assert local_run._wait_for_trainer(process, 0, tmp_path / "termination") == 75
    assert signal.getsignal(signal.SIGTERM) is handler_before


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"HTTP/1.0",
        b"not HTTP\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.0 503 Service Unavailable\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n{}",
    ],
    ids=["nothing", "half a status line", "no HTTP", "half a body", "error", "no report"],
)
def test_a_trainer_that_ends_while_it_responds_has_no_progress(response: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def respond() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(response)

        thread = threading.Thread(target=respond)
        thread.start()
        assert fetch_progress(server.getsockname()[1]) is None
        thread.join()
