"""The pod's HTTP server is there at once, under addresses of either kind, or says why not."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest
from finetune_trainer.supervisor.board import Board
from finetune_trainer.supervisor.server import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    def asked(*_: object) -> str:
        raise AssertionError("a name server that does not answer would hold up the pod's start")

    monkeypatch.setattr(socket, "getfqdn", asked)
    made = Server(Board(), 0)
    yield made
    made.close()


def loopback(family: socket.AddressFamily, address: str) -> bool:
    try:
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_it_answers_under_both_kinds_of_address(server: Server, host: str) -> None:
    if host == "[::1]" and not loopback(socket.AF_INET6, "::1"):
        pytest.skip("this machine has no IPv6 loopback")
    with urllib.request.urlopen(f"http://{host}:{server.port}/healthz", timeout=20) as answer:
        assert answer.read() == b"ok\n"
    body = b'{"trainerStatus": {"progressPercentage": 3}}'
    with urllib.request.urlopen(
        urllib.request.Request(f"http://{host}:{server.port}/x/status", body, method="POST"), timeout=20
    ) as answer:
        assert answer.status == 200
