"""Connects the ranks of a gang to the TCPStore on the pod of rank 0, so that only pods of the gang can use the store.

torch's TCPStore accepts every connection. A program that can connect can read and change all keys, and stop all ranks. Therefore the store
listens on the loopback interface of rank 0's pod only. The supervisor of that pod listens on the rendezvous port (`Gate`). The gate passes a
connection on to the store only if the other side proves that it knows the secret of the attempt. The supervisor of each other pod listens on its own
loopback interface, and passes the connections of its ranks on to the gate (`Forwarder`).

The proof is a challenge and a response in both directions (HMAC-SHA256), so the secret does not cross the network, and an old proof cannot be used
again. The connection is not encrypted: an attacker who can change packets between two nodes can still take over the connection.

Each supervisor runs one asyncio loop in a thread. A gang of 64 pods with 8 ranks each has about 1,500 connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import threading
from dataclasses import dataclass

from finetune_api.attempt_secret import derive_gang_key
from finetune_api.errors import InternalError
from finetune_api.pod import World

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
NONCE_BYTES = 32
PROOF_BYTES = 32
PROOF_TIMEOUT_SECONDS = 10.0
MAX_UNPROVEN_CONNECTIONS = 64
"""Maximum number of connections whose other side has not yet sent a proof. If this number is exceeded, the oldest is closed, so that idle connections
do not keep pods of the gang out."""
CONNECT_PAUSE_SECONDS = 0.5
CONNECT_TIMEOUT_SECONDS = 1800.0
"""How long a forwarder tries to reach the gate. The time is long, because the pod of rank 0 may start much later than the forwarder's pod."""
CHUNK_BYTES = 64 * 1024
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class NotProvenError(Exception):
    """Raised if the other side of a connection does not prove that it belongs to the gang."""


@dataclass(frozen=True)
class StoreAddress:
    """The address at which the ranks of this pod reach the TCPStore: a port of the loopback interface."""

    port: int
    listener: socket.socket | None = None
    """In rank 0's pod, the bound socket from which the agent creates the store; None in the other pods."""


def connect_gang(world: World, node_rank: int, attempt_secret: str) -> tuple[Gate | Forwarder, StoreAddress]:
    """Start the gate if this is rank 0's pod, otherwise the forwarder of this pod. Errors: InternalError `PortInUse`."""
    gang_key = derive_gang_key(attempt_secret)
    if node_rank > 0:
        forwarder = Forwarder(gang_key, world.master_address, world.master_port)
        return forwarder, StoreAddress(forwarder.port)
    listener = socket.create_server((LOOPBACK, 0))
    store_port = int(listener.getsockname()[1])
    try:
        gate = Gate(gang_key, world.master_port, store_port)
    except OSError as error:
        listener.close()
        raise InternalError("PortInUse", f"port {world.master_port} of the rendezvous cannot be opened: {error.strerror}") from error
    return gate, StoreAddress(store_port, listener)


class _Relay:
    """A server in a thread that passes each accepted connection on to another address."""

    def __init__(self, listener: socket.socket, thread_name: str) -> None:
        self.port = int(listener.getsockname()[1])
        self._listener = listener
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=thread_name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, sock=self._listener, backlog=1024)
        await self._stop.wait()
        server.close()
        connection_tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in connection_tasks:
            task.cancel()
        await asyncio.gather(*connection_tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await self._open_far_side(reader, writer)
            await _copy_both_ways((reader, writer), (far_reader, far_writer))
        except NotProvenError as error:
            log.warning("%s", error)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError) as error:
            log.debug("a connection to the rendezvous ended: %s", error)
        finally:
            writer.close()

    async def _open_far_side(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        raise NotImplementedError

    def close(self) -> None:
        """Close all connections and end the thread."""
        with contextlib.suppress(RuntimeError):  # The event loop has already ended.
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=5)


class Gate(_Relay):
    """Listens on the rendezvous port of rank 0's pod, and passes connections of the gang on to the store."""

    def __init__(self, gang_key: bytes, port: int, store_port: int) -> None:
        self._gang_key = gang_key
        self._store_port = store_port
        self._unproven_connections: dict[asyncio.StreamWriter, None] = {}
        super().__init__(_listen_on_all_interfaces(port), "gang-gate")

    async def _open_far_side(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        if len(self._unproven_connections) >= MAX_UNPROVEN_CONNECTIONS:
            oldest_connection = next(iter(self._unproven_connections))
            del self._unproven_connections[oldest_connection]
            oldest_connection.close()
        self._unproven_connections[writer] = None
        try:
            async with asyncio.timeout(PROOF_TIMEOUT_SECONDS):
                await check_member(reader, writer, self._gang_key)
        finally:
            self._unproven_connections.pop(writer, None)
        # The agent creates the store after its imports. Until then, the connection waits in the backlog of the bound socket.
        return await asyncio.open_connection(LOOPBACK, self._store_port)


class Forwarder(_Relay):
    """Listens on the loopback interface of a pod without rank 0, and passes the connections of the pod's ranks on to the gate."""

    def __init__(self, gang_key: bytes, gate_host: str, gate_port: int) -> None:
        self._gang_key, self._gate_host, self._gate_port = gang_key, gate_host, gate_port
        super().__init__(socket.create_server((LOOPBACK, 0)), "gang-forwarder")

    async def _open_far_side(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
            while True:
                try:
                    return await self._connect()
                except (OSError, asyncio.IncompleteReadError):
                    if reader.at_eof() or writer.is_closing():  # The rank has closed its connection.
                        raise
                    await asyncio.sleep(CONNECT_PAUSE_SECONDS)

    async def _connect(self) -> Streams:
        reader, writer = await asyncio.open_connection(self._gate_host, self._gate_port)
        try:
            async with asyncio.timeout(PROOF_TIMEOUT_SECONDS):
                await prove_membership(reader, writer, self._gang_key)
        except BaseException:
            writer.close()
            raise
        return reader, writer


# ---- the proof ----


async def check_member(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gang_key: bytes) -> None:
    """Check, as the gate, that the other side knows the key, and prove that the gate knows it.

    Errors: NotProvenError if the other side does not know the key; OSError, IncompleteReadError if it ends the connection.
    """
    gate_nonce = os.urandom(NONCE_BYTES)
    writer.write(gate_nonce)
    await writer.drain()
    answer = await reader.readexactly(NONCE_BYTES + PROOF_BYTES)
    member_nonce, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _compute_proof(gang_key, b"member", gate_nonce, member_nonce)):
        raise NotProvenError(f"the rendezvous refused a connection from {_get_peer_address(writer)}: the other side does not know the secret of this attempt")
    writer.write(_compute_proof(gang_key, b"gate", gate_nonce, member_nonce))
    await writer.drain()


async def prove_membership(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gang_key: bytes) -> None:
    """Prove to the gate, as a forwarder, that this side knows the key, and check that the gate knows it.

    Errors: NotProvenError if the other side does not know the key; OSError, IncompleteReadError if it ends the connection.
    """
    gate_nonce = await reader.readexactly(NONCE_BYTES)
    member_nonce = os.urandom(NONCE_BYTES)
    writer.write(member_nonce + _compute_proof(gang_key, b"member", gate_nonce, member_nonce))
    await writer.drain()
    if not hmac.compare_digest(await reader.readexactly(PROOF_BYTES), _compute_proof(gang_key, b"gate", gate_nonce, member_nonce)):
        raise NotProvenError(f"the rendezvous at {_get_peer_address(writer)} does not know the secret of this attempt: it is not the pod of rank 0")


def _compute_proof(gang_key: bytes, side: bytes, gate_nonce: bytes, member_nonce: bytes) -> bytes:
    """Return the proof that one side sends to show that it knows the key.

    `side` is part of the proof, so that a side cannot return a received proof as if it were its own.
    """
    return hmac.digest(gang_key, side + gate_nonce + member_nonce, "sha256")


def _get_peer_address(writer: asyncio.StreamWriter) -> str:
    address = writer.get_extra_info("peername")
    return str(address[0]) if address else "an unknown address"


# ---- connections ----


async def _copy_both_ways(near_side: Streams, far_side: Streams) -> None:
    """Copy bytes in both directions until one side closes its connection, then close both connections."""
    for _, writer in (near_side, far_side):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tasks = [asyncio.ensure_future(_copy(near_side[0], far_side[1])), asyncio.ensure_future(_copy(far_side[0], near_side[1]))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        near_side[1].close()
        far_side[1].close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


def _listen_on_all_interfaces(port: int) -> socket.socket:
    """Listen on IPv4 and IPv6, because a pod may have only one of them."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))

