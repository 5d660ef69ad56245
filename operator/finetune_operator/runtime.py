"""The process: what runs beside what, and what ends it.

kopf watches on every replica, so that a standby's cache is warm; only the leader works. Any part that ends ends the whole: a half
of an operator that looks alive is worse than none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import kopf

from finetune_operator import handlers
from finetune_operator.cache import Cache, Listed
from finetune_operator.events import Recorder
from finetune_operator.http import Server
from finetune_operator.kube import Kube, KubeError, NotFound
from finetune_operator.lease import Elector, LeaseLost
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Kind, Object
from finetune_operator.reconcile import Reconciler
from finetune_operator.scrape import Scraper
from finetune_operator.settings import OperatorConfig
from finetune_operator.watches import Watches
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DRAIN_SECONDS = 10.0
"""Time for looks under way to finish when the process is told to end."""
LAG_PERIOD = 1.0
DISCOVERY_PERIOD = 0.2
DEAF_SECONDS = 4.0 * handlers.SILENCE_SECONDS
"""A watch that was not begun again for so long is not about to be, whatever pauses it makes between two tries."""


STEP = 20
"""Objects of a list that are taken in without a break."""


class _Read(NamedTuple):
    """What full lists of a kind showed, and the oldest version among them."""

    uids: set[str]
    version: int


class StartError(Exception):
    """The operator cannot start; the message says what is missing."""


class Runtime:
    """Everything that runs."""

    def __init__(self, config: OperatorConfig, kube: Kube, metrics: Metrics):
        self._config, self._kube, self._metrics = config, kube, metrics
        self._cache = Cache()
        self._queue = WorkQueue()
        self._scraper = Scraper(config.scrape, kube.clock.now, self._queue.add)
        instance = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._recorder = Recorder(kube, instance)
        self._reconciler = Reconciler(
            kube=kube, cache=self._cache, queue=self._queue, recorder=self._recorder, scraper=self._scraper,
            metrics=metrics, config=config,
        )  # fmt: skip
        self._elector = Elector(kube, config.leader_election, _own_namespace(), instance)
        self._synced = asyncio.Event()
        self._working = asyncio.Event()
        self._stopping = False
        self._told_to_end = asyncio.Event()
        self._version = 0
        """Of the world that the last full lists showed."""
        self._resyncing = asyncio.Lock()
        paths = [kind.path(one) for kind in (FINETUNEJOB, JOB, POD) for one in config.namespaces or (None,)]
        self._watches = Watches(paths, metrics.request)
        self._server = Server(config.http, metrics, healthy=self._healthy, ready=self._ready, refresh=self._refresh)

    async def run(self) -> int:
        """Run until told to end; returns the exit code: 0 if it was told to, 1 if a part failed."""
        loop = asyncio.get_running_loop()
        # Until kopf takes over the signals; told to end before that, it ends at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_end.set)
        try:
            await self._server.start()
        except OSError as refused:
            http, why = self._config.http, refused.strerror
            logger.error("start: http.host %s, http.port %d cannot be listened on: %s", http.host, http.port, why)
            await self._server.stop()
            return 1
        first = await self._first_look()
        if first is not None:
            await self._server.stop()
            return first
        if self._config.leader_election.enabled:
            self._kube.guard = self._elector.check
        parts = {
            "leader": self._lead(),
            "resync": self._resync_for_ever(),
            "scraper": self._scraper.run(),
            "lag": self._measure_lag(),
        }
        parts |= {f"worker-{number}": self._work() for number in range(self._config.workers)}
        tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
        # kopf ends every task that was made after it started: ours must have made theirs before.
        await asyncio.sleep(0)
        watching = asyncio.create_task(self._watch(), name="watches")
        done, _ = await asyncio.wait([watching, *tasks], return_when=asyncio.FIRST_COMPLETED)
        code = 0 if watching in done and watching.exception() is None else 1
        errors = {task.get_name(): task.exception() for task in done if not task.cancelled()}
        for name, error in errors.items():
            if error is not None:
                _explain(name, error)
        if not any(isinstance(error, LeaseLost) for error in errors.values()):
            await self._drain()
        await self._end([watching, *tasks])
        return code

    async def _first_look(self) -> int | None:
        """Fill the cache before anything else starts; an exit code if that cannot be, or is no longer wanted."""
        looking = asyncio.create_task(self._resync())
        waiting = asyncio.create_task(self._told_to_end.wait())
        await asyncio.wait([looking, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if not looking.done():
            looking.cancel()
            return 0
        error = looking.exception()
        if error is not None:
            _explain("start", error)
        return None if error is None else 1

    async def _drain(self) -> None:
        """Let looks under way finish. Not after a lost lead: another one writes now."""
        self._stopping = True
        self._working.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._queue.idle:
                    self._queue.drop_waiting()
                    await asyncio.sleep(0.05)

    async def _end(self, tasks: list[asyncio.Task[Any]]) -> None:
        """End every part, hand over the lead."""
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._elector.release()
        await self._server.stop()

    async def _watch(self) -> None:
        """kopf, for as long as the process lives."""
        # kopf reads the server's directory once: of a kind that is not in it yet it would never hear.
        while not (self._told_to_end.is_set() or await self._kube.discovered(FINETUNEJOB)):  # noqa: ASYNC110 -- happens on the API server
            await asyncio.sleep(DISCOVERY_PERIOD)
        if self._told_to_end.is_set():
            return
        namespaces = list(self._config.namespaces)
        self._watches.start()
        await kopf.operator(
            registry=handlers.register(self._kube, self._cache, self._queue, self._watches),
            settings=handlers.settings(self._config),
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
        )

    async def _lead(self) -> None:
        """Take the lead, look at everything once, let the workers work, keep the lead."""
        if not self._config.leader_election.enabled:
            self._start_working()
            await asyncio.Event().wait()
        await self._elector.acquire()
        await self._resync()
        self._start_working()
        await self._elector.keep()

    def _start_working(self) -> None:
        self._metrics.leader.set(1)
        self._working.set()
        logger.info("working on %d jobs with %d workers", len(self._cache.keys()), self._config.workers)

    async def _work(self) -> None:
        await self._working.wait()
        await self._reconciler.work()

    async def _resync_for_ever(self) -> None:
        """Full lists from time to time: a watch that was interrupted never tells of what was deleted meanwhile."""
        await self._synced.wait()
        while True:
            await asyncio.sleep(self._config.resync_seconds)
            try:
                await self._resync()
            except KubeError as error:
                logger.warning("the resync failed and is tried again later: %s", error)

    async def _resync(self) -> None:
        """One at a time: one that was overtaken would take its own, older lists for a store that went back."""
        async with self._resyncing:
            await self._list_all()

    async def _list_all(self) -> None:
        finetunejobs = await self._read(FINETUNEJOB, "", handlers.take_finetunejob)
        jobs = await self._read(JOB, handlers.SELECTOR, handlers.take_job)
        pods = await self._read(POD, handlers.SELECTOR, handlers.take_pod)
        listed = Listed(
            finetunejobs=frozenset(finetunejobs.uids),
            jobs=frozenset(jobs.uids),
            pods=frozenset(pods.uids),
            version=min(one.version for one in (finetunejobs, jobs, pods)),
            namespaces=frozenset(self._config.namespaces),
        )
        if listed.version < self._version:
            # A store that was restored from a backup: the cache would take every event from now on for an old one.
            raise StartError(f"the API server's store went back from version {self._version} to {listed.version}")
        self._version = listed.version
        for key in [*self._cache.prune(listed), *self._cache.keys()]:
            self._queue.add(key)
        self._synced.set()

    async def _read(self, kind: Kind, labels: str, take: Callable[[Cache, None, Object], Any]) -> _Read:
        """Put everything of a kind into the cache, in small steps: what else the process does must not wait for thousands."""
        uids: set[str] = set()
        versions = []
        try:
            for namespace in self._config.namespaces or (None,):
                async for page in self._kube.pages(kind, namespace, labels=labels):
                    for number, body in enumerate(page.items):
                        take(self._cache, None, body)
                        uids.add(body["metadata"]["uid"])
                        if number % STEP == STEP - 1:
                            await asyncio.sleep(0)
                versions.append(page.version)
        except NotFound as error:
            raise StartError(
                f"the API server does not know {kind.plural} of {kind.api_version}: install the CRD first"
            ) from error
        return _Read(uids, min(versions))

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(LAG_PERIOD)
            self._metrics.loop_lag.set(max(0.0, loop.time() - before - LAG_PERIOD))

    def _healthy(self) -> str:
        """What is wrong with this process; empty: nothing."""
        patience = 2 * self._config.resync_seconds + self._config.api.timeout_seconds
        deaf = self._watches.deaf(max(patience, DEAF_SECONDS))
        if deaf:
            return deaf
        if not self._working.is_set():
            return ""
        oldest = self._queue.oldest()
        return f"a job has waited for {oldest:.0f} s" if oldest > self._config.stuck_seconds else ""

    def _ready(self) -> str:
        return "" if self._synced.is_set() and not self._stopping else "the caches are not filled yet"

    def _refresh(self) -> None:
        phases = Counter(str(job.status.phase or "Pending") for job in self._cache.jobs())
        self._metrics.phases(phases)
        self._metrics.queue_depth.set(len(self._queue))


def _own_namespace() -> str:
    if name := os.environ.get("POD_NAMESPACE"):
        return name
    return NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"


def _explain(name: str, error: BaseException) -> None:
    """Why the process ends: in one line where the reason is known."""
    if isinstance(error, StartError | LeaseLost | KubeError):
        logger.error("%s: %s", name, error)
    else:
        logger.error("%s failed", name, exc_info=error)
