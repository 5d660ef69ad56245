"""Runs the concurrent tasks of the operator process, and stops them.

Each replica watches the objects, so the cache of a standby replica is up to date; only the leader reconciles. If one task ends, the process ends.
Otherwise the operator would look healthy although a part of its work is not done.
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
from pathlib import Path
from typing import Any

from finetune_operator import kopf_adapter
from finetune_operator.attempt_secrets import AttemptSecrets
from finetune_operator.cache import JobCache
from finetune_operator.events import EventRecorder
from finetune_operator.handlers import create_registry
from finetune_operator.health import HealthChecks
from finetune_operator.http import HttpServer
from finetune_operator.kopf_adapter import WatchMonitor
from finetune_operator.kube import KubeClient, KubeError
from finetune_operator.lease import LeaderElector, LeaderTasks, LeaseLost
from finetune_operator.metrics import Metrics
from finetune_operator.objects import FINETUNEJOB, JOB, POD
from finetune_operator.reconcile import Reconciler
from finetune_operator.resync import Resyncer
from finetune_operator.scrape import ProgressScraper
from finetune_operator.settings import OperatorConfig, StartError
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DRAIN_SECONDS = 10.0
"""Seconds that running reconciles have to finish when the process is asked to stop."""
LOOP_LAG_PERIOD_SECONDS = 1.0


class OperatorRuntime:
    """Creates all objects of the operator and runs their tasks."""

    def __init__(self, config: OperatorConfig, kube: KubeClient, metrics: Metrics):
        self._config, self._kube, self._metrics = config, kube, metrics
        self._cache = JobCache()
        self._queue = WorkQueue()
        self._scraper = ProgressScraper(config.scrape, kube.clock.now, self._queue.add)
        replica_identity = f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
        self._secrets = AttemptSecrets(config.isolation)
        self._reconciler = Reconciler(
            kube=kube, cache=self._cache, queue=self._queue, recorder=EventRecorder(kube, replica_identity), scraper=self._scraper,
            metrics=metrics, config=config, secrets=self._secrets,
        )  # fmt: skip
        self._elector = LeaderElector(kube, config.leader_election, _find_own_namespace(), replica_identity)
        self._resyncer = Resyncer(kube, self._cache, self._queue, config.namespaces)
        collection_paths = [kind.path(name) for kind in (FINETUNEJOB, JOB, POD) for name in config.namespaces or (None,)]
        self._monitor = WatchMonitor(collection_paths, metrics.record_request)
        self._health = HealthChecks(config, self._monitor, self._queue, self._resyncer.cache_filled)
        self._server = HttpServer(config.http, metrics, health=self._health, refresh_metrics=self._refresh_metrics)
        self._work_started = asyncio.Event()
        self._stop_requested = asyncio.Event()

    async def run(self) -> int:
        """Run until the process is asked to stop or a task fails. Returns the exit code: 0 if the process was asked to stop, otherwise 1."""
        # kopf installs its own signal handlers later. Until then, these handlers stop the process.
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(signal_number, self._stop_requested.set)
        try:
            await self._server.start()
        except OSError as error:
            http_settings = self._config.http
            logger.error("start: cannot listen on http.host %s, http.port %d: %s", http_settings.host, http_settings.port, error.strerror)
            await self._server.stop()
            return 1
        exit_code = await self._fill_cache()
        if exit_code is not None:
            await self._server.stop()
            return exit_code
        return await self._run_tasks()

    async def _fill_cache(self) -> int | None:
        """Read the operator's key and fill the cache before all other tasks start. Returns None, or an exit code if this fails or a stop is requested."""
        load_task = asyncio.create_task(self._load_key_and_objects())
        stop_task = asyncio.create_task(self._stop_requested.wait())
        await asyncio.wait([load_task, stop_task], return_when=asyncio.FIRST_COMPLETED)
        stop_task.cancel()
        if not load_task.done():
            load_task.cancel()
            return 0
        error = load_task.exception()
        if error is not None:
            _log_failure("start", error)
        return None if error is None else 1

    async def _load_key_and_objects(self) -> None:
        await self._secrets.load_key(self._kube, self._key_namespace, may_create=not self._config.leader_election.enabled)
        await self._resyncer.run_once()

    async def _prepare_to_lead(self) -> None:
        await self._secrets.load_key(self._kube, self._key_namespace)
        await self._resyncer.run_once()

    @property
    def _key_namespace(self) -> str:
        return self._config.isolation.operator_namespace or _find_own_namespace()

    async def _restore_key_periodically(self) -> None:
        """While this replica is the leader, check once per resync interval whether the Secret that contains the operator's key still exists, and restore it."""
        await self._work_started.wait()
        while True:
            await asyncio.sleep(self._config.resync_seconds)
            try:
                await self._secrets.restore_key(self._kube, self._key_namespace)
            except KubeError as error:
                logger.warning("cannot check the Secret with the operator's key: %s", error)

    async def _run_tasks(self) -> int:
        elector = self._elector if self._config.leader_election.enabled else None
        if elector is not None:
            self._kube.ensure_may_write = elector.ensure_leading
        coroutines = LeaderTasks(elector, on_elected=self._prepare_to_lead, start_work=self._start_working).create_coroutines()
        coroutines |= {
            "resync": self._resyncer.run_periodically(self._config.resync_seconds),
            "scraper": self._scraper.run(),
            "attempt-key": self._restore_key_periodically(),
            "event-loop-lag": self._measure_lag(),
        }
        coroutines |= {f"worker-{number}": self._work() for number in range(self._config.workers)}
        tasks = [asyncio.create_task(coroutine, name=name) for name, coroutine in coroutines.items()]
        # When kopf ends, it cancels all tasks that were created after kopf started. So the operator's tasks must start before kopf.
        await asyncio.sleep(0)
        watch_task = asyncio.create_task(self._watch(), name="watches")
        done_tasks, _ = await asyncio.wait([watch_task, *tasks], return_when=asyncio.FIRST_COMPLETED)
        errors = {task.get_name(): task.exception() for task in done_tasks if not task.cancelled()}
        for name, error in errors.items():
            if error is not None:
                _log_failure(name, error)
        # If the Lease is lost, another replica may already write, so running reconciles must not continue.
        if not any(isinstance(error, LeaseLost) for error in errors.values()):
            await self._wait_for_running_reconciles()
        await self._stop_tasks([watch_task, *tasks])
        return 0 if watch_task in done_tasks and watch_task.exception() is None else 1

    async def _wait_for_running_reconciles(self) -> None:
        """Let running reconciles finish, but start no further reconcile."""
        self._health.on_stopping()
        self._work_started.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._queue.is_idle:
                    self._queue.clear()
                    await asyncio.sleep(0.05)

    async def _stop_tasks(self, tasks: list[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._elector.release()
        await self._server.stop()

    async def _watch(self) -> None:
        registry = create_registry(self._kube, self._cache, self._queue, self._monitor)
        await kopf_adapter.run(registry, self._config, self._kube, self._monitor, self._stop_requested.is_set)

    def _start_working(self) -> None:
        """Start the workers. Called when this replica is the leader and its cache is up to date."""
        self._metrics.leader.set(1)
        self._health.on_workers_started()
        self._work_started.set()
        logger.info("reconciling %d jobs with %d workers", len(self._cache.list_keys()), self._config.workers)

    async def _work(self) -> None:
        await self._work_started.wait()
        await self._reconciler.work()

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            started_at = loop.time()
            await asyncio.sleep(LOOP_LAG_PERIOD_SECONDS)
            self._metrics.loop_lag.set(max(0.0, loop.time() - started_at - LOOP_LAG_PERIOD_SECONDS))

    def _refresh_metrics(self) -> None:
        phase_counts = Counter(str(job.status.phase or "Pending") for job in self._cache.list_finetunejobs())
        self._metrics.set_phase_counts(phase_counts)
        self._metrics.queue_depth.set(len(self._queue))


def _find_own_namespace() -> str:
    if name := os.environ.get("POD_NAMESPACE"):
        return name
    return NAMESPACE_FILE.read_text().strip() if NAMESPACE_FILE.exists() else "default"


def _log_failure(task_name: str, error: BaseException) -> None:
    """Log why the process ends: an expected error in one line, any other error with a traceback."""
    if isinstance(error, StartError | LeaseLost | KubeError):
        logger.error("%s: %s", task_name, error)
    else:
        logger.error("%s failed", task_name, exc_info=error)
