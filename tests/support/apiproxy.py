"""A fault proxy in front of a Kubernetes API server. A test chooses requests by verb and resource, and can send commands to open watches.

    with ApiProxy(endpoint) as proxy:
        operator = start(kubeconfig=proxy.kubeconfig(tmp_path / "kubeconfig"))
        with proxy.fault(LostResponse(), verb="create", resource="jobs", max_hits=1): ...
        proxy.command_watches("pods", SendEvent.error(410))

Clients connect to the proxy by plain HTTP on the loopback interface. The proxy connects to the server by TLS and forwards the clients' credentials.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from localcluster.api import Endpoint
from tests.support.faultproxy import (
    Bandwidth,
    Blackhole,
    Call,
    Chunks,
    DelayResponse,
    Exchange,
    Fault,
    FaultProxy,
    Latency,
    LostResponse,
    Reset,
    Rule,
    Status,
    StatusAfterApply,
    TruncatedBody,
    active_rules,
)

__all__ = [
    "ApiOperation", "ApiProxy", "Bandwidth", "Blackhole", "WatchCommand", "DisconnectWatch", "Exchange", "Fault", "StallWatch", "DelayResponse",
    "DelayEvents", "Latency", "LostResponse", "ReplayEvents", "Reset", "Rule", "SendEvent", "Status", "StatusAfterApply", "active_rules",
]  # fmt: skip

REASON_BY_CODE = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired",
    422: "Invalid", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip
PATH_PATTERN = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?(?:/(?P<resource>[^/]+))?(?:/(?P<name>[^/]+))?(?:/(?P<subresource>[^/]+))?$"
)
VERB_BY_METHOD = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class ApiOperation:
    """The operation of a request: its verb, and the resource and object to which the verb applies. `resource` is the plural name, followed by the subresource
    if there is one (`pods/status`).
    """

    verb: str
    resource: str
    namespace: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.verb} {self.resource}".rstrip()

    @property
    def is_endless(self) -> bool:
        """Whether the request is a watch. The response of a watch does not end until the watch is closed."""
        return self.verb == "watch"


# -- commands to open watches ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WatchCommand:
    """A command to the watches that are open when it is sent."""


@dataclass(frozen=True)
class DisconnectWatch(WatchCommand):
    """Close the connection in the middle of the response."""


@dataclass(frozen=True)
class StallWatch(WatchCommand):
    """Deliver no further events, but keep the connection open. A load balancer that drops its entry for a connection without closing it has the same effect."""


@dataclass(frozen=True)
class SendEvent(WatchCommand):
    """Send the client an event that the server did not send."""

    event_json: str

    @classmethod
    def error(cls, code: int = 410) -> SendEvent:
        """Create a command that sends an ERROR event with this status code. Code 410 means that the watch's resourceVersion is too old."""
        return cls(json.dumps({"type": "ERROR", "object": status(code, "", "injected by a test")}))


@dataclass(frozen=True)
class ReplayEvents(WatchCommand):
    """Deliver the last `count` events again, oldest first. So the client receives duplicate events, and receives an old version of an object after a newer
    version.
    """

    count: int


@dataclass(frozen=True)
class DelayEvents:
    """A fault for watches: every event is delivered `seconds` late, so the client's cache is stale."""

    seconds: float

    async def handle(self, call: Call[ApiOperation]) -> web.StreamResponse:
        return await call.forward(response_transform=self._delay_events)

    async def _delay_events(self, chunks: Chunks) -> Chunks:
        loop = asyncio.get_running_loop()
        delayed_chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def collect_chunks() -> None:
            async for chunk in chunks:
                delayed_chunks.put_nowait((loop.time() + self.seconds, chunk))
            delayed_chunks.put_nowait((loop.time(), b""))

        collector = asyncio.create_task(collect_chunks())
        try:
            while True:
                due_at, chunk = await delayed_chunks.get()
                await asyncio.sleep(due_at - loop.time())
                if not chunk:
                    return
                yield chunk
        finally:
            collector.cancel()


class Watch:
    """One open watch: forwards the server's lines to the client, and executes the commands of the test."""

    MAX_RECENT_EVENTS = 50

    def __init__(self, operation: ApiOperation) -> None:
        self.operation = operation
        self.commands: asyncio.Queue[WatchCommand] = asyncio.Queue()
        self._recent_events: list[bytes] = []
        self._is_stalled = False

    async def transform_lines(self, chunks: Chunks) -> Chunks:
        """Yield the lines that the client receives: the server's lines, after the test's commands have removed, added or repeated events."""
        lines = _split_lines(chunks)
        line_task: asyncio.Task[bytes] = asyncio.ensure_future(anext(lines))
        command_task: asyncio.Task[WatchCommand] = asyncio.ensure_future(self.commands.get())
        try:
            while True:
                finished_tasks, _ = await asyncio.wait((line_task, command_task), return_when=asyncio.FIRST_COMPLETED)
                if line_task in finished_tasks:
                    try:
                        text = line_task.result()
                    except StopAsyncIteration:
                        return
                    if not self._is_stalled:
                        self._recent_events = [*self._recent_events[-self.MAX_RECENT_EVENTS :], text]
                        yield text
                    line_task = asyncio.ensure_future(anext(lines))
                if command_task in finished_tasks:
                    for text in self._execute(command_task.result()):
                        yield text
                    command_task = asyncio.ensure_future(self.commands.get())
        finally:
            line_task.cancel()
            command_task.cancel()

    def _execute(self, command: WatchCommand) -> list[bytes]:
        match command:
            case StallWatch():
                self._is_stalled = True
            case SendEvent(event_json):
                return [event_json.encode() + b"\n"]
            case ReplayEvents(count):
                return self._recent_events[-count:]
            case DisconnectWatch():
                raise TruncatedBody
        return []


async def _split_lines(chunks: Chunks) -> Chunks:
    incomplete_line = b""
    async for chunk in chunks:
        *complete_lines, incomplete_line = (incomplete_line + chunk).split(b"\n")
        for line in complete_lines:
            yield line + b"\n"
    if incomplete_line:
        yield incomplete_line


# -- the proxy ---------------------------------------------------------------------------------------------------------


class ApiProxy(FaultProxy[ApiOperation]):
    """A proxy between clients and a Kubernetes API server. The module's docstring has an example."""

    def __init__(self, endpoint: Endpoint, *, seed: int = 0) -> None:
        super().__init__(endpoint.server, seed=seed, tls_context=ssl.create_default_context(cafile=str(endpoint.ca)))
        self._token = endpoint.token
        self._watches: set[Watch] = set()

    def kubeconfig(self, path: Path, token: str | None = None) -> Path:
        """Write a kubeconfig whose server is this proxy. `token` is the client's token; the default is the administrator's."""
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "proxy",
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": "proxy", "user": {"token": token or self._token}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
        }  # fmt: skip
        path.touch(mode=0o600)
        path.write_text(json.dumps(config))
        return path

    def fault(
        self, fault: Fault, *, verb: str | None = None, resource: str | None = None, name: str = "",
        namespace: str | None = None, max_hits: int | None = None, skipped_matches: int = 0, probability: float = 1.0,
    ) -> Rule[ApiOperation]:  # fmt: skip
        """Apply `fault` to the requests with this verb, resource (such as `finetunejobs/status`) and namespace; None matches every value. `name` is a
        regular expression that must occur in the object's name.
        """
        name_pattern = re.compile(name)
        return self.add_rule(
            fault, lambda request: (
                verb in (None, request.verb) and resource in (None, request.resource)
                and namespace in (None, request.namespace) and bool(name_pattern.search(request.name))
            ), max_hits=max_hits, skipped_matches=skipped_matches, probability=probability,
        )  # fmt: skip

    def command_watches(self, resource: str, command: WatchCommand) -> int:
        """Send a command to every open watch of `resource`. Returns the number of watches that received the command."""
        count = 0

        def send_command() -> None:
            nonlocal count
            for watch in self._watches:
                if watch.operation.resource == resource:
                    watch.commands.put_nowait(command)
                    count += 1

        self.run_in_loop(send_command)
        return count

    def list_writes(self, namespace: str | None = None) -> tuple[str, ...]:
        """Return the labels (such as `create jobs`) of all write requests so far, in order. With `namespace`, return only the labels of
        requests in this namespace.
        """
        return tuple(
            exchange.operation for exchange in self.exchanges
            if exchange.method not in ("GET", "HEAD") and (namespace is None or f"/namespaces/{namespace}/" in exchange.path)
        )  # fmt: skip

    def relay(self, call: Call[ApiOperation]) -> Awaitable[web.StreamResponse]:
        return self._relay_watch(call) if call.operation.verb == "watch" else call.forward()

    async def _relay_watch(self, call: Call[ApiOperation]) -> web.StreamResponse:
        watch = Watch(call.operation)
        self._watches.add(watch)
        try:
            return await call.forward(response_transform=watch.transform_lines)
        finally:
            self._watches.discard(watch)

    def parse_operation(self, request: web.BaseRequest) -> ApiOperation:
        path_match = PATH_PATTERN.match(request.path)
        if path_match is None:
            return ApiOperation(request.method.lower(), request.path, "", "")
        resource, name, subresource = path_match["resource"] or "", path_match["name"] or "", path_match["subresource"]
        verb = VERB_BY_METHOD.get(request.method, "get" if name else "list")
        if request.method == "GET" and request.query.get("watch") in ("true", "1", "True"):
            verb = "watch"
        if verb == "delete" and not name:
            verb = "deletecollection"
        return ApiOperation(verb, f"{resource}/{subresource}" if subresource else resource, path_match["namespace"] or "", name)

    def error_response(self, code: int, reason: str) -> tuple[bytes, dict[str, str]]:
        return json.dumps(status(code, reason, "injected by a test")).encode(), {"Content-Type": "application/json"}


def status(code: int, reason: str, message: str) -> dict[str, Any]:
    """Return a Kubernetes `Status` object for a failed request."""
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": reason or REASON_BY_CODE.get(code, "InternalError"), "code": code,
    }  # fmt: skip
