"""`/healthz`, `/readyz` and `/metrics`. Healthy means that work gets done, not that the process exists."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator.metrics import Metrics
from finetune_operator.settings import HttpSettings

logger = logging.getLogger(__name__)

Check = Callable[[], str]
"""What is wrong, in words; empty: nothing."""


class Server:
    """The HTTP server. `healthy` and `ready` say what is wrong, `refresh` brings gauges up to date."""

    def __init__(
        self, settings: HttpSettings, metrics: Metrics, *, healthy: Check, ready: Check, refresh: Callable[[], None]
    ):
        self._settings, self._metrics = settings, metrics
        self._healthy, self._ready, self._refresh = healthy, ready, refresh
        self._runner: web.AppRunner | None = None
        self.port = settings.port

    async def start(self) -> None:
        """Listen. Errors: OSError if the port is taken."""
        app = web.Application()
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._readiness)
        app.router.add_get("/metrics", self._show)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._settings.host, self._settings.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        logger.info("serving /healthz, /readyz and /metrics on port %d", self.port)

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, _: web.Request) -> web.Response:
        return _answer(self._healthy())

    async def _readiness(self, _: web.Request) -> web.Response:
        return _answer(self._ready())

    async def _show(self, _: web.Request) -> web.Response:
        self._refresh()
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _answer(problem: str) -> web.Response:
    return web.Response(text=f"{problem or 'ok'}\n", status=503 if problem else 200)
