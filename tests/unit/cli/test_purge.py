"""`finetune purge`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Call


@pytest.fixture
def kubeconfig_of_server(tmp_path: Path) -> Iterator[Callable[[int, bytes], str]]:
    """Return a function that starts a server with one fixed response to every request, and returns its kubeconfig."""
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


def test_cluster_without_the_crd_keeps_the_data(
    call: Call, kubeconfig_of_server: Callable[[int, bytes], str], tmp_path: Path
) -> None:
    marker = tmp_path / "store/default/bot/u1/checkpoints/step-00000001/_COMMITTED"
    marker.parent.mkdir(parents=True)
    marker.write_text("{}", encoding="utf-8")
    words = ("purge", "bot", "--uid", "u1", "--storage", f"file://{tmp_path}/store", "--yes-purge", "bot")
    code, out, err = call(*words, "--kubeconfig", kubeconfig_of_server(404, b"404 page not found\n"))
    assert (code, out, marker.exists()) == (1, "", True)
    assert "has no CRD for FineTuneJob" in err
