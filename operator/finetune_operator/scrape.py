"""Progress is read from rank 0's pod, over HTTP, in the background: a pod that does not answer must not hold up a worker.

A target is watched from the moment its pod runs until it is forgotten. What a pod says is believed only if it names the uid
and the attempt that were asked for: addresses are reused.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import aiohttp
from finetune_api.names import PROGRESS_PORT, Path
from finetune_api.pod import ProgressReport
from finetune_api.status import Stage
from pydantic import ValidationError

from finetune_operator.facts import ReceivedReport
from finetune_operator.settings import ScrapeSettings
from finetune_operator.workqueue import Key

logger = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024
"""Longest answer that is read."""


SOON = 5
"""Questions without an answer after which the pause doubles, again and again."""
LONGEST_SILENCE = 4
"""A pod that does not answer is asked ever more rarely, down to once in this many intervals: it holds a place for a whole timeout."""


@dataclass(frozen=True)
class Target:
    """Whom to ask, and who is expected to answer."""

    uid: str
    attempt: int
    pod_uid: str
    url: str


@dataclass(eq=False)
class Turn:
    """A target from the moment it is watched until it is stopped; watched again, it has another turn, and one place in the heap."""

    number: int
    key: Key
    target: Target
    unanswered: int = 0
    """Questions in a row without an answer."""


class Scraper:
    """Asks all targets in turn. `told` is called with the key of every job that something new was heard from."""

    def __init__(
        self, settings: ScrapeSettings, now: Callable[[], datetime], told: Callable[[Key], None],
    ):  # fmt: skip
        self._settings = settings
        self._now = now
        self._told = told
        self._turns: dict[Key, Turn] = {}
        self._heard: dict[Key, tuple[Target, ReceivedReport]] = {}
        self._heap: list[tuple[float, int, Turn]] = []
        """Turns by the time at which they are due; one whose key has another turn by now is skipped."""
        self._numbers = itertools.count()
        self._changed = asyncio.Event()

    def url(self, namespace: str, pod: str, ip: str) -> str:
        """Address of a pod's progress."""
        host = f"[{ip}]" if ":" in ip else ip
        return self._settings.url.format(
            ip=host, port=PROGRESS_PORT, path=Path.PROGRESS.value, namespace=namespace, pod=pod
        )

    def watch(self, key: Key, target: Target) -> None:
        """Ask this target from now on; nothing changes if it is asked already."""
        turn = self._turns.get(key)
        if turn is not None and turn.target == target:
            return
        self._turns[key] = turn = Turn(next(self._numbers), key, target)
        self._ask_after(0, turn)

    def stop(self, key: Key) -> None:
        """Ask no more; what was heard stays until it is forgotten."""
        self._turns.pop(key, None)

    def forget(self, key: Key) -> None:
        """Ask no more, and drop what was heard."""
        self.stop(key)
        self._heard.pop(key, None)

    def heard(self, key: Key, uid: str, attempt: int) -> ReceivedReport | None:
        """The last that was heard of this attempt."""
        found = self._heard.get(key)
        if found is None or found[0].uid != uid or found[0].attempt != attempt:
            return None
        return found[1]

    async def run(self) -> None:
        """Ask until cancelled."""
        timeout = aiohttp.ClientTimeout(total=self._settings.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=self._settings.concurrency, force_close=False)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as group:
            free = asyncio.Semaphore(self._settings.concurrency)
            while True:
                turn = await self._next()
                await free.acquire()
                task = group.create_task(self._ask(session, turn))
                task.add_done_callback(lambda _: free.release())

    async def _next(self) -> Turn:
        """The next turn that is due."""
        loop = asyncio.get_running_loop()
        while True:
            while self._heap and not self._holds(self._heap[0][2]):
                heapq.heappop(self._heap)
            wait = self._heap[0][0] - loop.time() if self._heap else None
            if wait is not None and wait <= 0:
                return heapq.heappop(self._heap)[2]
            self._changed.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _holds(self, turn: Turn) -> bool:
        return self._turns.get(turn.key) is turn

    def _ask_after(self, seconds: float, turn: Turn) -> None:
        heapq.heappush(self._heap, (asyncio.get_running_loop().time() + seconds, turn.number, turn))
        self._changed.set()

    async def _ask(self, session: aiohttp.ClientSession, turn: Turn) -> None:
        report = await self._read(session, turn.target)
        if not self._holds(turn):
            return
        turn.unanswered = 0 if report is not None else turn.unanswered + 1
        self._ask_after(self._pause(report, turn.unanswered), turn)
        if report is not None:
            self._heard[turn.key] = (turn.target, ReceivedReport(report, self._now(), turn.target.pod_uid))
            self._told(turn.key)

    def _pause(self, report: ProgressReport | None, unanswered: int) -> float:
        """Seconds until the next question."""
        settings = self._settings
        if report is None:
            longest = max(settings.starting_interval_seconds, LONGEST_SILENCE * settings.interval_seconds)
            return float(min(settings.starting_interval_seconds * 2 ** min(unanswered // SOON, 32), longest))
        starting = report.stage in (Stage.STARTING, Stage.DOWNLOADING, Stage.CHECKING)
        return settings.starting_interval_seconds if starting else settings.interval_seconds

    async def _read(self, session: aiohttp.ClientSession, target: Target) -> ProgressReport | None:
        try:
            async with session.get(target.url, allow_redirects=False) as response:
                if response.status != 200:
                    return None
                data = b""
                async for chunk in response.content.iter_any():
                    data += chunk
                    if len(data) > MAX_BYTES:
                        return None
                report = ProgressReport.model_validate_json(data)
        except (aiohttp.ClientError, TimeoutError, OSError, ValidationError) as error:
            logger.debug("%s does not tell its progress: %s", target.url, error)
            return None
        if report.uid != target.uid or report.attempt != target.attempt:
            logger.info("%s is another job's pod now", target.url)
            return None
        return report
