"""Health checks for `/healthz` and `/readyz`. The process is healthy only if its watches and workers make progress."""

from __future__ import annotations

import asyncio

from finetune_operator.kopf_adapter import STALLED_WATCH_SECONDS, WatchMonitor
from finetune_operator.settings import OperatorConfig
from finetune_operator.workqueue import WorkQueue


class HealthChecks:
    """Health checks of this process. Each check returns a description of the problem, or an empty string."""

    def __init__(self, config: OperatorConfig, monitor: WatchMonitor, queue: WorkQueue, cache_filled: asyncio.Event):
        self._monitor, self._queue, self._cache_filled = monitor, queue, cache_filled
        self._stalled_watch_seconds = max(2 * config.resync_seconds + config.api.timeout_seconds, STALLED_WATCH_SECONDS)
        self._stuck_seconds = config.stuck_seconds
        self._is_working = False
        self._is_stopping = False

    def on_workers_started(self) -> None:
        """Start to report jobs that wait too long for a worker. Until this call, the replica has no workers, so every queued job waits."""
        self._queue.restart_wait_times()
        self._is_working = True

    def on_stopping(self) -> None:
        """Report from now on that the process is stopping and not ready. Jobs that wait too long are no longer reported."""
        self._is_working = False
        self._is_stopping = True

    def find_liveness_problem(self) -> str:
        """Return why the process should be restarted: a stalled watch, or a job that has waited too long for a worker."""
        stalled_watch_problem = self._monitor.describe_stalled_watch(self._stalled_watch_seconds)
        if stalled_watch_problem or not self._is_working:
            return stalled_watch_problem
        oldest_age_seconds = self._queue.oldest_key_age_seconds()
        return f"a job has waited {oldest_age_seconds:.0f} s for a worker" if oldest_age_seconds > self._stuck_seconds else ""

    def find_readiness_problem(self) -> str:
        """Return why the process is not ready: its cache is not filled yet, or the process is stopping."""
        if self._is_stopping:
            return "the operator is stopping"
        return "" if self._cache_filled.is_set() else "the cache of Kubernetes objects is not filled yet"
