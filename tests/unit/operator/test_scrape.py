"""Progress over HTTP: whom it believes, what it survives, and that it forgets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from finetune_operator import logs
from finetune_operator.logs import JsonFormatter, TextFormatter
from finetune_operator.scrape import MAX_BYTES, Scraper, Target
from finetune_operator.settings import ScrapeSettings
from finetune_operator.workqueue import Key

from tests.unit.operator.samples import T0, UID

KEY = Key("team", "run")
GOOD = {"uid": UID, "attempt": 1, "stage": "training", "progress": {"step": 3, "totalSteps": 9}}


class Pod:
    """A pod's HTTP server; says `answer`, counts how often."""

    def __init__(self) -> None:
        self.answer: str | None = json.dumps(GOOD)
        self.asked = 0
        self.moved = False
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.asked += 1
        if self.moved and request.path == "/progress":
            raise web.HTTPFound("/elsewhere")
        return web.Response(text=self.answer) if self.answer is not None else web.Response(status=503)


@pytest.fixture
async def pod() -> AsyncIterator[Pod]:
    found = Pod()
    app = web.Application()
    app.router.add_get("/{path}", found.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    found.url = f"http://127.0.0.1:{runner.addresses[0][1]}/progress"
    yield found
    await runner.cleanup()


class Told:
    """Counts what the scraper tells."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = asyncio.Event()

    def __call__(self, key: Key) -> None:
        assert key == KEY
        self.count += 1
        self.changed.set()


@pytest.fixture
async def told() -> Told:
    return Told()


@pytest.fixture
async def scraper(told: Told) -> AsyncIterator[Scraper]:
    settings = ScrapeSettings(interval_seconds=0.01, starting_interval_seconds=0.01, timeout_seconds=1)
    found = Scraper(settings, lambda: T0, told)
    task = asyncio.create_task(found.run())
    yield found
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def target(pod: Pod, **fields: Any) -> Target:
    return Target(**{"uid": UID, "attempt": 1, "pod_uid": "pod-1-0", "url": pod.url, **fields})


async def asked(pod: Pod, times: int) -> None:
    async with asyncio.timeout(10):
        while pod.asked < times:  # noqa: ASYNC110 -- the server of this test counts, nobody tells
            await asyncio.sleep(0.01)


async def test_what_a_pod_says_is_heard_with_its_time(scraper: Scraper, told: Told, pod: Pod) -> None:
    scraper.watch(KEY, target(pod))
    await asyncio.wait_for(told.changed.wait(), 10)
    heard = scraper.heard(KEY, UID, 1)
    assert heard is not None
    assert (heard.report.progress.step, heard.time, heard.pod_uid) == (3, T0, "pod-1-0")
    assert scraper.heard(KEY, UID, 2) is None
    assert scraper.heard(KEY, "another", 1) is None


@pytest.mark.parametrize(
    "answer",
    [
        None, "", "not json", "[]", json.dumps(GOOD | {"uid": "another"}), json.dumps(GOOD | {"attempt": 2}),
        json.dumps(GOOD | {"detail": "x" * MAX_BYTES}), json.dumps(GOOD | {"stage": "flying"}),
    ],
    ids=["503", "empty", "text", "list", "other job", "other attempt", "too long", "unknown stage"],
)  # fmt: skip
async def test_what_is_not_this_job_s_progress_is_not_believed(
    scraper: Scraper, told: Told, pod: Pod, answer: str | None
) -> None:
    pod.answer = answer
    scraper.watch(KEY, target(pod))
    await asked(pod, 3)
    assert told.count == 0
    assert scraper.heard(KEY, UID, 1) is None
    pod.answer = json.dumps(GOOD)
    await asyncio.wait_for(told.changed.wait(), 10)


async def test_nobody_is_asked_after_the_end(scraper: Scraper, told: Told, pod: Pod) -> None:
    scraper.watch(KEY, target(pod))
    await asyncio.wait_for(told.changed.wait(), 10)
    scraper.stop(KEY)
    assert scraper.heard(KEY, UID, 1) is not None
    scraper.forget(KEY)
    assert scraper.heard(KEY, UID, 1) is None
    assert scraper._turns == {}
    assert scraper._heard == {}


async def test_a_pod_that_cannot_be_reached_holds_nobody_up(scraper: Scraper, told: Told, pod: Pod) -> None:
    other = Key("team", "other")
    scraper.watch(other, target(pod, url="http://127.0.0.1:9/progress"))
    scraper.watch(KEY, target(pod))
    await asyncio.wait_for(told.changed.wait(), 10)


async def test_a_target_that_is_stopped_and_watched_again_is_asked_by_one(scraper: Scraper, pod: Pod) -> None:
    """A pod whose readiness comes and goes must not be asked twice as often after each time."""
    for _ in range(20):
        scraper.watch(KEY, target(pod))
        scraper.stop(KEY)
    scraper.watch(KEY, target(pod))
    await asked(pod, 5)
    assert len([turn for _, _, turn in scraper._heap if scraper._holds(turn)]) <= 1
    assert len(scraper._heap) <= 1


async def test_a_pod_sends_the_operator_nowhere(scraper: Scraper, told: Told, pod: Pod) -> None:
    pod.moved = True
    scraper.watch(KEY, target(pod))
    await asked(pod, 3)
    assert told.count == 0


def test_the_silent_are_asked_ever_more_rarely() -> None:
    scraper = Scraper(ScrapeSettings(), lambda: T0, lambda key: None)
    pauses = [scraper._pause(None, count) for count in (1, 4, 5, 9, 10, 15, 20, 25, 1000)]
    assert pauses == [3, 3, 6, 6, 12, 24, 48, 60, 60]


def test_addresses() -> None:
    found = Scraper.url(_bare("http://{ip}:{port}{path}"), "team", "run-1-0-x", "10.0.0.1")
    assert found == "http://10.0.0.1:8080/progress"
    assert Scraper.url(_bare("http://{ip}:{port}{path}"), "team", "p", "fd00::1") == "http://[fd00::1]:8080/progress"
    assert Scraper.url(_bare("http://proxy/{namespace}/{pod}"), "team", "p", "x") == "http://proxy/team/p"


def _bare(url: str) -> Any:
    class Bare:
        _settings = ScrapeSettings(url=url)

    return Bare()


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("finetune_operator.x", logging.INFO, "file", 1, message, None, None)


def test_log_lines_name_the_job() -> None:
    token = logs.job.set("team/run")
    try:
        value = json.loads(JsonFormatter().format(record("created")))
        assert {k: value[k] for k in ("level", "message", "job")} == {
            "level": "info",
            "message": "created",
            "job": "team/run",
        }
        assert TextFormatter().format(record("created")).endswith("created [job=team/run]")
    finally:
        logs.job.reset(token)
    assert "job" not in json.loads(JsonFormatter().format(record("created")))
