"""The operator handles the changes in kopf's watch streams itself, before kopf reads the streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, cast

import aiohttp
import kopf
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from finetune_operator.kopf_adapter import TracedSession, WatchMonitor
from finetune_operator.objects import Object
from finetune_operator.watch_stream import WatchStream
from kopf._cogs.clients import api, auth, watching
from kopf._cogs.structs import credentials, references


def make_event(event_type: str, version: int) -> dict[str, Any]:
    return {"type": event_type, "object": {"metadata": {"name": "run", "resourceVersion": str(version)}}}


def make_bookmark(version: int) -> dict[str, Any]:
    return {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}


class Content:
    """The content of a response, which is received in the given chunks."""

    def __init__(self, *chunks: bytes):
        self._chunks = chunks

    async def iter_chunked(self, _: int) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield chunk

    def iter_any(self) -> AsyncIterator[bytes]:
        return self.iter_chunked(0)

    def exception(self) -> str:
        return "of the connection"


class Handler:
    """Records the changes that it handles. It fails for changes of version 3."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []

    def __call__(self, event_type: str, body: Object) -> None:
        version = body["metadata"]["resourceVersion"]
        if version == "3":
            raise ValueError("version 3")
        self.changes.append((event_type, version))


async def read_lines(chunks: list[bytes], handler: Handler) -> list[dict[str, Any]]:
    stream = WatchStream(cast("aiohttp.StreamReader", Content(*chunks)), handler)
    text = b"".join([chunk async for chunk in stream.iter_chunked(1024)])
    return [json.loads(line) for line in text.splitlines()]


EVENTS = [
    make_event("ADDED", 1), make_event("MODIFIED", 2), make_event("MODIFIED", 3), make_bookmark(4), make_event("DELETED", 5),
    {"type": "ERROR", "object": {"code": 410}},
]  # fmt: skip
LINES = b"".join(json.dumps(event).encode() + b"\n" for event in EVENTS)


@pytest.mark.parametrize("chunk_size", [1, 7, 60, len(LINES)])
async def test_kopf_reads_bookmarks_instead_of_handled_changes(chunk_size: int) -> None:
    """Some events are still passed on to kopf: deletions, errors, and changes whose handler failed."""
    handler = Handler()
    forwarded_events = await read_lines([LINES[start : start + chunk_size] for start in range(0, len(LINES), chunk_size)], handler)
    assert handler.changes == [("ADDED", "1"), ("MODIFIED", "2")]
    bookmarks = [make_bookmark(2)] if chunk_size == len(LINES) else [make_bookmark(1), make_bookmark(2)]
    assert forwarded_events == [*bookmarks, *EVENTS[2:]]


@pytest.mark.parametrize("line", [b"no json", b"[]", b'{"type": "ADDED", "object": {}}'])
async def test_lines_that_are_not_events_go_to_kopf(line: bytes) -> None:
    stream = WatchStream(cast("aiohttp.StreamReader", Content(line + b"\n")), Handler())
    assert [chunk async for chunk in stream.iter_chunked(1024)] == [line + b"\n"]


@pytest.mark.parametrize("missing_bytes", [1, 40])
async def test_event_that_the_connection_cut_off_is_read_again_by_the_next_watch(missing_bytes: int) -> None:
    """kopf gets no part of an incomplete event, so its next watch continues after the last bookmark."""
    handler = Handler()
    lines = b"".join(json.dumps(make_event("MODIFIED", version)).encode() + b"\n" for version in (1, 2))
    assert await read_lines([lines[:-missing_bytes]], handler) == [make_bookmark(1)]
    assert handler.changes == [("MODIFIED", "1")]


def test_connection_errors_come_from_the_original_content() -> None:
    stream = WatchStream(cast("aiohttp.StreamReader", Content()), Handler())
    assert stream.exception() == "of the connection"


@pytest.mark.parametrize(
    ("url", "status", "handled_count"),
    [
        ("/api/v1/pods?watch=true", 200, 2),
        ("/api/v1/namespaces/team/pods?watch=true", 200, 2),
        ("/api/v1/pods?limit=500", 200, 0),
        ("/api/v1/pods?watch=true", 410, 0),
        ("/api/v1/services?watch=true", 200, 0),
    ],
)
async def test_only_successful_watches_of_known_collections_are_handled(url: str, status: int, handled_count: int) -> None:
    """The test reads the response with kopf's own function. If a later version of kopf read responses in another way, kopf itself would get all changes, and
    this test would fail.
    """

    async def respond(_: web.Request) -> web.Response:
        return web.Response(body=LINES, status=status)

    app, handler = web.Application(), Handler()
    app.router.add_get("/{path:.*}", respond)
    async with TestServer(app) as server:
        connection_info = kopf.ConnectionInfo(server=str(server.make_url("")), insecure=True)
        traced_session = TracedSession(connection_info, WatchMonitor([], lambda *_: None), {"pods": handler})
        async with traced_session.aiohttp_session as session, session.get(server.make_url(url)) as response:
            events_read_by_kopf = [json.loads(line) async for line in api.iter_jsonlines(response.content)]
    assert len(handler.changes) == handled_count
    assert events_read_by_kopf == ([make_bookmark(2), *EVENTS[2:]] if handled_count else EVENTS)


async def test_kopf_continues_at_the_last_handled_change_and_lists_again_after_410() -> None:
    """If kopf sent a wrong resourceVersion in its watch requests, the watch would repeat or lose changes."""
    error = {"type": "ERROR", "object": {"code": 410}}
    watches = iter([
        [make_event("ADDED", 11), make_event("MODIFIED", 12)], [make_event("MODIFIED", 13), error], [make_event("DELETED", 24), make_event("ADDED", 25)],
    ])  # fmt: skip
    requests: list[tuple[str, str]] = []

    async def respond(request: web.Request) -> web.StreamResponse:
        is_watch = request.query.get("watch") == "true"
        requests.append(("watch" if is_watch else "list", request.query.get("resourceVersion", "")))
        if not is_watch:
            version = "10" if len(requests) == 1 else "20"
            return web.json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": []})
        lines = next(watches, [make_event("DELETED", 99)])
        return web.Response(body=b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    app, handler, settings = web.Application(), Handler(), kopf.OperatorSettings()
    versions: list[str] = []
    settings.watching.reconnect_backoff = 0
    app.router.add_get("/{path:.*}", respond)
    async with TestServer(app) as server:
        session = TracedSession(kopf.ConnectionInfo(server=f"http://127.0.0.1:{server.port}"), WatchMonitor([], lambda *_: None), {"pods": handler})
        auth.vault_var.set(vault := credentials.Vault({credentials.VaultKey("login"): session}))
        pods = references.Resource(group="", version="v1", plural="pods", namespaced=True)
        async for event in watching.infinite_watch(settings=settings, resource=pods, namespace=None):
            if isinstance(event, dict) and event["type"] == "DELETED":
                versions.append(str(event["object"]["metadata"]["resourceVersion"]))
            if versions[-1:] == ["99"]:
                break
        await vault.close()
    assert requests == [("list", ""), ("watch", "10"), ("watch", "12"), ("list", ""), ("watch", "20"), ("watch", "25")]
    assert handler.changes == [("ADDED", "11"), ("MODIFIED", "12"), ("MODIFIED", "13"), ("ADDED", "25")]
    assert versions == ["24", "99"]
