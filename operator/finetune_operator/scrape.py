"""Reads progress reports from rank 0's pods over HTTP, in the background, so that an unresponsive pod never blocks a worker.

The scraper reads a pod's reports from the time at which the pod runs until the job no longer needs them. IP addresses are reused, so a report is
accepted only if it contains the expected uid and attempt.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

import aiohttp
from finetune_api.names import PROGRESS_PORT, PROGRESS_TOKEN_HEADER, HttpPath
from finetune_api.pod import ProgressReport
from finetune_api.status import Stage

from finetune_operator.facts import ReceivedReport
from finetune_operator.pod_reports import read_progress_report
from finetune_operator.settings import ScrapeSettings
from finetune_operator.workqueue import JobKey

logger = logging.getLogger(__name__)

MAX_RESPONSE_BYTES = 64 * 1024
"""Maximum size of a response in bytes. Longer responses are ignored."""
FAILURES_PER_DOUBLING = 5
"""The interval doubles after this many failed reads in a row."""
MAX_INTERVAL_FACTOR = 4
"""Longest interval for a pod that does not answer, as a multiple of the normal interval. The interval grows because each try holds a connection until
its timeout."""


@dataclass(frozen=True)
class ScrapeTarget:
    """URL of a pod's progress report, and the uid and attempt that this report must contain."""

    uid: str
    attempt: int
    pod_uid: str
    url: str
    token: str | None = field(default=None, repr=False)
    """Token for the request. Pods of older operators need no token and ignore the header."""


@dataclass(eq=False)
class PodSubscription:
    """A target that the scraper reads, from the call of `watch` until the call of `stop`.

    A new target of the same job gets a new subscription. The old subscription stays in the heap, but is skipped.
    """

    number: int
    key: JobKey
    target: ScrapeTarget
    failure_count: int = 0
    """Failed reads in a row."""


class ProgressScraper:
    """Reads the progress reports of all targets. After each report, the scraper calls `on_report` with the job's key."""

    def __init__(self, settings: ScrapeSettings, now: Callable[[], datetime], on_report: Callable[[JobKey], None]):
        self._settings = settings
        self._get_now = now
        self._on_report = on_report
        self._subscriptions: dict[JobKey, PodSubscription] = {}
        self._targets_and_reports: dict[JobKey, tuple[ScrapeTarget, ReceivedReport]] = {}
        self._heap: list[tuple[float, int, PodSubscription]] = []
        """Each entry has the time of the next read, a unique number, and the subscription. Stopped and replaced subscriptions stay in the heap, but are
        skipped."""
        self._numbers = itertools.count()
        self._heap_changed = asyncio.Event()

    def build_progress_url(self, namespace: str, pod_name: str, ip: str) -> str:
        """Return the URL of a pod's progress report."""
        host = f"[{ip}]" if ":" in ip else ip
        return self._settings.url.format(
            ip=host, port=PROGRESS_PORT, path=HttpPath.PROGRESS.value, namespace=namespace, pod=pod_name
        )

    def watch(self, key: JobKey, target: ScrapeTarget) -> None:
        """Start reading this target. Does nothing if the target is already being read."""
        current_subscription = self._subscriptions.get(key)
        if current_subscription is not None and current_subscription.target == target:
            return
        self._subscriptions[key] = subscription = PodSubscription(next(self._numbers), key, target)
        self._schedule_read(0, subscription)

    def stop(self, key: JobKey) -> None:
        """Stop reading the job's pod, but keep the last report."""
        self._subscriptions.pop(key, None)

    def drop(self, key: JobKey) -> None:
        """Stop reading the job's pod, and drop the last report."""
        self.stop(key)
        self._targets_and_reports.pop(key, None)

    def last_report(self, key: JobKey, uid: str, attempt: int) -> ReceivedReport | None:
        """Return the last report of this attempt, or None if no report was received."""
        target_and_report = self._targets_and_reports.get(key)
        if target_and_report is None or target_and_report[0].uid != uid or target_and_report[0].attempt != attempt:
            return None
        return target_and_report[1]

    async def run(self) -> None:
        """Read the reports of all targets until cancelled."""
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=self._settings.concurrency, force_close=False)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as task_group:
            free_connections = asyncio.Semaphore(self._settings.concurrency)
            while True:
                subscription = await self._wait_for_next_due()
                await free_connections.acquire()
                task = task_group.create_task(self._read_report(session, subscription))
                task.add_done_callback(lambda _: free_connections.release())

    async def _wait_for_next_due(self) -> PodSubscription:
        loop = asyncio.get_running_loop()
        while True:
            while self._heap and not self._is_current(self._heap[0][2]):
                heapq.heappop(self._heap)
            wait_seconds = self._heap[0][0] - loop.time() if self._heap else None
            if wait_seconds is not None and wait_seconds <= 0:
                return heapq.heappop(self._heap)[2]
            self._heap_changed.clear()
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._heap_changed.wait()
            except TimeoutError:
                continue

    def _is_current(self, subscription: PodSubscription) -> bool:
        return self._subscriptions.get(subscription.key) is subscription

    def _schedule_read(self, seconds: float, subscription: PodSubscription) -> None:
        heapq.heappush(self._heap, (asyncio.get_running_loop().time() + seconds, subscription.number, subscription))
        self._heap_changed.set()

    async def _read_report(self, session: aiohttp.ClientSession, subscription: PodSubscription) -> None:
        report = await self._fetch_report(session, subscription.target)
        if not self._is_current(subscription):
            return
        subscription.failure_count = 0 if report is not None else subscription.failure_count + 1
        self._schedule_read(self._compute_interval_seconds(report, subscription.failure_count), subscription)
        if report is not None:
            received_report = ReceivedReport(report, self._get_now(), subscription.target.pod_uid)
            self._targets_and_reports[subscription.key] = (subscription.target, received_report)
            self._on_report(subscription.key)

    def _compute_interval_seconds(self, report: ProgressReport | None, failure_count: int) -> float:
        """Return the seconds until the next read. `report`: the report of the last read, or None if this read failed."""
        settings = self._settings
        if report is None:
            longest_seconds = max(settings.starting_interval_seconds, MAX_INTERVAL_FACTOR * settings.interval_seconds)
            return float(min(settings.starting_interval_seconds * 2 ** min(failure_count // FAILURES_PER_DOUBLING, 32), longest_seconds))
        is_starting = report.stage in (Stage.STARTING, Stage.DOWNLOADING, Stage.CHECKING)
        return settings.starting_interval_seconds if is_starting else settings.interval_seconds

    async def _fetch_report(self, session: aiohttp.ClientSession, target: ScrapeTarget) -> ProgressReport | None:
        headers = {PROGRESS_TOKEN_HEADER: target.token} if target.token else {}
        try:
            async with session.get(target.url, headers=headers, allow_redirects=False) as response:
                if response.status != 200:
                    logger.debug("no progress report from %s: HTTP status %d", target.url, response.status)
                    return None
                response_body = b""
                async for chunk in response.content.iter_any():
                    response_body += chunk
                    if len(response_body) > MAX_RESPONSE_BYTES:
                        return None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.debug("no progress report from %s: %s", target.url, error)
            return None
        report = read_progress_report(response_body, self._get_now())
        if report is None:
            logger.debug("no progress report from %s: the response is not a report", target.url)
            return None
        if report.uid != target.uid or report.attempt != target.attempt:
            logger.info("the pod at %s belongs to another job or attempt", target.url)
            return None
        return report
