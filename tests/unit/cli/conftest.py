"""Fixtures of the CLI tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from finetune_cli import main, output

WriteFile = Callable[[str, str], Path]
RunCommand = Callable[..., tuple[int, str, str]]
JOB = """\
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata: {name: bot}
spec:
  model: {source: org/m}
  dataset: {train: "s3://data/t.jsonl"}
"""


@pytest.fixture
def write_file(tmp_path: Path) -> WriteFile:
    """Return a function that writes a file in the folder of the test."""

    def write_text(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """Return a function that runs a command in this process and returns exit code, stdout and stderr."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: str | Path, tool_arguments: tuple[str, ...] = ()) -> tuple[int, str, str]:
        output.stdout_console.cache_clear()
        output.error_console.cache_clear()
        capsys.readouterr()
        code = main.run([str(word) for word in words], list(tool_arguments))
        captured_output = capsys.readouterr()
        return code, captured_output.out, captured_output.err

    return run


@pytest.fixture
def kubeconfig_of_server(tmp_path: Path) -> Iterator[Callable[[int, bytes], str]]:
    """Return a function that starts a server and returns a kubeconfig. The server sends the same response to every request."""
    servers: list[ThreadingHTTPServer] = []

    def serve(status: int, body: bytes) -> str:
        class FixedResponse(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), FixedResponse)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        user = {"name": "u", "user": {"token": "t"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "users": [user],
            "contexts": [context],
            "current-context": "x",
        }
        path = tmp_path / "kubeconfig"
        path.write_text(json.dumps(config), encoding="utf-8")
        return str(path)

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()
