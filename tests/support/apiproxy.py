"""A fault proxy in front of a Kubernetes API server: faults by verb and resource, and watches that misbehave.

    with ApiProxy(endpoint) as proxy:
        operator = start(kubeconfig=proxy.kubeconfig(tmp_path / "kubeconfig"))
        with proxy.fault(LostResponse(), verb="create", resource="jobs", times=1): ...
        proxy.watches("pods", Say.gone(410))

Clients speak plain HTTP to it on the loopback; it speaks TLS to the server and passes their credentials on.
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
    EndedEarly,
    Exchange,
    Fault,
    FaultProxy,
    LateAnswer,
    Latency,
    LostResponse,
    Reset,
    Rule,
    Status,
    StatusAfter,
    all_of,
)

__all__ = [
    "ApiOperation", "ApiProxy", "Bandwidth", "Blackhole", "Command", "Cut", "Exchange", "Fault", "Hold", "LateAnswer",
    "LateEvents", "Latency", "LostResponse", "Repeat", "Reset", "Rule", "Say", "Status", "StatusAfter", "all_of",
]  # fmt: skip

REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired",
    422: "Invalid", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
}  # fmt: skip
PATH = re.compile(
    r"^/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?(?:/(?P<resource>[^/]+))?(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?$"
)
VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class ApiOperation:
    """A request in the API server's words; `resource` is the plural, with `/status` or the like for a subresource."""

    verb: str
    resource: str
    namespace: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.verb} {self.resource}".rstrip()

    @property
    def endless(self) -> bool:
        """A watch has no end of its own."""
        return self.verb == "watch"


# -- what a watch can be told to do ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """Something for watches that are open now."""


@dataclass(frozen=True)
class Cut(Command):
    """The connection ends in the middle of the answer."""


@dataclass(frozen=True)
class Hold(Command):
    """From now on nothing comes from the server, and the connection stays open: what a forgetful load balancer does."""


@dataclass(frozen=True)
class Say(Command):
    """An event that the server never sent; an ERROR ends the stream as the server would end it."""

    event: str

    @classmethod
    def gone(cls, code: int = 410) -> Say:
        """ERROR with a status code; 410: the version that the watch stands at was compacted away."""
        return cls(json.dumps({"type": "ERROR", "object": status(code, "", "put there by a test")}))


@dataclass(frozen=True)
class Repeat(Command):
    """The last events come once more, oldest first: duplicates, and older versions after newer ones."""

    count: int


@dataclass(frozen=True)
class LateEvents:
    """A fault for watches: every event comes so many seconds after it happened. The client's view is stale."""

    seconds: float

    async def handle(self, call: Call[ApiOperation]) -> web.StreamResponse:
        return await call.forward(down=self._late)

    async def _late(self, chunks: Chunks) -> Chunks:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def collect() -> None:
            async for chunk in chunks:
                waiting.put_nowait((loop.time() + self.seconds, chunk))
            waiting.put_nowait((loop.time(), b""))

        reader = asyncio.create_task(collect())
        try:
            while True:
                due, chunk = await waiting.get()
                await asyncio.sleep(due - loop.time())
                if not chunk:
                    return
                yield chunk
        finally:
            reader.cancel()


class Watch:
    """One open watch. Its loop hands on lines of the server and obeys commands."""

    MEMORY = 50

    def __init__(self, operation: ApiOperation) -> None:
        self.operation = operation
        self.commands: asyncio.Queue[Command] = asyncio.Queue()
        self._recent: list[bytes] = []
        self._held = False

    async def shape(self, chunks: Chunks) -> Chunks:
        """The server's lines, with what the commands make of them."""
        lines = _lines(chunks)
        line: asyncio.Task[bytes] = asyncio.ensure_future(anext(lines))
        command: asyncio.Task[Command] = asyncio.ensure_future(self.commands.get())
        try:
            while True:
                done, _ = await asyncio.wait((line, command), return_when=asyncio.FIRST_COMPLETED)
                if line in done:
                    try:
                        text = line.result()
                    except StopAsyncIteration:
                        return
                    if not self._held:
                        self._recent = [*self._recent[-self.MEMORY :], text]
                        yield text
                    line = asyncio.ensure_future(anext(lines))
                if command in done:
                    for text in self._obey(command.result()):
                        yield text
                    command = asyncio.ensure_future(self.commands.get())
        finally:
            line.cancel()
            command.cancel()

    def _obey(self, command: Command) -> list[bytes]:
        match command:
            case Hold():
                self._held = True
            case Say(event):
                return [event.encode() + b"\n"]
            case Repeat(count):
                return self._recent[-count:]
            case Cut():
                raise EndedEarly
        return []


async def _lines(chunks: Chunks) -> Chunks:
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest


# -- the proxy ---------------------------------------------------------------------------------------------------------


class ApiProxy(FaultProxy[ApiOperation]):
    """See the module."""

    def __init__(self, endpoint: Endpoint, *, seed: int = 0) -> None:
        super().__init__(endpoint.server, seed=seed, tls=ssl.create_default_context(cafile=str(endpoint.ca)))
        self._token = endpoint.token
        self._watches: set[Watch] = set()

    def kubeconfig(self, path: Path, token: str | None = None) -> Path:
        """Write a kubeconfig that leads here, with the administrator's token unless another is given."""
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
        namespace: str | None = None, times: int | None = None, skip: int = 0, probability: float = 1.0,
    ) -> Rule[ApiOperation]:  # fmt: skip
        """Apply `fault` to requests of a verb and a resource (`finetunejobs/status`; None: any).

        `name` is an expression to be found in the object's name; `namespace` is exact.
        """
        wanted = re.compile(name)
        return self.strike(
            fault, lambda request: (
                verb in (None, request.verb) and resource in (None, request.resource)
                and namespace in (None, request.namespace) and bool(wanted.search(request.name))
            ), times=times, skip=skip, probability=probability,
        )  # fmt: skip

    def watches(self, resource: str, command: Command) -> int:
        """Tell every watch of `resource` that is open now; returns how many there were."""
        told = 0

        def tell() -> None:
            nonlocal told
            for watch in self._watches:
                if watch.operation.resource == resource:
                    watch.commands.put_nowait(command)
                    told += 1

        self.do(tell)
        return told

    def writes(self, namespace: str | None = None) -> tuple[str, ...]:
        """Labels of all requests so far that would change something, in order."""
        return tuple(
            e.operation for e in self.exchanges
            if e.method not in ("GET", "HEAD") and (namespace is None or f"/namespaces/{namespace}/" in e.path)
        )  # fmt: skip

    def relay(self, call: Call[ApiOperation]) -> Awaitable[web.StreamResponse]:
        return self._relay_watch(call) if call.operation.verb == "watch" else call.forward()

    async def _relay_watch(self, call: Call[ApiOperation]) -> web.StreamResponse:
        watch = Watch(call.operation)
        self._watches.add(watch)
        try:
            return await call.forward(down=watch.shape)
        finally:
            self._watches.discard(watch)

    def describe(self, request: web.BaseRequest) -> ApiOperation:
        found = PATH.match(request.path)
        if found is None:
            return ApiOperation(request.method.lower(), request.path, "", "")
        resource, name, sub = found["resource"] or "", found["name"] or "", found["sub"]
        verb = VERBS.get(request.method, "get" if name else "list")
        if request.method == "GET" and request.query.get("watch") in ("true", "1", "True"):
            verb = "watch"
        if verb == "delete" and not name:
            verb = "deletecollection"
        return ApiOperation(verb, f"{resource}/{sub}" if sub else resource, found["namespace"] or "", name)

    def refusal(self, code: int, reason: str) -> tuple[bytes, dict[str, str]]:
        return json.dumps(status(code, reason, "put there by a test")).encode(), {"Content-Type": "application/json"}


def status(code: int, reason: str, message: str) -> dict[str, Any]:
    """A Kubernetes Status of failure."""
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
        "reason": reason or REASONS.get(code, "InternalError"), "code": code,
    }  # fmt: skip
