"""How the operator reads progress reports over HTTP: which reports it accepts, at which intervals it reads, and when it drops reports."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from finetune_api.names import PROGRESS_TOKEN_HEADER
from finetune_operator.scrape import MAX_RESPONSE_BYTES, ProgressScraper, ScrapeTarget
from finetune_operator.settings import ScrapeSettings
from finetune_operator.workqueue import JobKey

from tests.unit.operator.samples import T0, UID

KEY = JobKey("team", "run")
REPORT = {"uid": UID, "attempt": 1, "stage": "training", "progress": {"step": 3, "totalSteps": 9}}


class FakeProgressServer:
    """The HTTP server of a pod. The server counts requests and responds with `body` or with a redirect."""

    def __init__(self) -> None:
        self.body: str | None = json.dumps(REPORT)
        self.redirects = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.request_count = 0
        self.tokens: set[str | None] = set()
        self._changed = asyncio.Condition()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        async with self._changed:
            self.request_count += 1
            self.tokens.add(request.headers.get(PROGRESS_TOKEN_HEADER))
            self._changed.notify_all()
        await self.may_answer.wait()
        if self.redirects and request.path == "/progress":
            raise web.HTTPFound("/elsewhere")
        return web.Response(text=self.body) if self.body is not None else web.Response(status=503)

    async def wait_for_requests(self, count: int) -> None:
        """Wait until `count` requests have arrived."""
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: self.request_count >= count)


@contextlib.asynccontextmanager
async def serve(pod: FakeProgressServer) -> AsyncIterator[FakeProgressServer]:
    app = web.Application()
    app.router.add_get("/{path}", pod.handle)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    pod.url = f"http://127.0.0.1:{runner.addresses[0][1]}/progress"
    yield pod
    pod.may_answer.set()
    await runner.cleanup()


@pytest.fixture
async def pod() -> AsyncIterator[FakeProgressServer]:
    async with serve(FakeProgressServer()) as server:
        yield server


class ReportRecorder:
    """The scraper's callback `on_report`. The callback records the keys of the jobs that have a new report."""

    def __init__(self) -> None:
        self.keys: list[JobKey] = []
        self.changed = asyncio.Event()

    def __call__(self, key: JobKey) -> None:
        self.keys.append(key)
        self.changed.set()

    async def wait(self) -> None:
        """Wait for the first report."""
        await asyncio.wait_for(self.changed.wait(), 10)


@pytest.fixture
async def recorder() -> ReportRecorder:
    return ReportRecorder()


@pytest.fixture
async def scraper(recorder: ReportRecorder) -> AsyncIterator[ProgressScraper]:
    settings = ScrapeSettings(interval_seconds=0.01, starting_interval_seconds=0.01, timeout_seconds=60, concurrency=2)
    running_scraper = ProgressScraper(settings, lambda: T0, recorder)
    task = asyncio.create_task(running_scraper.run())
    yield running_scraper
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def make_target(pod: FakeProgressServer, **fields: Any) -> ScrapeTarget:
    return ScrapeTarget(**{"uid": UID, "attempt": 1, "pod_uid": "pod-1-0", "url": pod.url, **fields})


@pytest.mark.parametrize("token", [None, "abc"])
async def test_request_has_the_token_of_the_attempt(scraper: ProgressScraper, recorder: ReportRecorder, pod: FakeProgressServer, token: str | None) -> None:
    scraper.watch(KEY, make_target(pod, token=token))
    await recorder.wait()
    assert pod.tokens == {token}
    assert "abc" not in repr(make_target(pod, token=token))


async def test_report_is_kept_with_its_time_for_its_uid_and_attempt(scraper: ProgressScraper, recorder: ReportRecorder, pod: FakeProgressServer) -> None:
    scraper.watch(KEY, make_target(pod))
    await recorder.wait()
    received = scraper.last_report(KEY, UID, 1)
    assert received is not None
    assert (received.report.progress.step, received.received_at, received.pod_uid) == (3, T0, "pod-1-0")
    assert scraper.last_report(KEY, UID, 2) is None
    assert scraper.last_report(KEY, "another", 1) is None


@pytest.mark.parametrize(
    "body",
    [
        None, "", "not json", "[]", json.dumps(REPORT | {"uid": "another"}), json.dumps(REPORT | {"attempt": 2}),
        json.dumps(REPORT | {"detail": "x" * MAX_RESPONSE_BYTES}),
    ],
    ids=["503", "empty", "text", "list", "other job", "other attempt", "too long"],
)  # fmt: skip
async def test_response_that_is_not_a_report_of_this_attempt_is_ignored(
    scraper: ProgressScraper, recorder: ReportRecorder, pod: FakeProgressServer, body: str | None
) -> None:
    pod.body = body
    scraper.watch(KEY, make_target(pod))
    await pod.wait_for_requests(3)
    assert recorder.keys == []
    assert scraper.last_report(KEY, UID, 1) is None
    pod.body = json.dumps(REPORT)
    await recorder.wait()


async def test_stopped_target_keeps_its_report_until_it_is_dropped(scraper: ProgressScraper, recorder: ReportRecorder, pod: FakeProgressServer) -> None:
    scraper.watch(KEY, make_target(pod))
    await recorder.wait()
    scraper.stop(KEY)
    assert scraper.last_report(KEY, UID, 1) is not None
    scraper.drop(KEY)
    assert scraper.last_report(KEY, UID, 1) is None
    assert scraper._subscriptions == {}
    assert scraper._targets_and_reports == {}


async def test_unresponsive_pod_does_not_delay_reads_of_other_pods(scraper: ProgressScraper, recorder: ReportRecorder, pod: FakeProgressServer) -> None:
    """The first pod does not respond during the whole test. If the scraper read only one pod at a time, it would never read the second pod."""
    async with serve(FakeProgressServer()) as blocked_server:
        blocked_server.may_answer.clear()
        scraper.watch(JobKey("team", "silent"), make_target(blocked_server))
        await blocked_server.wait_for_requests(1)
        scraper.watch(KEY, make_target(pod))
        await recorder.wait()
        assert set(recorder.keys) == {KEY}
        assert blocked_server.request_count == 1


async def test_number_of_concurrent_reads_is_limited(scraper: ProgressScraper, recorder: ReportRecorder, pod: FakeProgressServer) -> None:
    async with serve(FakeProgressServer()) as blocked_server:
        blocked_server.may_answer.clear()
        for name in ("a", "b"):
            scraper.watch(JobKey("team", name), make_target(blocked_server))
        await blocked_server.wait_for_requests(2)
        scraper.watch(KEY, make_target(pod))
        for _ in range(20):
            await asyncio.sleep(0)
        assert (pod.request_count, recorder.keys) == (0, [])
        blocked_server.may_answer.set()
        await pod.wait_for_requests(1)


async def test_target_that_is_stopped_and_watched_again_is_read_by_one_subscription(scraper: ProgressScraper, pod: FakeProgressServer) -> None:
    """If the pod's readiness probe alternately fails and succeeds, the operator must not send more requests than to a pod that stays ready."""
    for _ in range(20):
        scraper.watch(KEY, make_target(pod))
        scraper.stop(KEY)
    scraper.watch(KEY, make_target(pod))
    await pod.wait_for_requests(5)
    assert len([subscription for _, _, subscription in scraper._heap if scraper._is_current(subscription)]) <= 1
    assert len(scraper._heap) <= 1


async def test_redirects_are_not_followed(scraper: ProgressScraper, recorder: ReportRecorder, pod: FakeProgressServer) -> None:
    pod.redirects = True
    scraper.watch(KEY, make_target(pod))
    await pod.wait_for_requests(3)
    assert recorder.keys == []


def test_interval_grows_while_a_pod_does_not_answer() -> None:
    scraper = ProgressScraper(ScrapeSettings(), lambda: T0, lambda key: None)
    intervals_seconds = [scraper._compute_interval_seconds(None, failure_count) for failure_count in (1, 4, 5, 9, 10, 15, 20, 25, 1000)]
    assert intervals_seconds == [3, 3, 6, 6, 12, 24, 48, 60, 60]


@pytest.mark.parametrize(
    ("template", "ip", "url"),
    [
        ("http://{ip}:{port}{path}", "10.0.0.1", "http://10.0.0.1:8080/progress"),
        ("http://{ip}:{port}{path}", "fd00::1", "http://[fd00::1]:8080/progress"),
        ("http://proxy/{namespace}/{pod}", "10.0.0.1", "http://proxy/team/run-1-0-x"),
    ],
    ids=["IPv4", "IPv6", "proxy"],
)
def test_progress_url_follows_the_template(template: str, ip: str, url: str) -> None:
    scraper = ProgressScraper(ScrapeSettings(url=template), lambda: T0, lambda key: None)
    assert scraper.build_progress_url("team", "run-1-0-x", ip) == url
