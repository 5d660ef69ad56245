"""Leader election with a Lease, by the rules of client-go: at most one replica is active.

A replica measures with its own clock how long ago it observed the leader's last renewal. A replica never compares its clock with the times in the Lease, so
the clocks of the replicas may differ. If the leader cannot renew the Lease in time, it stops writing, and its process ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

from finetune_operator.kube import AlreadyExists, Conflict, KubeClient, KubeError, NotFound
from finetune_operator.objects import LEASE, Object
from finetune_operator.settings import LeaderElection

logger = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Raised when another replica may have become the leader, so that this replica must not write to the API server any more."""


class LeaderElector:
    """Acquires and renews the Lease for the replica `identity`. All times are event loop times in seconds."""

    def __init__(self, kube: KubeClient, settings: LeaderElection, namespace: str, identity: str):
        self._kube = kube
        self._settings = settings
        self._namespace = settings.lease_namespace or namespace
        self._identity = identity
        self._observed_record: tuple[str, str] = ("", "")
        self._observed_at = float("-inf")
        self._renewed_at = float("-inf")
        self.is_leader = False

    def ensure_leading(self) -> None:
        """Raise LeaseLost unless the Lease was renewed recently. Call this before each write."""
        age_seconds = asyncio.get_running_loop().time() - self._renewed_at
        if not self.is_leader or age_seconds > self._settings.renew_deadline_seconds:
            raise LeaseLost("the Lease was not renewed in time")

    async def acquire(self) -> None:
        """Wait until this replica is the leader."""
        logger.info("waiting for Lease %s/%s", self._namespace, self._settings.lease_name)
        while not await self._try_acquire_or_renew():  # noqa: ASYNC110 -- another replica changes the Lease
            await asyncio.sleep(self._settings.retry_period_seconds)
        self.is_leader = True
        logger.info("this replica is the leader")

    async def renew_until_lost(self) -> None:
        """Renew the Lease periodically. Errors: LeaseLost if no renewal succeeded for too long."""
        while True:
            await asyncio.sleep(self._settings.retry_period_seconds)
            await self._try_acquire_or_renew()
            self.ensure_leading()

    async def release(self) -> None:
        """Give up the Lease, so that another replica can become the leader at once."""
        if not self.is_leader:
            return
        self.is_leader = False
        try:
            lease = await self._kube.get(LEASE, self._namespace, self._settings.lease_name)
            if (lease.get("spec") or {}).get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _format_now()}
                await self._kube.replace(LEASE, self._namespace, lease)
        except KubeError as error:
            logger.info("the Lease was not released: %s", error)

    async def _try_acquire_or_renew(self) -> bool:
        """Try once to acquire or renew the Lease. Returns whether this replica holds the Lease."""
        # Other replicas may see the renewed Lease long before the response arrives here. So the start of the request counts as the time of renewal.
        started_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._settings.renew_deadline_seconds):
                is_held = await self._acquire_or_renew()
        except (KubeError, TimeoutError) as error:
            logger.info("the Lease cannot be written: %s", str(error) or "no answer in time")
            return False
        if is_held:
            self._renewed_at = started_at
        return is_held

    async def _acquire_or_renew(self) -> bool:
        lease_name = self._settings.lease_name
        try:
            lease = await self._kube.get(LEASE, self._namespace, lease_name)
        except NotFound:
            return await self._create_lease(lease_name)
        spec = lease.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        self._record_renewal(holder, str(spec.get("renewTime") or ""))
        if holder not in ("", self._identity) and not self._is_expired():
            if self.is_leader:
                raise LeaseLost(f"{holder} is the leader now")
            return False
        changes: dict[str, Any] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._settings.lease_duration_seconds)),
            "renewTime": _format_now(),
        }
        if holder != self._identity:
            changes |= {"acquireTime": _format_now(), "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        lease["spec"] = spec | changes
        try:
            await self._kube.replace(LEASE, self._namespace, lease)
        except Conflict:
            return False
        return True

    async def _create_lease(self, name: str) -> bool:
        body: Object = {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.kind,
            "metadata": {"name": name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._settings.lease_duration_seconds)),
                "acquireTime": _format_now(),
                "renewTime": _format_now(),
                "leaseTransitions": 0,
            },
        }
        try:
            await self._kube.create(LEASE, self._namespace, body)
        except AlreadyExists:
            return False
        return True

    def _record_renewal(self, holder: str, renew_time: str) -> None:
        if (holder, renew_time) != self._observed_record:
            self._observed_record = (holder, renew_time)
            self._observed_at = asyncio.get_running_loop().time()

    def _is_expired(self) -> bool:
        """Whether the Lease has been unchanged for longer than its duration, by the local clock."""
        return asyncio.get_running_loop().time() - self._observed_at > self._settings.lease_duration_seconds


class LeaderTasks:
    """Acquires the Lease, calls `on_elected` and then `start_work`, and renews the Lease until the process ends.

    If `elector` is None, the replica is always the leader. `on_elected` is then not called, because the process has just filled its cache.
    """

    def __init__(
        self, elector: LeaderElector | None, on_elected: Callable[[], Awaitable[None]], start_work: Callable[[], None]
    ):
        self._elector, self._on_elected, self._start_work = elector, on_elected, start_work
        self._lease_acquired = asyncio.Event()

    def create_coroutines(self) -> dict[str, Coroutine[Any, Any, None]]:
        """Return two coroutines by name: one holds the Lease, the other works as the leader. Both coroutines run until the process ends.

        There are two coroutines, because `on_elected` takes longer than the renew deadline if the cluster has thousands of objects. Errors: LeaseLost,
        errors of `on_elected`.
        """
        return {"lease": self._hold_lease(), "leader": self._work_as_leader()}

    async def _hold_lease(self) -> None:
        if self._elector is not None:
            await self._elector.acquire()
            self._lease_acquired.set()
            await self._elector.renew_until_lost()
        await asyncio.Event().wait()

    async def _work_as_leader(self) -> None:
        if self._elector is not None:
            await self._lease_acquired.wait()
            await self._on_elected()
        self._start_work()
        await asyncio.Event().wait()


def _format_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
