"""What the watches ask of the API server, and whether they live: seen from their connection, whatever is made of the answers.

The server ends every watch after a minute, also one that had nothing to tell, and it is begun again where it stopped. One that is not
is deaf; full lists would hide that, since they bring what it should have told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import SimpleNamespace

import aiohttp

from finetune_operator.kube import Watcher

DISCOVERY = "discovery"
"""Resource of requests for the server's directory, in metrics."""
OK = 200


class Watches:
    """The watches of these collections (URL paths); `watcher` is told about every request. For one event loop."""

    def __init__(self, paths: Iterable[str], watcher: Watcher):
        self._watcher = watcher
        self._paths = tuple(paths)
        self._begun: dict[str, float] = {}
        """When a watch was last begun, by path, in loop time."""

    def start(self) -> None:
        """They are to be begun now: from here on silence counts."""
        self._begun = dict.fromkeys(self._paths, asyncio.get_running_loop().time())

    def deaf(self, limit: float) -> str:
        """The watch that was not begun for longer than `limit` seconds, in words; empty: there is none."""
        now = asyncio.get_running_loop().time()
        path, since = min(self._begun.items(), key=lambda one: one[1], default=("", now))
        return f"the watch of {path} was not begun for {now - since:.0f} s" if now - since > limit else ""

    def trace(self) -> aiohttp.TraceConfig:
        """For the session that the watches use."""
        config = aiohttp.TraceConfig()
        config.on_request_start.append(self._asked)
        config.on_request_end.append(self._answered)
        config.on_request_exception.append(self._failed)
        return config

    async def _asked(
        self, _: aiohttp.ClientSession, about: SimpleNamespace, __: aiohttp.TraceRequestStartParams
    ) -> None:
        about.started = asyncio.get_running_loop().time()

    async def _answered(
        self, _: aiohttp.ClientSession, about: SimpleNamespace, end: aiohttp.TraceRequestEndParams
    ) -> None:
        self._count(about, end.url.path, end.url.query.get("watch") == "true", end.response.status)

    async def _failed(
        self, _: aiohttp.ClientSession, about: SimpleNamespace, end: aiohttp.TraceRequestExceptionParams
    ) -> None:
        self._count(about, end.url.path, end.url.query.get("watch") == "true", 0)

    def _count(self, about: SimpleNamespace, asked: str, watch: bool, code: int) -> None:
        """Of a watch it is the time until the answer begins, which is when it listens."""
        now = asyncio.get_running_loop().time()
        path = next(
            (one for one in self._paths if asked.endswith(one)), ""
        )  # a server may live below a path of its own
        verb = "get" if not path else "watch" if watch else "list"
        self._watcher(verb, path.rpartition("/")[2] or DISCOVERY, code, now - about.started)
        if watch and code == OK and path in self._begun:
            self._begun[path] = now
