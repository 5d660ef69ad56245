"""An HTTP proxy that injects faults into chosen requests.

The client library and the server are real, but the network between them fails at a chosen request. A test can thus check that, for example, the
operator creates no second Job if the response to the first creation is lost. This module does not depend on the protocol; `s3proxy` and `apiproxy`
parse the requests. The proxy forwards path, query and headers (including `Host`) unchanged, so the signatures of requests stay valid.

The proxy's event loop runs in a separate thread, so synchronous tests can use the proxy in a `with` block.
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
BodyTransform = Callable[[Chunks], Chunks]

HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect",
}  # fmt: skip
STATUS_WITHOUT_BODY = (204, 304)
LOG_WAIT_SECONDS = 2.0
"""Maximum time to wait until the log contains every response whose sending has begun."""
PIECE_BYTES = 16 * 1024
"""Size of the pieces in which a rate-limited body is forwarded."""


class TruncatedBody(Exception):
    """Raised by a body transform: the proxy then closes the connection before it has sent the announced length."""


class ConnectionBroken(Exception):
    """Raised by a fault: the proxy then resets the connection, and the client receives no response."""


@dataclass(frozen=True)
class Exchange:
    """One request and its result."""

    number: int
    operation: str
    """Name of the operation in the protocol, such as `PutObject` or `create jobs`."""
    method: str
    path: str
    query: Mapping[str, str]
    client_status: int
    """Status code that the client received; 0 if it received no response."""
    server_status: int
    """Status code of the server's response; 0 if the server did not receive the request or did not respond."""
    fault_name: str
    """Name of the applied fault; empty if no fault was applied."""
    started_at: float
    """Arrival time of the request, in seconds of the monotonic clock."""
    seconds: float
    request_bytes: int
    response_bytes: int


class Operation(Protocol):
    """A parsed request."""

    @property
    def label(self) -> str:
        """Short name of the operation in the log and in assertions, such as `PutObject`."""

    @property
    def is_endless(self) -> bool:
        """Whether the server keeps the response open without an end, as it does for a watch."""


Op = TypeVar("Op", bound=Operation)


@dataclass
class Call(Generic[Op]):
    """A request that the proxy is handling. The fault that applies to the request calls one of these methods, which forward or answer the request."""

    proxy: FaultProxy[Op]
    request: web.BaseRequest
    operation: Op
    server_status: int = 0
    client_status: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    sent_continue: bool = False

    async def forward(
        self, *, request_transform: BodyTransform | None = None, response_transform: BodyTransform | None = None
    ) -> web.StreamResponse:
        """Forward the request to the server, and the response to the client. `request_transform` and `response_transform` may change the bodies."""
        async with self._forward_request(request_transform) as server_response:
            self.server_status = server_response.status
            headers = _select_forwarded_headers(server_response.headers)
            response = web.StreamResponse(status=server_response.status, reason=server_response.reason, headers=headers)
            if "Content-Length" not in server_response.headers and server_response.status not in STATUS_WITHOUT_BODY and server_response.method != "HEAD":
                response.enable_chunked_encoding()
            self.begin_response(server_response.status)
            await response.prepare(self.request)
            chunks: Chunks = server_response.content.iter_any()
            try:
                async for chunk in response_transform(chunks) if response_transform else chunks:
                    self.response_bytes += len(chunk)
                    await response.write(chunk)
            except TruncatedBody:
                await self.close()
                return response
            await response.write_eof()
            return response

    async def execute_on_server(self) -> tuple[bytes, CIMultiDict[str]]:
        """Forward the request to the server, but send no response to the client. Returns the body and headers of the server's response."""
        async with self._forward_request(None) as server_response:
            self.server_status = server_response.status
            return await server_response.read(), _select_forwarded_headers(server_response.headers)

    async def send_answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> web.StreamResponse:
        """Answer the client without the server."""
        await self._send_continue()
        async for chunk in self.request.content.iter_any():
            self.request_bytes += len(chunk)
        self.begin_response(status)
        self.response_bytes = len(body)
        response = web.Response(status=status, body=b"" if self.request.method == "HEAD" else body, headers=headers)
        await response.prepare(self.request)
        await response.write_eof()
        return response

    def begin_response(self, status: int) -> None:
        """Record the status code that the client is about to receive."""
        self.client_status = status
        if not self.operation.is_endless:
            self.proxy.count_begun_responses(1)

    async def close(self) -> None:
        """Close the connection in the middle of the response. The client still receives the bytes that are already written."""
        transport = self.request.transport
        if transport is not None:
            transport.close()

    @contextlib.asynccontextmanager
    async def _forward_request(self, request_transform: BodyTransform | None) -> AsyncIterator[aiohttp.ClientResponse]:
        await self._send_continue()
        request = self.request
        headers = _select_forwarded_headers(request.headers)
        body: Chunks | None = None
        if request.can_read_body:
            request_chunks: Chunks = request.content.iter_any()
            body = self._count_bytes(request_transform(request_chunks) if request_transform else request_chunks)
        url = URL(self.proxy.upstream + request.raw_path, encoded=True)
        try:
            server_response = await self.proxy.session.request(
                request.method, url, headers=headers, data=body, allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )  # fmt: skip
        except aiohttp.ClientError as error:
            raise ConnectionBroken from error
        async with server_response:
            try:
                yield server_response
            except aiohttp.ClientPayloadError as error:
                raise ConnectionBroken from error

    async def _send_continue(self) -> None:
        if not self.sent_continue and self.request.headers.get("Expect", "").lower() == "100-continue":
            self.sent_continue = True
            writer = self.request.writer
            await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.output_size = 0

    async def _count_bytes(self, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            self.request_bytes += len(chunk)
            yield chunk


class Fault(Protocol):
    """A failure that the proxy injects into a request."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        """Forward the request with the fault, or answer it with the fault. Errors: ConnectionBroken, if the proxy must reset the connection."""


@dataclass(frozen=True)
class Latency:
    """The proxy forwards the request `seconds` late. If the client gives up earlier, the server never receives the request."""

    seconds: float

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await asyncio.sleep(self.seconds)
        return await call.forward()


@dataclass(frozen=True)
class DelayResponse:
    """The server executes the request at once, but the proxy sends the response to the client `seconds` later."""

    seconds: float

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        body, headers = await call.execute_on_server()
        await asyncio.sleep(self.seconds)
        return await call.send_answer(call.server_status, body, headers)


@dataclass(frozen=True)
class Bandwidth:
    """The proxy forwards the bodies of the request and the response at no more than `bytes_per_second`."""

    bytes_per_second: float

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        return await call.forward(request_transform=self._limit_rate, response_transform=self._limit_rate)

    async def _limit_rate(self, chunks: Chunks) -> Chunks:
        async for chunk in chunks:
            for start in range(0, len(chunk), PIECE_BYTES):
                piece = chunk[start : start + PIECE_BYTES]
                await asyncio.sleep(len(piece) / self.bytes_per_second)
                yield piece


@dataclass(frozen=True)
class Status:
    """The proxy answers with an error in the server's format. The server does not receive the request."""

    code: int
    reason: str = ""
    retry_after: int | None = None

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        body, headers = call.proxy.error_response(self.code, self.reason)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        return await call.send_answer(self.code, body, headers)


@dataclass(frozen=True)
class StatusAfterApply:
    """The server executes the request, but the client receives an error."""

    code: int
    reason: str = ""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await call.execute_on_server()
        return await call.send_answer(self.code, *call.proxy.error_response(self.code, self.reason))


@dataclass(frozen=True)
class Reset:
    """The connection is reset before the server receives the request."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        raise ConnectionBroken


@dataclass(frozen=True)
class LostResponse:
    """The server executes the request, but the connection is reset before the client receives the response."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await call.execute_on_server()
        raise ConnectionBroken


@dataclass(frozen=True)
class Blackhole:
    """The server never receives the request, and the client receives no response until it gives up or the proxy stops."""

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        await asyncio.get_running_loop().create_future()
        raise ConnectionBroken


@dataclass(frozen=True)
class Truncate:
    """The response announces the body's full length, but the connection closes after `body_bytes` bytes."""

    body_bytes: int

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        return await call.forward(response_transform=self._truncate)

    async def _truncate(self, chunks: Chunks) -> Chunks:
        remaining_bytes = self.body_bytes
        async for chunk in chunks:
            if len(chunk) > remaining_bytes:
                if remaining_bytes:
                    yield chunk[:remaining_bytes]
                raise TruncatedBody
            remaining_bytes -= len(chunk)
            yield chunk


@dataclass(frozen=True)
class FlipByte:
    """The proxy inverts all bits of the response body's byte at `offset`. If the body ends before `offset`, it is not changed."""

    offset: int

    async def handle(self, call: Call[Any]) -> web.StreamResponse:
        return await call.forward(response_transform=self._flip)

    async def _flip(self, chunks: Chunks) -> Chunks:
        passed_bytes = 0
        async for chunk in chunks:
            index = self.offset - passed_bytes
            passed_bytes += len(chunk)
            yield chunk[:index] + bytes([chunk[index] ^ 0xFF]) + chunk[index + 1 :] if 0 <= index < len(chunk) else chunk


@dataclass(eq=False)
class Rule(Generic[Op]):
    """A fault and the requests to which it applies. A `with` block removes the rule at its end."""

    proxy: FaultProxy[Op]
    fault: Fault
    matches: Callable[[Op], bool]
    max_hits: int | None
    skipped_matches: int
    probability: float
    hits: int = 0
    """Number of requests to which the fault was applied."""
    match_count: int = 0
    """Number of requests that matched the rule until `hits` reached `max_hits`. Matching requests to which the fault was not applied are included."""

    @property
    def name(self) -> str:
        return type(self.fault).__name__

    def applies_to(self, operation: Op, rng: random.Random) -> bool:
        """Whether to apply the fault to this request. Updates `hits` and `match_count`."""
        if not self.matches(operation) or (self.max_hits is not None and self.hits >= self.max_hits):
            return False
        self.match_count += 1
        if self.match_count <= self.skipped_matches or (self.probability < 1 and rng.random() >= self.probability):
            return False
        self.hits += 1
        return True

    def remove(self) -> None:
        """Remove the rule from the proxy. A second call does nothing."""
        self.proxy.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()


@dataclass
class _RunningProxy:
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread
    stop_requested: asyncio.Event
    port: int
    session: aiohttp.ClientSession


@dataclass
class _ProxyStartup:
    is_complete: threading.Event = field(default_factory=threading.Event)
    running: _RunningProxy | None = None
    error: BaseException | None = None


class FaultProxy(ABC, Generic[Op]):
    """Base class of the fault proxies. `upstream` is the server's URL. `seed` starts the random numbers for rules with a probability."""

    def __init__(
        self, upstream: str, *, seed: int = 0, tls_context: ssl.SSLContext | None = None
    ) -> None:
        self.upstream = upstream.rstrip("/")
        self._tls_context = tls_context
        self._rng = random.Random(seed)
        self._rules: list[Rule[Op]] = []
        self._log: list[Exchange] = []
        self._begun_responses = 0
        self._changed = threading.Condition()
        self._running: _RunningProxy | None = None

    @abstractmethod
    def parse_operation(self, request: web.BaseRequest) -> Op:
        """Return the operation that the request performs."""

    @abstractmethod
    def error_response(self, code: int, reason: str) -> tuple[bytes, dict[str, str]]:
        """Return the body and headers of an error in the server's format."""

    # -- for tests -----------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """URL of the proxy, which clients use instead of the server's URL."""
        assert self._running is not None, "the proxy is not started: use it in a with statement"
        return f"http://127.0.0.1:{self._running.port}"

    def add_rule(
        self, fault: Fault, matches: Callable[[Op], bool], *,
        max_hits: int | None = None, skipped_matches: int = 0, probability: float = 1.0,
    ) -> Rule[Op]:  # fmt: skip
        """Apply `fault` to each matching request with this probability, but to at most `max_hits` requests, and to none of the first `skipped_matches`."""
        rule = Rule(self, fault, matches, max_hits, skipped_matches, probability)
        with self._changed:
            self._rules.append(rule)
        return rule

    def remove(self, rule: Rule[Op]) -> None:
        """Remove a rule."""
        with self._changed:
            self._rules = [other_rule for other_rule in self._rules if other_rule is not rule]

    def clear_rules(self) -> None:
        """Remove all rules, but keep the log."""
        with self._changed:
            self._rules = []

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """All finished requests, in the order in which they finished. A request whose full response the client has received is always included."""
        with self._changed:
            self._changed.wait_for(lambda: not self._begun_responses, LOG_WAIT_SECONDS)
            return tuple(self._log)

    def clear_exchanges(self) -> None:
        """Empty the log."""
        with self._changed:
            self._changed.wait_for(lambda: not self._begun_responses, LOG_WAIT_SECONDS)
            self._log.clear()

    def count(self, operation: str) -> int:
        """Return the number of requests of an operation so far, including failed requests."""
        return sum(exchange.operation == operation for exchange in self.exchanges)

    def wait_for(self, matches: Callable[[Exchange], bool], *, timeout_seconds: float = 20.0) -> Exchange:
        """Return the first matching exchange of the log, or wait for one. Errors: TimeoutError after `timeout_seconds`."""
        deadline = time.monotonic() + timeout_seconds
        checked_count = 0
        with self._changed:
            while True:
                for exchange in self._log[checked_count:]:
                    if matches(exchange):
                        return exchange
                checked_count = len(self._log)
                seconds_left = deadline - time.monotonic()
                if seconds_left <= 0 or not self._changed.wait(seconds_left):
                    if any(matches(exchange) for exchange in self._log[checked_count:]):
                        continue
                    raise TimeoutError(f"no matching request within {timeout_seconds:.0f} s; the log has {len(self._log)} other requests")

    # -- start and stop ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen on a free port of the loopback interface. Errors: OSError."""
        startup = _ProxyStartup()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(startup)), name="fault-proxy", daemon=True)
        thread.start()
        startup.is_complete.wait()
        if startup.error is not None:
            raise startup.error
        self._running = startup.running
        return self

    def stop(self) -> None:
        """Close all connections and stop. A second call does nothing."""
        running, self._running = self._running, None
        if running is not None:
            running.loop.call_soon_threadsafe(running.stop_requested.set)
            running.thread.join(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def run_in_loop(self, action: Callable[[], None]) -> None:
        """Run an action in the proxy's event loop and wait until it has finished."""
        assert self._running is not None, "the proxy is not started"

        async def run_action() -> None:
            action()

        asyncio.run_coroutine_threadsafe(run_action(), self._running.loop).result(10)

    @property
    def session(self) -> aiohttp.ClientSession:
        """HTTP session with which the proxy sends requests to the server."""
        assert self._running is not None
        return self._running.session

    async def _serve(self, startup: _ProxyStartup) -> None:
        try:
            loop, stop_requested = asyncio.get_running_loop(), asyncio.Event()
            # A test may restart a server without TLS, so each request to such a server opens a new connection.
            connector = aiohttp.TCPConnector(limit=0, ssl=self._tls_context or True, force_close=self._tls_context is None)
            session = aiohttp.ClientSession(
                connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=10),
            )  # fmt: skip
            server = web.Server(self._handle_request, handler_cancellation=True, access_log=None)
            runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=0)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            startup.running = _RunningProxy(loop, threading.current_thread(), stop_requested, port, session)
            self._running = startup.running
        except BaseException as error:  # start(), which runs in the thread of the test, raises this error again
            startup.error = error
            startup.is_complete.set()
            return
        startup.is_complete.set()
        await stop_requested.wait()
        await runner.cleanup()
        await session.close()

    async def _handle_request(self, request: web.BaseRequest) -> web.StreamResponse:
        call = Call(self, request, self.parse_operation(request))
        with self._changed:
            rule = next((rule for rule in self._rules if rule.applies_to(call.operation, self._rng)), None)
        started_at = time.monotonic()
        try:
            return await (rule.fault.handle(call) if rule else self.relay(call))
        except (ConnectionBroken, ConnectionError, aiohttp.ClientError):
            _reset_connection(request)
            # The client does not receive this response, but aiohttp needs a response to end the request.
            return web.Response(status=502)
        finally:
            self._log_exchange(call, rule.name if rule else "", started_at)

    def relay(self, call: Call[Op]) -> Awaitable[web.StreamResponse]:
        """Handle a request to which no rule applies."""
        return call.forward()

    def count_begun_responses(self, count: int) -> None:
        """Record that `count` responses have begun. A response is added to the log when it ends."""
        with self._changed:
            self._begun_responses += count

    def _log_exchange(self, call: Call[Op], fault_name: str, started_at: float) -> None:
        request = call.request
        with self._changed:
            self._log.append(
                Exchange(
                    number=len(self._log), operation=call.operation.label, method=request.method, path=request.path,
                    query=dict(request.query), client_status=call.client_status, server_status=call.server_status, fault_name=fault_name, started_at=started_at,
                    seconds=time.monotonic() - started_at, request_bytes=call.request_bytes,
                    response_bytes=call.response_bytes,
                )  # fmt: skip
            )
            self._begun_responses -= 1 if call.client_status and not call.operation.is_endless else 0
            self._changed.notify_all()


def _select_forwarded_headers(headers: Mapping[str, str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP)


def _reset_connection(request: web.BaseRequest) -> None:
    """Close the connection with a TCP reset: buffered data are dropped, and the client's next read fails."""
    transport = request.transport
    if transport is None:
        return
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None:
        with contextlib.suppress(OSError):  # raised if the client has already closed the connection
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


@contextlib.contextmanager
def active_rules(*rules: Rule[Any]) -> Iterator[None]:
    """Keep these rules active during the `with` block, and remove all of them at its end."""
    with contextlib.ExitStack() as stack:
        for rule in rules:
            stack.enter_context(rule)
        yield
