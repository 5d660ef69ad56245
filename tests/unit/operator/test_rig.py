"""The watches of the test rig in tests/integration/operator/rig.py. If the rig did not restart a watch that ended, tests would see no further changes, as if
the operator did nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from finetune_operator.objects import FINETUNEJOB

from tests.integration.operator.rig import WatchedObjects

EVENT = json.dumps({"type": "ADDED", "object": {"metadata": {"name": "run"}}})


class WatchServer:
    """A server that sends the given responses to successive watch requests."""

    def __init__(self, *answers: tuple[int, str]) -> None:
        self.answers = list(answers)

    async def handle(self, _: web.Request) -> web.StreamResponse:
        code, text = self.answers.pop(0)
        return web.Response(status=code, text=text)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as client_session:
        yield client_session


@pytest.mark.parametrize(
    "first_answer",
    [(429, "storage is (re)initializing"), (500, ""), (200, EVENT[:20]), (200, "")],
    ids=["refused", "failed", "cut in a line", "ended"],
)
async def test_rig_restarts_a_watch_that_ended(session: aiohttp.ClientSession, first_answer: tuple[int, str]) -> None:
    watch_server = WatchServer(first_answer, (200, EVENT), (200, EVENT))
    runner = web.ServerRunner(web.Server(watch_server.handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = SimpleNamespace(server=f"http://127.0.0.1:{runner.addresses[0][1]}")
    rig: Any = SimpleNamespace(endpoint=endpoint, namespace="team", changed=asyncio.Condition())
    store = WatchedObjects(rig, FINETUNEJOB)
    task = asyncio.create_task(store.run(session))
    async with asyncio.timeout(10), rig.changed:
        await rig.changed.wait_for(lambda: "run" in store.items)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await runner.cleanup()
