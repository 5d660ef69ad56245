"""An HTTP proxy that breaks what passes through it, on purpose and on command.

Tests of promises such as "a lost answer creates no second Job" need a network that fails at a chosen request, not a
mocked client: the same bytes, the same client library, the same server. This module is the engine; `s3proxy` and
`apiproxy` know what the requests mean. It signs nothing and changes nothing that no fault asks for: path, query and
headers go through as they came, `Host` included, so that signatures hold.

It runs an event loop in a thread of its own, so that synchronous tests can use it as a context manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import struct
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, Self, TypeVar

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

Chunks = AsyncIterator[bytes]
Shape = Callable[[Chunks], Chunks]
"""A transformation of a body in transit."""

HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect",
}  # fmt: skip
BODILESS = (204, 304)
SETTLED = 2.0
"""Seconds within which an answer that has begun should be in the log."""
PIECE = 16 * 1024
"""Bytes handed on at once where a rate is kept."""


class EndedEarly(Exception):
    """Raised by a shape: close the connection here, although more was promised."""


class Broken(Exception):
    """Raised by a fault: reset the connection, so that the client receives no response."""


@dataclass(frozen=True)
class Exchange:
    """One request and its result."""

    number: int
    operation: str
    """Operation in the terms of the protocol: `PutObject`, `create jobs`."""
    method: str
    path: str
    query: Mapping[str, str]
    status: int
    """Status code that the client received; 0: none."""
    applied: int
    """Status code of the server; 0: the request did not reach it, or it did not respond."""
    fault: str
    """Name of the fault that was applied; empty: none."""
    started: float
    """Seconds on the monotonic clock."""
    seconds: float
    request_bytes: int
    response_bytes: int


class Operation(Protocol):
    """The operation of a request."""

    @property
    def label(self) -> str:
        """One or two words for logs and assertions."""

    @property
    def endless(self) -> bool:
        """Whether the response never ends by itself: a watch."""


Op = TypeVar("Op", bound=Operation)


@dataclass
class Call(Generic[Op]):
    """A request on its way through the proxy; faults act on it."""

    proxy: FaultProxy[Op]
    request: web.BaseRequest
    operation: Op
    applied: int = 0
    status: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    continued: bool = False

    async def forward(self, *, up: Shape | None = None, down: Shape | None = None) -> web.StreamResponse:
        """Send the request on and the answer back, each through a shape."""
        async with self._upstream(up) as answer:
            self.applied = answer.status
            reply = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_passed_on(answer.headers))
            if "Content-Length" not in answer.headers and answer.status not in BODILESS and answer.method != "HEAD":
                reply.enable_chunked_encoding()
            self.begin(answer.status)
            await reply.prepare(self.request)
            chunks: Chunks = answer.content.iter_any()
            try:
                async for chunk in down(chunks) if down else chunks:
                    self.response_bytes += len(chunk)
                    await reply.write(chunk)
            except EndedEarly:
                await self.close()
                return reply
            await reply.write_eof()
            return reply

    async def apply(self) -> tuple[bytes, CIMultiDict[str]]:
        """Forward the request without passing on the response; returns the response's body and headers."""
        async with self._upstream(None) as answer:
            self.applied = answer.status
            return await answer.read(), _passed_on(answer.headers)

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
        """Respond to the client without forwarding."""
        await self._continue()
        async for chunk in self.request.content.iter_any():
            self.request_bytes += len(chunk)
        self.begin(status)
        self.response_bytes = len(body)
        reply = web.Response(status=status, body=b"" if self.request.method == "HEAD" else body, headers=headers)
        await reply.prepare(self.request)
        await reply.write_eof()
        return reply

    def begin(self, status: int) -> None:
        """The client is about to see this status code."""
        self.status = status
        if not self.operation.endless:
            self.proxy.answering(1)

    async def close(self) -> None:
        """Close the connection in the middle of what is being sent, with what was written delivered."""
        transport = self.request.transport
        if transport is not None:
            transport.close()

    @contextlib.asynccontextmanager
    async def _upstream(self, up: Shape | None) -> AsyncIterator[aiohttp.ClientResponse]:
        await self._continue()
        request = self.request
        headers = _passed_on(request.headers)
        body: Chunks | None = None
        if request.can_read_body:
            raw: Chunks = request.content.iter_any()
            body = self._counted(up(raw) if up else raw)
        target = URL(self.proxy.upstream + request.raw_path, encoded=True)
        try:
            answer = await self.proxy.session.request(
                request.method, target, headers=headers, data=body, allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )  # fmt: skip
        except aiohttp.ClientError as error:
            raise Broken from error
        async with answer:
            try:
                yield answer
            except aiohttp.ClientPayloadError as error:
                raise Broken from error

    async def _continue(self) -> None:
        if not self.continued and self.request.headers.get("Expect", "").lower() == "100-continue":
            self.continued = True
            writer = self.request.writer
            await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.output_size = 0

    async def _counted(self, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            self.request_bytes += len(chunk)
            yield chunk


class Fault(Protocol):
    """A fault of a request."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        """Handle the request instead of the proxy. Raise Broken to reset the connection."""


@dataclass(frozen=True)
class Latency:
    """Delay the request; a client that gives up before has changed nothing."""

    seconds: float

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await asyncio.sleep(self.seconds)
        return await call.forward()


@dataclass(frozen=True)
class LateAnswer:
    """Delay the response; the server executes the request at once."""

    seconds: float

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        body, headers = await call.apply()
        await asyncio.sleep(self.seconds)
        return await call.answer(call.applied, body, headers)


@dataclass(frozen=True)
class Bandwidth:
    """Limit both bodies to a rate in bytes per second."""

    rate: float

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        return await call.forward(up=self._slowly, down=self._slowly)

    async def _slowly(self, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            for start in range(0, len(chunk), PIECE):
                piece = chunk[start : start + PIECE]
                await asyncio.sleep(len(piece) / self.rate)
                yield piece


@dataclass(frozen=True)
class Status:
    """Respond with an error of the server's format; the request does not reach the server."""

    code: int
    reason: str = ""
    retry_after: int | None = None

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        body, headers = call.proxy.refusal(self.code, self.reason)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return await call.answer(self.code, body, headers)


@dataclass(frozen=True)
class StatusAfter:
    """The server executes the request, and the client receives an error."""

    code: int
    reason: str = ""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await call.apply()
        return await call.answer(self.code, *call.proxy.refusal(self.code, self.reason))


@dataclass(frozen=True)
class Reset:
    """The connection is reset before the server sees the request."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        raise Broken


@dataclass(frozen=True)
class LostResponse:
    """The server executes the request, and the connection is reset before the client receives the response."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await call.apply()
        raise Broken


@dataclass(frozen=True)
class Blackhole:
    """Never respond; ends when the client gives up or the proxy is closed. The request does not reach the server."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await asyncio.get_running_loop().create_future()
        raise Broken


@dataclass(frozen=True)
class Truncate:
    """The response announces its full length and ends after `length` bytes of body."""

    length: int

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        return await call.forward(down=self._cut)

    async def _cut(self, chunks: Chunks) -> Chunks:
        left = self.length
        async for chunk in chunks:
            if len(chunk) > left:
                if left:
                    yield chunk[:left]
                raise EndedEarly
            left -= len(chunk)
            yield chunk


@dataclass(frozen=True)
class FlipByte:
    """Change one byte of the response's body: the one at `offset`, if the body is that long."""

    offset: int

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        return await call.forward(down=self._flip)

    async def _flip(self, chunks: Chunks) -> Chunks:
        seen = 0
        async for chunk in chunks:
            at = self.offset - seen
            seen += len(chunk)
            yield chunk[:at] + bytes([chunk[at] ^ 0xFF]) + chunk[at + 1 :] if 0 <= at < len(chunk) else chunk


@dataclass(eq=False)
class Rule(Generic[Op]):
    """A fault, and for which requests. A context manager: it holds until the block ends."""

    proxy: FaultProxy[Op]
    fault: Fault
    matches: Callable[[Op], bool]
    times: int | None
    skip: int
    probability: float
    hits: int = 0
    """Number of requests it was applied to."""
    seen: int = 0
    """Number of requests it matched."""

    @property
    def name(self) -> str:
        return type(self.fault).__name__

    def take(self, operation: Op, chance: random.Random) -> bool:
        """Whether the fault applies to this request; counts matches."""
        if not self.matches(operation) or (self.times is not None and self.hits >= self.times):
            return False
        self.seen += 1
        if self.seen <= self.skip or (self.probability < 1 and chance.random() >= self.probability):
            return False
        self.hits += 1
        return True

    def remove(self) -> None:
        """Remove the fault. Repeating it is harmless."""
        self.proxy.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


@dataclass
class _Running:
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    stop: asyncio.Event
    port: int
    session: aiohttp.ClientSession


@dataclass
class _Starting:
    done: threading.Event = field(default_factory=threading.Event)
    running: _Running | None = None
    error: BaseException | None = None


class FaultProxy(ABC, Generic[Op]):
    """The engine. `upstream` is an address such as `http://127.0.0.1:9000`; `seed` decides where probabilities strike.

    Errors: OSError if it cannot listen.
    """

    def __init__(
        self, upstream: str, *, seed: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.upstream = upstream.rstrip("/")
        self._tls = tls
        self._chance = random.Random(seed)
        self._rules: list[Rule[Op]] = []
        self._log: list[Exchange] = []
        self._answering = 0
        self._changed = threading.Condition()
        self._running: _Running | None = None

    @abstractmethod
    def describe(self, request: web.BaseRequest) -> Op:
        """The operation of a request."""

    @abstractmethod
    def refusal(self, code: int, reason: str) -> tuple[bytes, dict[str, str]]:
        """Body and headers of an error as the server would send it."""

    # -- what tests use ------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Address that clients use instead of the server's."""
        assert self._running is not None, "the proxy is not started: use it in a with statement"
        return f"http://127.0.0.1:{self._running.port}"

    def strike(
        self, fault: Fault, matches: Callable[[Op], bool], *,
        times: int | None = None, skip: int = 0, probability: float = 1.0,
    ) -> Rule[Op]:  # fmt: skip
        """Apply `fault` to requests that match: the first `skip` excepted, `times` at most, each with a probability."""
        rule = Rule(self, fault, matches, times, skip, probability)
        with self._changed:
            self._rules.append(rule)
        return rule

    def remove(self, rule: Rule[Op]) -> None:
        """Remove a rule."""
        with self._changed:
            self._rules = [kept for kept in self._rules if kept is not rule]

    def clear(self) -> None:
        """Remove all rules; the log stays."""
        with self._changed:
            self._rules = []

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All exchanges so far, in the order of their ends. A response that a client has received completely is included."""
        with self._changed:
            self._changed.wait_for(lambda: not self._answering, SETTLED)
            return tuple(self._log)

    def forget(self) -> None:
        """Empty the log."""
        with self._changed:
            self._changed.wait_for(lambda: not self._answering, SETTLED)
            self._log.clear()

    def count(self, operation: str) -> int:
        """Requests of that operation so far, in whatever way they ended."""
        return sum(exchange.operation == operation for exchange in self.exchanges)

    def wait_for(self, matches: Callable[[Exchange], bool], *, timeout: float = 20.0) -> Exchange:
        """The first exchange that matches, past ones included. TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        looked = 0
        with self._changed:
            while True:
                for exchange in self._log[looked:]:
                    if matches(exchange):
                        return exchange
                looked = len(self._log)
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    if any(matches(exchange) for exchange in self._log[looked:]):
                        continue
                    raise TimeoutError(f"no such request within {timeout:.0f} s; {len(self._log)} others passed")

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen on a free port of the loopback."""
        starting = _Starting()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(starting)), name="fault-proxy", daemon=True)
        thread.start()
        starting.done.wait()
        if starting.error is not None:
            raise starting.error
        self._running = starting.running
        return self

    def stop(self) -> None:
        """End all connections. Repeating it is harmless."""
        running, self._running = self._running, None
        if running is not None:
            running.loop.call_soon_threadsafe(running.stop.set)
            running.thread.join(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def do(self, action: Callable[[], None]) -> None:
        """Run something in the proxy's loop and wait for it."""
        assert self._running is not None, "the proxy is not started"

        async def run() -> None:
            action()

        asyncio.run_coroutine_threadsafe(run(), self._running.loop).result(10)

    @property
    def session(self) -> aiohttp.ClientSession:
        """Connections to the server."""
        assert self._running is not None
        return self._running.session

    async def _serve(self, starting: _Starting) -> None:
        try:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            # A fresh connection each time without TLS: the server behind may be restarted in the middle of a test.
            connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True, force_close=self._tls is None)
            session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=10),
            )  # fmt: skip
            server = web.Server(self._handle, handler_cancellation=True, access_log=None)
            runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=0)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            starting.running = _Running(loop, threading.current_thread(), stop, port, session)
            self._running = starting.running
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            starting.error = error
            starting.done.set()
            return
        starting.done.set()
        await stop.wait()
        await runner.cleanup()
        await session.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        call = Call(self, request, self.describe(request))
        with self._changed:
            rule = next((rule for rule in self._rules if rule.take(call.operation, self._chance)), None)
        started = time.monotonic()
        try:
            return await (rule.fault.handle(call) if rule else self.relay(call))
        except (Broken, ConnectionError, aiohttp.ClientError):
            _reset(request)
            # The connection is gone: this answer is for the server's bookkeeping alone.
            return web.Response(status=502)
        finally:
            self._note(call, rule.name if rule else "", started)

    def relay(self, call: Call[Op]) -> Awaitable[web.StreamResponse]:
        """Forward a request that no rule applies to."""
        return call.forward()

    def answering(self, count: int) -> None:
        """So many more answers have begun, and are not in the log yet."""
        with self._changed:
            self._answering += count

    def _note(self, call: Call[Op], fault: str, started: float) -> None:
        request = call.request
        with self._changed:
            self._log.append(
                Exchange(
                    number=len(self._log), operation=call.operation.label, method=request.method, path=request.path,
                    query=dict(request.query), status=call.status, applied=call.applied, fault=fault, started=started,
                    seconds=time.monotonic() - started, request_bytes=call.request_bytes,
                    response_bytes=call.response_bytes,
                )  # fmt: skip
            )
            self._answering -= 1 if call.status and not call.operation.endless else 0
            self._changed.notify_all()


def _passed_on(headers: Mapping[str, str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP)


def _reset(request: web.BaseRequest) -> None:
    """Close with RST: buffered data are discarded, and the client's next read fails."""
    transport = request.transport
    if transport is None:
        return
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):  # the client was faster
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


@contextlib.contextmanager
def all_of(*rules: Rule[Any]) -> Iterator[None]:
    """Several rules for one block."""
    with contextlib.ExitStack() as stack:
        for rule in rules:
            stack.enter_context(rule)
        yield
