"""What `/healthz` and `/readyz` respond if the operator process runs but makes no progress."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from finetune_operator.health import HealthChecks
from finetune_operator.http import HttpServer
from finetune_operator.kopf_adapter import WatchMonitor
from finetune_operator.kube import ServerClock
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Kind
from finetune_operator.runtime import OperatorRuntime
from finetune_operator.settings import HttpSettings, parse_config
from finetune_operator.workqueue import JobKey, WorkQueue

from tests.unit.operator.virtual import run

CONFIG = parse_config({"resyncSeconds": 300, "stuckSeconds": 100, "api": {"timeoutSeconds": 30}}, "test")
KEY = JobKey("team", "run")


class Process:
    """The objects of an operator process that the health checks read."""

    def __init__(self) -> None:
        self.monitor = WatchMonitor([kind.path(None) for kind in (FINETUNEJOB, JOB, POD)], lambda *_: None)
        self.queue = WorkQueue()
        self.cache_filled = asyncio.Event()
        self.health = HealthChecks(CONFIG, self.monitor, self.queue, self.cache_filled)


def test_process_is_ready_between_the_first_list_and_its_shutdown() -> None:
    async def scenario() -> list[str]:
        process = Process()
        problems = [process.health.find_readiness_problem()]
        process.cache_filled.set()
        problems.append(process.health.find_readiness_problem())
        process.health.on_stopping()
        return [*problems, process.health.find_readiness_problem()]

    assert run(scenario()) == ["the cache of Kubernetes objects is not filled yet", "", "the operator is stopping"]


def test_one_stalled_watch_makes_the_process_unhealthy() -> None:
    def start_watches(process: Process, *kinds: Kind) -> None:
        for kind in kinds:
            process.monitor.record_request(f"/clusters/one{kind.path(None)}", 200, 0.1, is_watch=True)

    async def scenario() -> list[str]:
        process = Process()
        await asyncio.sleep(5000)
        problems = [process.health.find_liveness_problem()]  # this is no problem yet: kopf starts its watches after the first lists, which can take long
        process.monitor.start()
        for _ in range(20):  # kopf sends a new watch request each minute, even if no events arrive
            await asyncio.sleep(60)
            start_watches(process, FINETUNEJOB, JOB, POD)
        problems.append(process.health.find_liveness_problem())
        for _ in range(11):
            await asyncio.sleep(60)
            start_watches(process, FINETUNEJOB, JOB)
            problems.append(process.health.find_liveness_problem())
        start_watches(process, POD)
        return [*problems, process.health.find_liveness_problem()]

    assert run(scenario()) == [*[""] * 12, "the watch of /api/v1/pods is stalled: no request for 660 s", ""]


def test_job_that_waits_too_long_after_the_start_of_the_workers_makes_the_process_unhealthy() -> None:
    async def scenario() -> list[str]:
        process = Process()
        process.queue.add(KEY)
        await asyncio.sleep(5000)
        problems = [process.health.find_liveness_problem()]
        process.health.on_workers_started()
        await asyncio.sleep(99)
        problems.append(process.health.find_liveness_problem())
        await asyncio.sleep(2)
        problems.append(process.health.find_liveness_problem())
        await process.queue.take()
        problems.append(process.health.find_liveness_problem())
        process.queue.done(KEY)
        return [*problems, process.health.find_liveness_problem()]

    assert run(scenario()) == ["", "", "a job has waited 101 s for a worker", "", ""]


def test_worker_that_never_finishes_makes_the_process_unhealthy() -> None:
    async def scenario() -> str:
        process = Process()
        process.health.on_workers_started()
        process.queue.add(KEY)
        await process.queue.take()
        await asyncio.sleep(102)
        return process.health.find_liveness_problem()

    assert run(scenario()) == "a job has waited 102 s for a worker"


async def test_health_problems_are_served_with_status_503() -> None:
    process = Process()
    server = HttpServer(
        HttpSettings(host="127.0.0.1", port=0), Metrics(), health=process.health, refresh_metrics=lambda: None
    )
    await server.start()

    async def get(session: aiohttp.ClientSession, path: str) -> tuple[int, str]:
        async with session.get(f"http://127.0.0.1:{server.port}{path}") as response:
            return response.status, await response.text()

    try:
        async with aiohttp.ClientSession() as session:
            assert await get(session, "/healthz") == (200, "ok\n")
            assert await get(session, "/readyz") == (503, "the cache of Kubernetes objects is not filled yet\n")
            process.cache_filled.set()
            assert await get(session, "/readyz") == (200, "ok\n")
    finally:
        await server.stop()


def test_port_in_use_is_reported_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        kube: Any = SimpleNamespace(clock=ServerClock())

        async def scenario() -> int:
            return await OperatorRuntime(parse_config({"http": {"host": "127.0.0.1", "port": port}}, "test"), kube, Metrics()).run()

        assert asyncio.run(scenario()) == 1
    assert f"cannot listen on http.host 127.0.0.1, http.port {port}" in caplog.text
    assert [record for record in caplog.records if record.exc_info] == []
