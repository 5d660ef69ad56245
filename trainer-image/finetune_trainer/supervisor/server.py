"""The pod's HTTP: `/progress` for the operator, `/metrics` for Prometheus, `/healthz` for the kubelet.

On the loopback it also takes the Kubeflow progress protocol (`POST .../status`), so that a user's own script with a current
transformers reports progress without a line of code. Standard library only: it must answer within a second of pod start.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune_api.names import Path as Route

from finetune_trainer.supervisor.board import Board

LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
MAX_BODY = 64 * 1024
PREFIX = "finetune_trainer"


class Server:
    """Serves a board on a port (0: any free one; see `port`) until it is closed."""

    def __init__(self, board: Board, port: int, *, host: str = "") -> None:
        self._http = _Http((host, port), board)
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._http.shutdown()
        self._http.server_close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], board: Board) -> None:
        self.board = board
        if not address[0] and socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6  # a pod's address may be of either kind
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without asking a name server for our own name, as http.server does: that may take seconds."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        answers: dict[str, Callable[[], tuple[str, bytes]]] = {
            Route.PROGRESS: lambda: ("application/json", self._progress()),
            Route.METRICS: lambda: ("text/plain; version=0.0.4", exposition(self.server.board).encode()),
            Route.HEALTH: lambda: ("text/plain", b"ok\n"),
        }
        answer = answers.get(self.path.partition("?")[0])
        if answer is None:
            self._send(404, "text/plain", f"try {', '.join(Route)}\n".encode())
        else:
            self._send(200, *answer())

    def do_POST(self) -> None:
        if not self.path.partition("?")[0].endswith("/status") or self.client_address[0] not in LOOPBACK:
            self._send(404, "text/plain", b"not found\n")
            return
        length = int(self.headers.get("Content-Length") or 0)
        if length > MAX_BODY:
            self._send(413, "text/plain", b"too large\n")
            return
        try:
            body = json.loads(self.rfile.read(length))
            take_kubeflow(self.server.board, body["trainerStatus"])
        except (ValueError, KeyError, TypeError):
            self._send(422, "text/plain", b'write {"trainerStatus": {...}}\n')
            return
        self._send(200, "application/json", json.dumps(body).encode())

    def _progress(self) -> bytes:
        return json.dumps(self.server.board.report().to_wire(), separators=(",", ":")).encode()

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes and scrapes are not worth a line."""


def take_kubeflow(board: Board, status: dict[str, Any]) -> None:
    """Progress as the Kubeflow protocol words it. Steps are not part of it; percent and time left are."""
    found: dict[str, Any] = {}
    if (percent := status.get("progressPercentage")) is not None:
        found |= {"percent": int(percent), "display": f"{int(percent)}%"}
    if (left := status.get("estimatedRemainingSeconds")) is not None:
        found |= {"secondsRemaining": int(left)}
    board.progress(found)
    metrics: dict[str, float] = {}
    for one in status.get("metrics") or []:
        name = {
            "loss": "trainLoss",
            "eval_loss": "evalLoss",
            "learning_rate": "learningRate",
            "grad_norm": "gradNorm",
        }.get(one.get("name", ""))
        if name:
            metrics[name] = float(one["value"])
    board.metrics(metrics)


def exposition(board: Board) -> str:
    """The board in Prometheus' text format."""
    report = board.report()
    values: dict[str, tuple[str, float | None]] = {
        "step": ("Optimizer steps done.", report.progress.step),
        "steps_total": ("Optimizer steps in all.", report.progress.total_steps),
        "epoch": ("Passes over the data done.", report.progress.epoch),
        "tokens_seen": ("Tokens trained on.", report.progress.tokens_seen),
        "tokens_per_second": ("Recent pace.", report.progress.tokens_per_second),
        "train_loss": ("Training loss.", report.metrics.train_loss),
        "eval_loss": ("Validation loss.", report.metrics.eval_loss),
        "learning_rate": ("Learning rate.", report.metrics.learning_rate),
        "grad_norm": ("Gradient norm before clipping.", report.metrics.grad_norm),
        "step_seconds_median": ("Median seconds of recent steps.", report.health.median_step_seconds),
        "seconds_since_step": ("Seconds since the newest step.", report.health.seconds_since_step),
        "checkpoint_seconds": ("Seconds the last checkpoint took until committed.", report.health.last_save_seconds),
        "healthy": ("1 unless a loss was not finite or a checkpoint could not be kept.", float(report.health.healthy)),
        "checkpoint_step": (
            "Step of the newest committed checkpoint.",
            report.checkpoints[0].step if report.checkpoints else None,
        ),
    }
    lines: list[str] = []
    for name, (text, value) in values.items():
        if value is not None:
            lines += [f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} gauge", f"{PREFIX}_{name} {value:g}"]
    for name, value in sorted(board.counters.items()):
        lines += [f"# TYPE {PREFIX}_{name}_total counter", f"{PREFIX}_{name}_total {value:g}"]
    lines += [
        f"# HELP {PREFIX}_stage What the pod is doing.",
        f"# TYPE {PREFIX}_stage gauge",
        f'{PREFIX}_stage{{stage="{report.stage}"}} 1',
    ]
    return "\n".join(lines) + "\n"
