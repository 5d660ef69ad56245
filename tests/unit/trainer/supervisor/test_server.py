"""The pod's HTTP server starts without delay, listens on IPv4 and IPv6, and serves progress and metrics."""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.attempt_secret import derive_attempt_secret, derive_progress_token
from finetune_api.names import PROGRESS_TOKEN_HEADER
from finetune_api.pod import PodUsage, ProgressReport
from finetune_api.status import Checkpoint, Stage
from finetune_trainer.supervisor import server as subject
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.server import Server, format_metrics, merge_kubeflow_status


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    def resolve(*_: object) -> str:
        raise AssertionError("a slow name server would delay the start of the pod")

    monkeypatch.setattr(socket, "getfqdn", resolve)
    server = Server(RunState(), 0)
    yield server
    server.close()


def has_loopback(family: socket.AddressFamily, address: str) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_the_server_responds_on_ipv4_and_ipv6(server: Server, host: str) -> None:
    if host == "[::1]" and not has_loopback(socket.AF_INET6, "::1"):
        pytest.skip("this machine has no IPv6 loopback")
    with urllib.request.urlopen(f"http://{host}:{server.port}/healthz", timeout=20) as response:
        assert response.read() == b"ok\n"
    body = b'{"trainerStatus": {"progressPercentage": 3}}'
    with urllib.request.urlopen(
        urllib.request.Request(f"http://{host}:{server.port}/x/status", body, method="POST"), timeout=20
    ) as response:
        assert response.status == 200


def test_usage_is_served(server: Server) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/usage", timeout=20) as response:
        usage = PodUsage.model_validate_json(response.read())
    assert 0 < (usage.memory_used_bytes or 0) <= (usage.memory_total_bytes or 0)


def test_the_kubeflow_protocol_is_accepted() -> None:
    state = RunState()
    merge_kubeflow_status(
        state,
        {"progressPercentage": 30, "estimatedRemainingSeconds": 60, "metrics": [{"name": "eval_loss", "value": "1.5"}]},
    )
    report = state.report()
    assert (report.progress.percent, report.progress.seconds_remaining, report.metrics.eval_loss) == (30, 60, 1.5)
    assert report.progress.display == "30%"


def test_unknown_kubeflow_metrics_are_ignored() -> None:
    state = RunState()
    metrics = [{"name": "device", "value": "cpu"}, {"name": "note"}, {"name": "loss", "value": "0.5"}]
    merge_kubeflow_status(state, {"progressPercentage": 30, "metrics": metrics})
    report = state.report()
    assert (report.progress.percent, report.metrics.train_loss) == (30, 0.5)


def test_metrics_are_served_in_the_prometheus_format() -> None:
    state = RunState(seconds_since_process_start=1e6)
    state.record_step(7)
    state.increment_counter("checkpoints", 2)
    lines = format_metrics(state).splitlines()
    assert "finetune_trainer_step 7" in lines and "finetune_trainer_checkpoints_total 2" in lines
    assert {'finetune_trainer_stage{stage="starting"} 1', 'finetune_trainer_time_seconds{part="starting"} 1e+06'} <= set(lines)


def send_request(server: Server, path: str, body: bytes | None = None, length: int | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest("GET" if body is None else "POST", path)
    if body is not None:
        connection.putheader("Content-Length", str(len(body) if length is None else length))
    connection.endheaders(body)
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.parametrize(
    ("path", "body", "length", "status", "text"),
    [
        ("/healthz?x=1", None, None, 200, b"ok\n"), ("/metrics", None, None, 200, b"finetune_trainer_stage"), ("/progress", None, None, 200, b'"stage"'),
        ("/other", None, None, 404, b"try /"), ("/other", b"{}", None, 404, b"not found"), ("/status", b"{}", None, 422, b"trainerStatus"),
        ("/status", b"[", None, 422, b"trainerStatus"), ("/status", b"", None, 422, b"trainerStatus"), ("/status", b"{}", 65537, 413, b"too large"),
        ("/status", b'{"trainerStatus": {"progressPercentage": "x"}}', None, 422, b"trainerStatus"),
        ("/status?x=1", b'{"trainerStatus": {}}'.ljust(65536), None, 200, b"trainerStatus"),
    ],
)  # fmt: skip
def test_every_request_has_a_response(server: Server, path: str, body: bytes | None, length: int | None, status: int, text: bytes) -> None:
    response_status, response_body = send_request(server, path, body, length)
    assert response_status == status and text in response_body


def test_a_status_from_another_host_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "LOOPBACK_ADDRESSES", ())
    assert send_request(server, "/status", b'{"trainerStatus": {}}')[0] == 404


# The token of the attempt

SECRET = derive_attempt_secret(b"key", "uid", 1)
TOKEN = derive_progress_token(SECRET)


@pytest.fixture
def protected_server() -> Iterator[Server]:
    server = Server(RunState(), 0, attempt_secret=SECRET)
    yield server
    server.close()


def get_with_token(server: Server, path: str, token: str | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", path, headers={} if token is None else {PROGRESS_TOKEN_HEADER: token})
    response = connection.getresponse()
    return response.status, response.read()


@pytest.mark.parametrize("token", [None, "", "x", SECRET, TOKEN.upper(), TOKEN[:-1], TOKEN + "0", "\xff" * 64])
@pytest.mark.parametrize("path", ["/progress", "/progress?x=1"])
def test_progress_is_refused_without_the_token(protected_server: Server, path: str, token: str | None) -> None:
    expected_body = f"send the token of this attempt in the header {PROGRESS_TOKEN_HEADER}\n".encode()
    assert get_with_token(protected_server, path, token) == (401, expected_body)


def test_progress_is_reported_with_the_token(protected_server: Server) -> None:
    status, body = get_with_token(protected_server, "/progress", TOKEN)
    assert (status, ProgressReport.model_validate_json(body).stage) == (200, Stage.STARTING)


def test_probes_and_metrics_need_no_token_and_name_no_job(protected_server: Server) -> None:
    run: Any = SimpleNamespace(uid="uid-of-the-job", attempt=1, spec=None)
    state = RunState()
    state._run = run
    server = Server(state, 0, attempt_secret=SECRET)
    try:
        assert get_with_token(server, "/healthz", None) == (200, b"ok\n")
        status, body = get_with_token(server, "/metrics", None)
        assert status == 200 and b"uid-of-the-job" not in body and b"://" not in body
    finally:
        server.close()


# Limits of connections


def test_the_number_of_threads_for_idle_connections_is_limited(server: Server) -> None:
    """If there are too many idle connections, the oldest ones are closed, so that the operator and the kubelet still get answers."""
    thread_count_before = threading.active_count()
    connections = []
    for _ in range(3 * subject.MAX_CONNECTIONS):
        connections.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
    assert send_request(server, "/healthz")[0] == 200
    # The request above was accepted after all idle connections, so the surplus idle connections are closed by now.
    assert [connection.recv(1) for connection in connections[: 2 * subject.MAX_CONNECTIONS]] == [b""] * (2 * subject.MAX_CONNECTIONS)
    status, body = send_request(server, "/metrics")
    assert status == 200
    closed_count_line = next(line for line in body.decode().splitlines() if line.startswith("finetune_trainer_closed_connections_total "))
    assert int(closed_count_line.rpartition(" ")[2]) >= 2 * subject.MAX_CONNECTIONS
    assert len(server._http._connections) <= subject.MAX_CONNECTIONS
    assert threading.active_count() - thread_count_before < 3 * subject.MAX_CONNECTIONS
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("length", ["x", "-1", "1.5", "\u0663".encode().decode("latin-1")])
def test_a_content_length_that_is_not_a_number_is_refused(server: Server, length: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", "/status", body=b"{}", headers={"Content-Length": length})
    assert connection.getresponse().status == 400


def test_metrics_without_a_value_are_left_out() -> None:
    state = RunState()
    assert [line for line in format_metrics(state).splitlines() if not line.startswith(("#", "finetune_trainer_time_seconds"))] == [
        "finetune_trainer_healthy 1", 'finetune_trainer_stage{stage="starting"} 1',
    ]  # fmt: skip
    state.record_checkpoint_problem("Reason", "why")
    for step in (5, 9):
        state.add_checkpoint(Checkpoint(step=step, uri="u"), upload_seconds=2.5)
    lines = format_metrics(state).splitlines()
    assert {"finetune_trainer_healthy 0", "finetune_trainer_checkpoint_step 9", "finetune_trainer_checkpoint_seconds 2.5"} <= set(lines)
    assert "# TYPE finetune_trainer_healthy gauge" in lines and format_metrics(state).endswith("\n")


def test_a_kubeflow_report_may_lack_every_field() -> None:
    state = RunState()
    merge_kubeflow_status(state, {"metrics": None})
    merge_kubeflow_status(state, {"progressPercentage": 0, "estimatedRemainingSeconds": 0})
    progress = state.report().progress
    assert (progress.percent, progress.display, progress.seconds_remaining) == (0, "0%", 0)
