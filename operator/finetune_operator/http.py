"""HTTP server for `/healthz`, `/readyz` and `/metrics`."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator.health import HealthChecks
from finetune_operator.metrics import Metrics
from finetune_operator.settings import HttpSettings

logger = logging.getLogger(__name__)


class HttpServer:
    """The operator's HTTP server. `refresh_metrics` is called before each scrape, to update the gauges."""

    def __init__(
        self, settings: HttpSettings, metrics: Metrics, *, health: HealthChecks, refresh_metrics: Callable[[], None]
    ):
        self._settings, self._metrics, self._health = settings, metrics, health
        self._refresh_metrics = refresh_metrics
        self._runner: web.AppRunner | None = None
        self.port = settings.port

    async def start(self) -> None:
        """Start the HTTP server. Errors: OSError if the port is in use."""
        app = web.Application()
        app.router.add_get("/healthz", self._get_healthz)
        app.router.add_get("/readyz", self._get_readyz)
        app.router.add_get("/metrics", self._get_metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._settings.host, self._settings.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        logger.info("serving /healthz, /readyz and /metrics on port %d", self.port)

    async def stop(self) -> None:
        """Stop the HTTP server."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _get_healthz(self, _: web.Request) -> web.Response:
        return _build_response(self._health.find_liveness_problem())

    async def _get_readyz(self, _: web.Request) -> web.Response:
        return _build_response(self._health.find_readiness_problem())

    async def _get_metrics(self, _: web.Request) -> web.Response:
        self._refresh_metrics()
        body = generate_latest(self._metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _build_response(problem: str) -> web.Response:
    return web.Response(text=f"{problem or 'ok'}\n", status=503 if problem else 200)
