"""Handles changes of objects before kopf reads them from its watch streams.

For each event, kopf wakes or creates a task for the object, and creates three loggers and two `Cause` objects. In a burst of jobs, this
took a third of the operator's CPU time, and each task held the body of its last event. The operator's handlers only update the cache, so
they need no task, logger or `Cause` object.

kopf still sends the list and watch requests. In place of the handled changes, kopf reads a bookmark with the last resourceVersion, so that it continues
an interrupted watch at the right version.
Deletions and all other events go to kopf unchanged, because a deletion must be handled after the object's event from kopf's list.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import aiohttp
from pydantic_core import from_json

from finetune_operator.objects import Object

logger = logging.getLogger(__name__)

ChangeHandler = Callable[[str, Object], None]
"""Handles one change. Arguments: `ADDED` or `MODIFIED`, and the object."""
CHANGE_TYPES = ("ADDED", "MODIFIED")


class WatchResponse(aiohttp.ClientResponse):
    """A response to a request of kopf. If kopf watches a resource that has an entry in `handlers`, the changes go to this handler."""

    handlers: ClassVar[Mapping[str, ChangeHandler]] = {}
    """Handlers by the plural of their resource."""

    async def start(self, connection: Any) -> aiohttp.ClientResponse:
        """Read the headers and, if the response is a watch, replace its content by a `WatchStream`. aiohttp calls this method once for each response."""
        await super().start(connection)
        handler = self.handlers.get(self.url.name)
        if handler is not None and self.status == 200 and self.url.query.get("watch") == "true":
            self.content = cast("aiohttp.StreamReader", WatchStream(self.content, handler))
        return self


def build_response_class(handlers: Mapping[str, ChangeHandler]) -> type[WatchResponse]:
    """Return a class of responses with these handlers, for an HTTP session of kopf."""
    return type("WatchResponse", (WatchResponse,), {"handlers": handlers})


class WatchStream:
    """The content of a watch response, without the changes that `handler` has handled."""

    def __init__(self, content: aiohttp.StreamReader, handler: ChangeHandler):
        self._content, self._handler = content, handler
        self._chunks: AsyncIterator[bytes] = content.iter_any()
        self._incomplete_line = b""

    def __getattr__(self, name: str) -> Any:
        """Return all other attributes, for example the error of a failed connection, from the original content."""
        return getattr(self._content, name)

    def iter_chunked(self, size: int) -> WatchStream:
        """Return the stream, which is read in chunks of at most `size` bytes. kopf reads watches only with this method."""
        self._chunks = self._content.iter_chunked(size)
        return self

    def __aiter__(self) -> WatchStream:
        return self

    async def __anext__(self) -> bytes:
        while True:
            received_bytes = await anext(self._chunks)
            *lines, self._incomplete_line = (self._incomplete_line + received_bytes).split(b"\n")
            if lines:
                return b"".join(line + b"\n" for line in self._replace_handled_events(lines))

    def _replace_handled_events(self, lines: list[bytes]) -> Iterator[bytes]:
        """Handle the changes in `lines`. Yield the lines for kopf: one bookmark for each sequence of handled changes, and all other lines unchanged."""
        version = None
        for line in lines:
            handled_version = self._handle_change(line)
            if handled_version is None:
                yield from _yield_bookmarks(version)
                yield line
            version = handled_version
        yield from _yield_bookmarks(version)

    def _handle_change(self, line: bytes) -> str | None:
        """Handle the event in `line` and return its resourceVersion, or None if kopf must handle the event."""
        try:
            event = from_json(line)
            if event["type"] not in CHANGE_TYPES:
                return None
            version = str(event["object"]["metadata"]["resourceVersion"])
            self._handler(event["type"], event["object"])
        except Exception:
            # kopf calls the same handler again and logs its error, as for any handler. The watch continues.
            logger.debug("the event goes to kopf", exc_info=True)
            return None
        return version


def _yield_bookmarks(version: str | None) -> Iterator[bytes]:
    if version is not None:
        yield json.dumps({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": version}}}).encode()
