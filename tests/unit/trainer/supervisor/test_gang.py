"""The connections of a gang: only pods that know the secret of the attempt reach the store of rank 0's pod."""

from __future__ import annotations

import contextlib
import hmac
import logging
import socket
import threading
from collections.abc import Iterator

import pytest
from finetune_api.attempt_secret import derive_attempt_secret, derive_gang_key
from finetune_api.errors import InternalError
from finetune_api.pod import World
from finetune_trainer.supervisor import gang as subject
from finetune_trainer.supervisor.gang import Forwarder, Gate, connect_gang

from localcluster.ports import find_free_ports

SECRET, OTHER_SECRET = derive_attempt_secret(b"key", "uid", 1), derive_attempt_secret(b"key", "uid", 2)
KEY, OTHER_KEY = derive_gang_key(SECRET), derive_gang_key(OTHER_SECRET)


class EchoStore:
    """Replaces the TCPStore. It sends received bytes back in upper case, and counts its connections."""

    def __init__(self, listener: socket.socket | None = None) -> None:
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.connection_count = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connection_count += 1
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                if data == b"close":
                    return
                connection.sendall(data.upper())

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def store() -> Iterator[EchoStore]:
    echo_store = EchoStore()
    yield echo_store
    echo_store.close()


@pytest.fixture
def gate(store: EchoStore) -> Iterator[Gate]:
    new_gate = Gate(KEY, 0, store.port)
    yield new_gate
    new_gate.close()


@contextlib.contextmanager
def run_forwarder(port: int, key: bytes = KEY) -> Iterator[Forwarder]:
    new_forwarder = Forwarder(key, "127.0.0.1", port)
    try:
        yield new_forwarder
    finally:
        new_forwarder.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def receive(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (chunk := connection.recv(65536)):
        data += chunk
    return data


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side closes the connection without an answer."""
    try:
        return receive(connection, 1) == b""
    except ConnectionResetError:
        return True


def test_a_pod_of_the_gang_reaches_the_store(gate: Gate) -> None:
    with run_forwarder(gate.port) as own_forwarder, connect(own_forwarder.port) as first_connection, connect(own_forwarder.port) as second_connection:
        for connection, text in ((first_connection, b"hello"), (second_connection, b"x" * 3_000_000), (first_connection, b"again")):
            threading.Thread(target=connection.sendall, args=(text,), daemon=True).start()
            assert receive(connection, len(text)) == text.upper()


def test_a_pod_with_another_secret_does_not_reach_the_store(gate: Gate, store: EchoStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), run_forwarder(gate.port, OTHER_KEY) as own_forwarder, connect(own_forwarder.port) as connection:
        connection.sendall(b"hello")
        own_forwarder._loop.call_soon_threadsafe(own_forwarder._stop.set)  # A forwarder with another secret tries again until it is stopped.
        assert is_closed(connection)
    assert store.connection_count == 0


@pytest.mark.parametrize("answer", [b"", b"hello", bytes(64), b"GET /progress HTTP/1.1\r\n\r\n" + bytes(64)])
def test_a_connection_without_a_proof_gets_only_a_random_number(gate: Gate, store: EchoStore, answer: bytes) -> None:
    with connect(gate.port) as connection:
        assert len(receive(connection, 32)) == 32
        connection.sendall(answer)
        connection.shutdown(socket.SHUT_WR)
        assert is_closed(connection)
    assert store.connection_count == 0


def test_an_old_proof_is_refused(gate: Gate, store: EchoStore) -> None:
    """An attacker that has recorded the proof of a pod cannot use it again, because each connection has another challenge."""
    with connect(gate.port) as connection:
        challenge, nonce = receive(connection, 32), bytes(32)
        recorded_proof = nonce + hmac.digest(KEY, b"member" + challenge + nonce, "sha256")
        connection.sendall(recorded_proof)
        assert receive(connection, 32) == hmac.digest(KEY, b"gate" + challenge + nonce, "sha256")
        connection.sendall(b"hello")
        assert receive(connection, 5) == b"HELLO"
    with connect(gate.port) as connection:
        assert receive(connection, 32) != challenge
        connection.sendall(recorded_proof)
        assert is_closed(connection)
    assert store.connection_count == 1


def test_a_false_pod_of_rank_0_gets_no_bytes_of_the_ranks(caplog: pytest.LogCaptureFixture) -> None:
    """An attacker that takes the address of rank 0's pod receives only the proof of the forwarder."""
    with socket.create_server(("127.0.0.1", 0)) as false_gate, run_forwarder(false_gate.getsockname()[1]) as own_forwarder, connect(own_forwarder.port) as rank:
        rank.sendall(b"keys of the ranks")
        connection, _ = false_gate.accept()
        with connection:
            connection.sendall(bytes(32))
            assert len(receive(connection, 64)) == 64
            connection.sendall(bytes(32))
            assert receive(connection, 1) == b""
        assert is_closed(rank)
    assert "does not know the secret of this attempt: it is not the pod of rank 0" in caplog.text


def test_idle_connections_do_not_keep_the_pods_of_the_gang_out(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = [connect(gate.port) for _ in range(3 * subject.MAX_UNPROVEN_CONNECTIONS)]
    with run_forwarder(gate.port) as own_forwarder, connect(own_forwarder.port) as connection:
        connection.sendall(b"hello")
        assert receive(connection, 5) == b"HELLO"
        assert all(len(receive(stranger, 33)) == 32 for stranger in strangers[: 2 * subject.MAX_UNPROVEN_CONNECTIONS])  # each stranger receives a challenge
        assert len(gate._unproven_connections) <= subject.MAX_UNPROVEN_CONNECTIONS
    for stranger in strangers:
        stranger.close()


def test_an_idle_connection_is_closed_after_the_timeout(store: EchoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "PROOF_TIMEOUT_SECONDS", 0.01)
    gate = Gate(KEY, 0, store.port)
    with connect(gate.port) as stranger:
        assert len(receive(stranger, 33)) == 32
    gate.close()


def test_a_rank_waits_for_a_pod_of_rank_0_that_starts_later(store: EchoStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "CONNECT_PAUSE_SECONDS", 0.01)
    (port,) = find_free_ports(1)
    with run_forwarder(port) as own_forwarder, connect(own_forwarder.port) as connection:
        connection.sendall(b"early")
        gate = Gate(KEY, port, store.port)
        assert receive(connection, 5) == b"EARLY"
        gate.close()


@pytest.mark.parametrize("end", ["store", "gate"])
def test_the_end_of_the_store_or_the_gate_ends_the_connection_of_the_rank(gate: Gate, end: str) -> None:
    with run_forwarder(gate.port) as own_forwarder, connect(own_forwarder.port) as connection:
        connection.sendall(b"hello")
        assert receive(connection, 5) == b"HELLO"
        if end == "store":
            connection.sendall(b"close")
        else:
            gate.close()
        assert is_closed(connection)


def make_world(port: int) -> World:
    return World(nodes=2, processes_per_node=1, gpus_per_node=0, master_address="127.0.0.1", master_port=port, rendezvous_id="r")


def test_the_pods_of_a_gang_connect_with_their_secret() -> None:
    """The connection waits until the agent has created the store from the bound socket."""
    (port,) = find_free_ports(1)
    gate, address = connect_gang(make_world(port), 0, SECRET)
    other_pod, other_address = connect_gang(make_world(port), 1, SECRET)
    assert address.listener is not None and address.listener.getsockname() == ("127.0.0.1", address.port)
    assert other_address.listener is None and other_address.port not in (port, address.port)
    with connect(other_address.port) as connection:
        connection.sendall(b"hello")
        late_store = EchoStore(address.listener)
        assert receive(connection, 5) == b"HELLO"
    late_store.close()
    other_pod.close()
    gate.close()


def test_a_port_in_use_is_an_error_with_a_code() -> None:
    with socket.create_server(("", 0)) as bound_socket, pytest.raises(InternalError) as error:
        connect_gang(make_world(bound_socket.getsockname()[1]), 0, SECRET)
    assert error.value.code == "PortInUse"
