"""The trainer's client of the vLLM server, and the program that starts the server. The tests need neither vLLM nor a model."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from finetune_api import names
from finetune_api.errors import InstallationBrokenError, PeerError
from finetune_api.names import ExitCode, FailureClass
from finetune_trainer.failure import classify_error
from finetune_trainer.generation_server import GenerationServer, ServerOptions

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ServerOptions(port=8100, gpus=2, gpu_memory_utilization=0.9, dtype="bfloat16", max_length=2048, seed=42)
OPTIONS_ON_WIRE = {"version": 1, "port": 8100, "gpus": 2, "gpuMemoryUtilization": 0.9, "dtype": "bfloat16", "maxLength": 2048, "seed": 42}
SUITABLE_ANSWERS = {"/version": {"version": "0.31.0"}, "/server_info?config_format=json": {"model_config": {"logprobs_mode": "processed_logprobs"}}}


class FakeServer:
    """An HTTP server with fixed answers. `requests`: path and body of each POST request.

    `answers`: for each path, a JSON value, a pair of status and text, `hang` (no answer) or `close` (the connection is closed).
    """

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"/health": {}, **SUITABLE_ANSWERS}
        self.requests: list[tuple[str, Any]] = []
        self.may_answer = threading.Event()
        fake_server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                answer = fake_server.answers.get(self.path, (404, "not found"))
                if answer == "hang":
                    fake_server.may_answer.wait()
                    return
                if answer == "close":
                    return
                status, text = answer if isinstance(answer, tuple) else (200, json.dumps(answer))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_POST(self) -> None:
                fake_server.requests.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self.do_GET()

        self.http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http_server.daemon_threads = True
        self.thread = threading.Thread(target=self.http_server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_server.server_address[1]}"

    def close(self) -> None:
        self.may_answer.set()
        self.http_server.shutdown()
        self.http_server.server_close()
        self.thread.join()


@pytest.fixture
def fake_server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def make_client(fake_server: FakeServer, folder: Path, timeout: float = 30.0) -> GenerationServer:
    """Return a client whose clock only advances when the client pauses."""
    seconds = [0.0]

    def pause(duration: float) -> None:
        seconds[0] += duration

    return GenerationServer(fake_server.url, folder, OPTIONS, 5.0, timeout, pause=pause, clock=lambda: seconds[0])


def test_the_start_writes_the_options_and_accepts_a_suitable_server(fake_server: FakeServer, tmp_path: Path) -> None:
    make_client(fake_server, tmp_path).start()
    assert [file.name for file in tmp_path.iterdir()] == [names.GENERATION_OPTIONS_FILE]
    assert json.loads((tmp_path / names.GENERATION_OPTIONS_FILE).read_text()) == OPTIONS_ON_WIRE


def test_a_server_that_never_answers_is_a_failure_that_the_operator_retries(fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.answers["/health"] = (503, "loading")
    with pytest.raises(PeerError) as caught:
        make_client(fake_server, tmp_path).start()
    error = caught.value
    assert (error.code, error.message) == ("GenerationServerNotReady", "the vLLM server did not answer within 5 s after its start")
    assert (error.exit_code, error.failure_class) == (ExitCode.PEER_FAILED, FailureClass.INFRASTRUCTURE)
    assert classify_error(error) == (error, True), "no other rank may count as the cause"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"message": "exit code 1: out of memory"}', "exit code 1: out of memory"), ("{", "its container reported no reason"),
        ("[]", "its container reported no reason"),
    ],
)  # fmt: skip
def test_a_server_that_ends_during_its_start_is_reported_at_once(text: str, reason: str, fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.answers["/health"] = (503, "loading")
    (tmp_path / names.GENERATION_END_FILE).write_text(text)
    with pytest.raises(PeerError) as caught:
        make_client(fake_server, tmp_path).start()
    assert (caught.value.code, caught.value.message) == ("GenerationServerEnded", f"the vLLM server ended: {reason}")


@pytest.mark.parametrize(
    ("path", "answer", "message"),
    [
        ("/version", {"version": "0.21.3"}, "the server runs vLLM 0.21.3, but the trainer supports 0.22 to 0.31"),
        ("/version", {"version": "0.32.0"}, "the server runs vLLM 0.32.0, but the trainer supports 0.22 to 0.31"),
        ("/version", {"version": "main"}, "the server runs vLLM main, but the trainer supports 0.22 to 0.31"),
        ("/version", {}, "the server runs vLLM of an unknown version, but the trainer supports 0.22 to 0.31"),
        (
            "/server_info?config_format=json", {"model_config": {"logprobs_mode": "raw_logprobs"}},
            "the server reports log-probabilities as raw_logprobs, but grpo needs processed_logprobs",
        ),
    ],
)  # fmt: skip
def test_an_unsuitable_server_is_refused(path: str, answer: Any, message: str, fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.answers[path] = answer
    with pytest.raises(InstallationBrokenError) as caught:
        make_client(fake_server, tmp_path).start()
    assert (caught.value.code, caught.value.message, caught.value.exit_code) == ("GenerationServerUnsuitable", message, ExitCode.INSTALLATION_BROKEN)


@pytest.mark.parametrize("version", ["0.22.0", "0.31.2", "0.30.0rc1+cu130"])
def test_supported_versions_are_accepted(version: str, fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.answers["/version"] = {"version": version}
    make_client(fake_server, tmp_path).start()


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ((500, "the engine is dead"), "GenerationServerFailed", "the vLLM server answered /v1/completions with status 500: the engine is dead"),
        ((200, "<html>"), "GenerationServerFailed", "the vLLM server answered /v1/completions with a text that is not JSON"),
        ("hang", "GenerationServerSilent", "the vLLM server did not answer /v1/completions within 0.2 s"),
        ("close", "GenerationServerEnded", "the vLLM server closed the connection during /v1/completions: Remote end closed connection without response"),
    ],
)
def test_each_fault_of_an_answer_has_its_own_code(answer: Any, code: str, message: str, fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.answers["/v1/completions"] = answer
    with pytest.raises(PeerError) as caught:
        make_client(fake_server, tmp_path, timeout=0.2).post("/v1/completions", {})
    assert (caught.value.code, caught.value.message) == (code, message)


def test_a_lost_connection_is_reported_with_the_reason_why_the_server_ended(fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.answers["/v1/completions"] = "close"
    (tmp_path / names.GENERATION_END_FILE).write_text('{"message": "exit code -9: no log line"}')
    with pytest.raises(PeerError, match="GenerationServerEnded: the vLLM server ended: exit code -9: no log line"):
        make_client(fake_server, tmp_path).post("/v1/completions", {})


def test_requests_do_not_use_the_proxy_of_the_environment(fake_server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    make_client(fake_server, tmp_path).start()


def test_reloading_weights_also_clears_the_prefix_cache(fake_server: FakeServer, tmp_path: Path) -> None:
    fake_server.answers |= {"/collective_rpc": {"results": [None]}, "/reset_prefix_cache": (200, "")}
    make_client(fake_server, tmp_path).reload_weights()
    assert fake_server.requests == [("/collective_rpc", {"method": "reload_weights"}), ("/reset_prefix_cache", {})]


# ---- the program of the server's container


@pytest.fixture(scope="module")
def serve_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", ROOT / "vllm-image/serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(serve_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared volume. The handler of SIGTERM is not installed, because it would outlive the test."""
    monkeypatch.setenv(serve_module.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(serve_module.signal, "signal", lambda number, handler: None)
    return tmp_path


def write_program(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a shell script that runs in place of vLLM."""
    (folder / "bin").mkdir()
    (folder / "bin/vllm").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin/vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_trainer_and_server_program_use_the_same_file_names(serve_module: ModuleType) -> None:
    assert (serve_module.CONTRACT_VERSION, serve_module.DEFAULT_FOLDER) == (names.GENERATION_CONTRACT_VERSION, names.GENERATION_MOUNT)
    text = (ROOT / "vllm-image/serve.py").read_text()
    for name in (names.GENERATION_OPTIONS_FILE, names.GENERATION_END_FILE, names.GENERATION_MODEL_FOLDER):
        assert f'"{name}"' in text


def test_the_command_contains_all_options(serve_module: ModuleType) -> None:
    assert serve_module.build_server_command(Path("/work/generation"), OPTIONS_ON_WIRE) == [
        "vllm", "serve", "/work/generation/model", "--host", "127.0.0.1", "--port", "8100", "--tensor-parallel-size", "2",
        "--gpu-memory-utilization", "0.9", "--dtype", "bfloat16", "--max-model-len", "2048", "--seed", "42",
        "--generation-config", "vllm", "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip


def test_the_end_of_the_server_is_reported_with_its_last_lines(serve_module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(folder, 'echo one; echo two; echo "mode $VLLM_SERVER_DEV_MODE"; echo "not enough memory" >&2; exit 3', monkeypatch)
    (folder / "server.json").write_text(json.dumps(OPTIONS_ON_WIRE))
    assert serve_module.main() == 1
    assert json.loads((folder / "ended.json").read_text()) == {"message": "exit code 3: two | mode 1 | not enough memory"}


def test_a_missing_vllm_is_reported(serve_module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    (folder / "server.json").write_text(json.dumps(OPTIONS_ON_WIRE))
    assert serve_module.main() == 1
    assert json.loads((folder / "ended.json").read_text()) == {"message": "vllm cannot be started: No such file or directory"}


def test_options_of_another_version_are_refused(serve_module: ModuleType, folder: Path) -> None:
    (folder / "server.json").write_text(json.dumps(OPTIONS_ON_WIRE | {"version": 2}))
    assert serve_module.main() == 1
    message = "this image reads version 1 of server.json, but the trainer wrote version 2"
    assert json.loads((folder / "ended.json").read_text()) == {"message": message}


def test_a_server_that_has_ended_is_not_started_again(serve_module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(folder, "touch started", monkeypatch)
    monkeypatch.chdir(folder)
    (folder / "server.json").write_text(json.dumps(OPTIONS_ON_WIRE))
    (folder / "ended.json").write_text('{"message": "exit code 9"}')
    assert serve_module.main() == 1
    assert not (folder / "started").exists()
    assert json.loads((folder / "ended.json").read_text()) == {"message": "exit code 9"}


def test_a_container_that_was_killed_with_its_server_reports_the_end_after_its_restart(
    serve_module: ModuleType, folder: Path, fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(folder, "touch served", monkeypatch)
    monkeypatch.chdir(folder)
    (folder / "server.json").write_text(json.dumps(OPTIONS_ON_WIRE))

    def be_killed(command: list[str]) -> str:
        raise SystemExit(137)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(serve_module, "run_server", be_killed)
        serve_module.main()
    assert serve_module.main() == 1
    assert not (folder / "served").exists()
    fake_server.answers["/health"] = (503, "loading")
    with pytest.raises(PeerError, match=r"the vLLM server ended: its container was killed, .* trainer\.grpo\.generation\.memory"):
        make_client(fake_server, folder).start()
