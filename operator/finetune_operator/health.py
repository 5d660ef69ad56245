"""Checks for `/healthz` and `/readyz`. A process counts as healthy only while its watches and workers make progress."""

from __future__ import annotations

import asyncio

from finetune_operator.kopf_adapter import STALLED_WATCH_SECONDS, WatchMonitor
from finetune_operator.settings import OperatorConfig
from finetune_operator.workqueue import WorkQueue


class Health:
    """Checks of one process. Each check returns a description of the problem; empty: no problem."""

    def __init__(self, config: OperatorConfig, monitor: WatchMonitor, queue: WorkQueue, is_synced: asyncio.Event):
        self._monitor, self._queue, self._is_synced = monitor, queue, is_synced
        self._stalled_watch_seconds = max(2 * config.resync_seconds + config.api.timeout_seconds, STALLED_WATCH_SECONDS)
        self._stuck_seconds = config.stuck_seconds
        self._is_working = False
        self._is_stopping = False

    def on_workers_started(self) -> None:
        """Start to report jobs that wait too long. On a standby no worker takes jobs, so long waiting times are normal there."""
        self._queue.restart_wait_times()
        self._is_working = True

    def on_stopping(self) -> None:
        """Report the process as not ready: it is about to end, and its workers take no more jobs."""
        self._is_working = False
        self._is_stopping = True

    def liveness_problem(self) -> str:
        """Why the process should be restarted: a stalled watch, or a job that waits too long for a worker."""
        stalled = self._monitor.stalled_watch(self._stalled_watch_seconds)
        if stalled or not self._is_working:
            return stalled
        oldest = self._queue.oldest_seconds()
        return f"a job has waited for {oldest:.0f} s" if oldest > self._stuck_seconds else ""

    def readiness_problem(self) -> str:
        """Why the process is not ready: the caches are not filled, or it is about to end."""
        if self._is_stopping:
            return "the operator is stopping"
        return "" if self._is_synced.is_set() else "the caches are not filled yet"
