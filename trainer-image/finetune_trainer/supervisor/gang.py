"""Connects the ranks of a gang to the TCPStore on the pod of rank 0, so that only pods of the gang can use the store.

torch's TCPStore accepts every connection. Who can connect can read and change all keys, and stop all ranks. Therefore the store listens only
on the loopback interface of rank 0's pod. The supervisor of that pod (`Gate`) listens on the rendezvous port. It passes a connection on to
the store only if the other side proves that it knows the secret of the attempt. The supervisor of each other pod (`Forwarder`) listens on its
own loopback interface, and passes the connections of its ranks on to the gate.

The proof is a challenge and a response in both directions (HMAC-SHA256), so the secret does not cross the network and an old proof is
worthless. The connection is not encrypted: who can change packets between two nodes can still take it over.

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
PROOF_SECONDS = 10.0
MAX_UNPROVEN = 64
"""Connections that have not proven yet. If there are more, the oldest is closed, so that idle connections cannot keep pods of the gang out."""
CONNECT_PAUSE_SECONDS = 0.5
CONNECT_SECONDS = 1800.0
"""How long a forwarder tries to reach the gate: the pod of rank 0 may start much later."""
CHUNK_BYTES = 64 * 1024
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class NotProven(Exception):
    """The other side of a connection did not prove that it belongs to the gang."""


@dataclass(frozen=True)
class StoreAddress:
    """Where this pod's ranks reach the TCPStore, on the loopback interface."""

    port: int
    listener: socket.socket | None = None
    """The bound socket of the store, on the pod of rank 0. The agent creates the store from this socket."""


def connect_gang(world: World, node_rank: int, attempt_secret: str) -> tuple[Gate | Forwarder, StoreAddress]:
    """Start the gate (on the pod of rank 0) or the forwarder of this pod. Errors: InternalError `PortInUse`."""
    key = derive_gang_key(attempt_secret)
    if node_rank > 0:
        forwarder = Forwarder(key, world.master_address, world.master_port)
        return forwarder, StoreAddress(forwarder.port)
    listener = socket.create_server((LOOPBACK, 0))
    store_port = int(listener.getsockname()[1])
    try:
        gate = Gate(key, world.master_port, store_port)
    except OSError as error:
        listener.close()
        raise InternalError("PortInUse", f"port {world.master_port} of the rendezvous cannot be opened: {error.strerror}") from error
    return gate, StoreAddress(store_port, listener)


class _Relay:
    """A server in a thread that passes each accepted connection on to another address."""

    def __init__(self, listener: socket.socket, name: str) -> None:
        self.port = int(listener.getsockname()[1])
        self._listener = listener
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, sock=self._listener, backlog=1024)
        await self._stop.wait()
        server.close()
        connections = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await self._open_other_side(reader, writer)
            await _join((reader, writer), (far_reader, far_writer))
        except NotProven as error:
            log.warning("%s", error)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError) as error:
            log.debug("a connection to the rendezvous ended: %s", error)
        finally:
            writer.close()

    async def _open_other_side(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        raise NotImplementedError

    def close(self) -> None:
        """Close all connections and end the thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(timeout=5)


class Gate(_Relay):
    """Listens on the rendezvous port of rank 0's pod, and passes connections of the gang on to the store."""

    def __init__(self, key: bytes, port: int, store_port: int) -> None:
        self._key = key
        self._store_port = store_port
        self._unproven: dict[asyncio.StreamWriter, None] = {}
        super().__init__(_listen_on_all_interfaces(port), "gang-gate")

    async def _open_other_side(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        if len(self._unproven) >= MAX_UNPROVEN:
            oldest = next(iter(self._unproven))
            del self._unproven[oldest]
            oldest.close()
        self._unproven[writer] = None
        try:
            async with asyncio.timeout(PROOF_SECONDS):
                await check_member(reader, writer, self._key)
        finally:
            self._unproven.pop(writer, None)
        # The agent creates the store after its imports. Until then, the connection waits in the backlog of the bound socket.
        return await asyncio.open_connection(LOOPBACK, self._store_port)


class Forwarder(_Relay):
    """Listens on the loopback interface of another pod, and passes connections of its ranks on to the gate."""

    def __init__(self, key: bytes, host: str, port: int) -> None:
        self._key, self._host, self._port = key, host, port
        super().__init__(socket.create_server((LOOPBACK, 0)), "gang-forwarder")

    async def _open_other_side(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Streams:
        async with asyncio.timeout(CONNECT_SECONDS):
            while True:
                try:
                    return await self._connect()
                except (OSError, asyncio.IncompleteReadError):
                    if reader.at_eof() or writer.is_closing():  # the rank has ended
                        raise
                    await asyncio.sleep(CONNECT_PAUSE_SECONDS)

    async def _connect(self) -> Streams:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            async with asyncio.timeout(PROOF_SECONDS):
                await prove_membership(reader, writer, self._key)
        except BaseException:
            writer.close()
            raise
        return reader, writer


# ---- the proof ----


async def check_member(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    """The gate's part of the proof. Errors: NotProven; OSError, IncompleteReadError if the other side ends the connection."""
    own_nonce = os.urandom(NONCE_BYTES)
    writer.write(own_nonce)
    await writer.drain()
    answer = await reader.readexactly(NONCE_BYTES + PROOF_BYTES)
    nonce, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(key, b"member", own_nonce, nonce)):
        raise NotProven(f"a connection from {_peer(writer)} to the rendezvous was refused: it does not know the secret of this attempt")
    writer.write(_proof(key, b"gate", own_nonce, nonce))
    await writer.drain()


async def prove_membership(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: bytes) -> None:
    """The forwarder's part of the proof. Errors: NotProven if the other side does not know the secret either; OSError, IncompleteReadError."""
    gate_nonce = await reader.readexactly(NONCE_BYTES)
    own_nonce = os.urandom(NONCE_BYTES)
    writer.write(own_nonce + _proof(key, b"member", gate_nonce, own_nonce))
    await writer.drain()
    if not hmac.compare_digest(await reader.readexactly(PROOF_BYTES), _proof(key, b"gate", gate_nonce, own_nonce)):
        raise NotProven(f"the rendezvous at {_peer(writer)} does not know the secret of this attempt: it is not the pod of rank 0")


def _proof(key: bytes, side: bytes, gate_nonce: bytes, member_nonce: bytes) -> bytes:
    """What one side sends to show that it knows the key. `side` differs, so that neither side can send back what it received."""
    return hmac.digest(key, side + gate_nonce + member_nonce, "sha256")


def _peer(writer: asyncio.StreamWriter) -> str:
    address = writer.get_extra_info("peername")
    return str(address[0]) if address else "an unknown address"


# ---- connections ----


async def _join(one: Streams, other: Streams) -> None:
    """Copy bytes in both directions until one side ends, then close both."""
    for _, writer in (one, other):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    tasks = [asyncio.ensure_future(_copy(one[0], other[1])), asyncio.ensure_future(_copy(other[0], one[1]))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        one[1].close()
        other[1].close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()


def _listen_on_all_interfaces(port: int) -> socket.socket:
    """Listen on IPv4 and IPv6: a pod may have either."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))

