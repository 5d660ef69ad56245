"""The pod's HTTP server starts without delay, listens on IPv4 and IPv6, and serves progress and metrics."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest
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


def test_metrics_have_the_prometheus_format() -> None:
    state = RunState()
    state.record_step(7)
    state.increment_counter("checkpoints", 2)
    lines = format_metrics(state).splitlines()
    assert "finetune_trainer_step 7" in lines and "finetune_trainer_checkpoints_total 2" in lines
    assert 'finetune_trainer_stage{stage="starting"} 1' in lines
