"""The pod's HTTP server: `/progress` for the operator, `/metrics` for Prometheus, `/healthz` for the kubelet, `/usage` for `finetune top`.

`/progress` requires the token of the attempt, because its report names the job, its storage and its failures. `/metrics` has only numbers.

On the loopback interface, the server also accepts the Kubeflow progress protocol (`POST .../status`). A user's own script that uses a recent version
of transformers then reports progress without extra code. Only the standard library is used, because the server must respond within a second of the pod's start.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finetune_api.attempt_secret import derive_progress_token
from finetune_api.names import PROGRESS_TOKEN_HEADER, HttpPath
from finetune_api.status import Metrics, Progress

from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.usage import UsageReader

LOOPBACK_ADDRESSES = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
MAX_BODY_BYTES = 64 * 1024
MAX_CONNECTIONS = 64
"""Maximum number of open connections, each of which has a thread. The operator, the kubelet and a few Prometheus servers need fewer than ten."""
CLOSED_CONNECTIONS_COUNTER = "closed_connections"
"""Name of the counter of connections that were closed because more than `MAX_CONNECTIONS` were open."""
METRIC_PREFIX = "finetune_trainer"
KUBEFLOW_METRICS = {
    "loss": "trainLoss",
    "eval_loss": "evalLoss",
    "learning_rate": "learningRate",
    "grad_norm": "gradNorm",
}


class Server:
    """Serves the state of the run until `close()`. If the port is 0, the server chooses a free port. The attribute `port` is the port in use.

    If `attempt_secret` is None, `/progress` requires no token. This is needed for local runs, and for an operator that is too old to send a token.
    """

    def __init__(self, run_state: RunState, port: int, *, host: str = "", attempt_secret: str | None = None) -> None:
        token = derive_progress_token(attempt_secret) if attempt_secret is not None else None
        self._http = _HttpServer((host, port), run_state, token)
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], run_state: RunState, progress_token: str | None) -> None:
        self.run_state = run_state
        self.usage = UsageReader()
        self.progress_token = progress_token
        self._connections: dict[socket.socket, None] = {}
        self._connections_lock = threading.Lock()
        if not address[0] and socket.has_dualstack_ipv6():
            self.address_family = socket.AF_INET6  # Serve IPv4 and IPv6, because a pod may have only one of them.
        super().__init__(address, _RequestHandler)

    def server_bind(self) -> None:
        """Bind the socket. The method of http.server would also look up the host name, so a slow name server would delay the pod's start."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in its own thread. If too many connections are open, close the oldest connection, which is probably idle."""
        with self._connections_lock:
            oldest_connection = next(iter(self._connections)) if len(self._connections) >= MAX_CONNECTIONS else None
            if oldest_connection is not None:
                del self._connections[oldest_connection]
            self._connections[request] = None
        if oldest_connection is not None:
            self.run_state.increment_counter(CLOSED_CONNECTIONS_COUNTER)
            with contextlib.suppress(OSError):
                oldest_connection.shutdown(socket.SHUT_RDWR)  # The shutdown ends the read in the connection's thread.
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and remove it from the open connections. The connection's thread calls this method when it ends."""
        with self._connections_lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log all errors except failed connections, because any program in the network could fill the pod's log with failed connections."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _RequestHandler(BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if self.path.partition("?")[0] == HttpPath.PROGRESS and not self._may_read_progress():
            self._send_response(401, "text/plain", f"send the token of this attempt in the header {PROGRESS_TOKEN_HEADER}\n".encode())
            return
        response_builders: dict[str, Callable[[], tuple[str, bytes]]] = {
            HttpPath.PROGRESS: lambda: ("application/json", self._build_progress_json()),
            HttpPath.METRICS: lambda: ("text/plain; version=0.0.4", format_metrics(self.server.run_state).encode()),
            HttpPath.HEALTH: lambda: ("text/plain", b"ok\n"),
            HttpPath.USAGE: lambda: ("application/json", _to_json(self.server.usage.read().to_wire())),
        }
        build_response = response_builders.get(self.path.partition("?")[0])
        if build_response is None:
            self._send_response(404, "text/plain", f"try {', '.join(HttpPath)}\n".encode())
        else:
            self._send_response(200, *build_response())

    def do_POST(self) -> None:
        if not self.path.partition("?")[0].endswith("/status") or self.client_address[0] not in LOOPBACK_ADDRESSES:
            self._send_response(404, "text/plain", b"not found\n")
            return
        length = self._parse_content_length()
        if length is None:
            self._send_response(400, "text/plain", b"Content-Length must be a number\n")
            return
        if length > MAX_BODY_BYTES:
            self._send_response(413, "text/plain", b"too large\n")
            return
        try:
            body = json.loads(self.rfile.read(length))
            merge_kubeflow_status(self.server.run_state, body["trainerStatus"])
        except (ValueError, KeyError, TypeError):
            self._send_response(422, "text/plain", b'write {"trainerStatus": {...}}\n')
            return
        self._send_response(200, "application/json", json.dumps(body).encode())

    def _parse_content_length(self) -> int | None:
        length_text = self.headers.get("Content-Length") or "0"
        return int(length_text) if length_text.isascii() and length_text.isdecimal() else None

    def _may_read_progress(self) -> bool:
        expected_token = self.server.progress_token
        return expected_token is None or hmac.compare_digest(self.headers.get(PROGRESS_TOKEN_HEADER, "").encode(), expected_token.encode())

    def _build_progress_json(self) -> bytes:
        return _to_json(self.server.run_state.report().to_wire())

    def _send_response(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests, because probes and scrapes would fill the pod's log."""


def _to_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def merge_kubeflow_status(run_state: RunState, status: dict[str, Any]) -> None:
    """Apply a report of the Kubeflow progress protocol. The protocol has a percentage and a remaining time, but no steps.

    Errors: KeyError, TypeError, ValueError if the report does not follow the protocol.
    """
    percent, seconds_left = status.get("progressPercentage"), status.get("estimatedRemainingSeconds")
    progress = Progress(
        percent=None if percent is None else int(percent), display=None if percent is None else f"{int(percent)}%",
        seconds_remaining=None if seconds_left is None else int(seconds_left),
    )  # fmt: skip
    known_metrics = [metric for metric in status.get("metrics") or [] if metric.get("name") in KUBEFLOW_METRICS]
    metrics = Metrics.model_validate({KUBEFLOW_METRICS[metric["name"]]: float(metric["value"]) for metric in known_metrics})
    run_state.merge_progress(progress)
    run_state.merge_metrics(metrics)


def format_metrics(run_state: RunState) -> str:
    """Return the state of the run in Prometheus' text format."""
    report = run_state.report()
    gauges_by_name: dict[str, tuple[str, float | None]] = {
        "step": ("Optimizer steps done.", report.progress.step),
        "steps_total": ("Total optimizer steps of the run.", report.progress.total_steps),
        "epoch": ("Completed passes over the data.", report.progress.epoch),
        "tokens_seen": ("Tokens trained on.", report.progress.tokens_seen),
        "tokens_per_second": ("Recent throughput in tokens per second.", report.progress.tokens_per_second),
        "train_loss": ("Training loss.", report.metrics.train_loss),
        "eval_loss": ("Validation loss.", report.metrics.eval_loss),
        "learning_rate": ("Learning rate.", report.metrics.learning_rate),
        "grad_norm": ("Gradient norm before clipping.", report.metrics.grad_norm),
        "step_seconds_median": ("Median duration of recent steps in seconds.", report.health.median_step_seconds),
        "seconds_since_step": ("Seconds since the newest step.", report.health.seconds_since_step),
        "checkpoint_seconds": ("Seconds from the start of the last checkpoint's upload to its commit.", report.health.last_save_seconds),
        "healthy": (
            "0 if the last checkpoint was skipped, is damaged or could not be stored, otherwise 1.",
            float(report.health.healthy),
        ),
        "checkpoint_step": (
            "Step of the newest committed checkpoint.",
            report.checkpoints[0].step if report.checkpoints else None,
        ),
    }
    lines: list[str] = []
    for name, (help_text, value) in gauges_by_name.items():
        if value is not None:
            lines += [f"# HELP {METRIC_PREFIX}_{name} {help_text}", f"# TYPE {METRIC_PREFIX}_{name} gauge", f"{METRIC_PREFIX}_{name} {value:g}"]
    for name, value in sorted(run_state.counters.items()):
        lines += [f"# TYPE {METRIC_PREFIX}_{name}_total counter", f"{METRIC_PREFIX}_{name}_total {value:g}"]
    if report.time_use is not None:
        lines += [f"# HELP {METRIC_PREFIX}_time_seconds Seconds since the start of the container, by use.", f"# TYPE {METRIC_PREFIX}_time_seconds gauge"]
        lines += [f'{METRIC_PREFIX}_time_seconds{{part="{part}"}} {seconds:g}' for part, seconds in report.time_use.seconds().items()]
    lines += [
        f"# HELP {METRIC_PREFIX}_stage Current stage of the pod.",
        f"# TYPE {METRIC_PREFIX}_stage gauge",
        f'{METRIC_PREFIX}_stage{{stage="{report.stage}"}} 1',
    ]
    return "\n".join(lines) + "\n"
