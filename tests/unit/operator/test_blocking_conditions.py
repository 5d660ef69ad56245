"""The operator reads events about missing or stuck pods, and a rate limiter limits how often it reads them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest
from finetune_operator.kube import KubeError
from finetune_operator.objects import CORE_EVENT, Kind
from finetune_operator.throttle import READ_TIME_DIVISOR

from tests.unit.operator.fake_cluster import KEY, FakeApiServer, OperatorProcess, new_server, start_attempt
from tests.unit.operator.samples import pod


@pytest.fixture
def server() -> FakeApiServer:
    return new_server()


async def start_process_with_stuck_pod(server: FakeApiServer, scheduled_seconds_ago: int) -> OperatorProcess:
    """Return a new operator process with a Pending pod that was created an hour ago and was bound to a node `scheduled_seconds_ago` seconds ago."""
    _, job = await start_attempt(server)
    process, now = OperatorProcess(server), server.clock.now()
    process.cache.put_job(job)
    waiting_pod = pod(version=5, phase="Pending", is_ready=False, created_at=now - timedelta(hours=1))
    process.cache.put_pod(replace(waiting_pod, scheduled_at=now - timedelta(seconds=scheduled_seconds_ago)))
    return process


@pytest.mark.parametrize(("scheduled_seconds_ago", "read_count"), [(1, 0), (60, 1)])
async def test_time_without_a_node_does_not_count_for_a_stuck_pod(server: FakeApiServer, scheduled_seconds_ago: int, read_count: int) -> None:
    """Even if a pod waited an hour for a node, it has the usual time to mount its volumes after it was bound to the node."""
    process = await start_process_with_stuck_pod(server, scheduled_seconds_ago)
    await process.reconcile()
    assert server.count("list", CORE_EVENT) == read_count


async def test_reads_of_many_jobs_are_rate_limited(server: FakeApiServer) -> None:
    """Reading the events of a pod is expensive, because the API server scans all events of the namespace."""
    process = await start_process_with_stuck_pod(server, 60)
    limiter, now = process.reconciler._blocking_reader._limiter, asyncio.get_running_loop().time()
    limiter.record_read(now - 0.2, now)
    await process.reconcile()
    await process.reconcile()
    assert server.count("list", CORE_EVENT) == 0
    assert 0 < (process.queue.seconds_until_due() or 0) <= 0.2 * READ_TIME_DIVISOR + 0.1
    process.reconciler._observer.states[KEY].event_read.due_at = 0.0
    await process.reconcile()
    assert server.count("list", CORE_EVENT) == 1
    assert KEY not in limiter


async def test_failed_read_of_events_releases_its_reservation(server: FakeApiServer) -> None:
    process = await start_process_with_stuck_pod(server, 60)

    def fail(verb: str, kind: Kind) -> None:
        if kind is CORE_EVENT:
            raise KubeError(verb, kind, "", 0, "NoAnswer", "")

    server.before_request = fail
    with pytest.raises(KubeError):
        await process.reconcile()
    limiter = process.reconciler._blocking_reader._limiter
    assert limiter._next_free_at > 0
    assert KEY not in limiter
