"""One active replica, by a Lease, with client-go's rules: a silent leader is waited for by our own clock, never by the times
that stand in the Lease, so that clocks may differ; who cannot renew in time stops writing and ends.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any

from finetune_operator.kube import AlreadyExists, Conflict, Kube, KubeError, NotFound
from finetune_operator.objects import LEASE, Object
from finetune_operator.settings import LeaderElection

logger = logging.getLogger(__name__)


class LeaseLost(Exception):
    """Another replica may lead by now; nothing may be written any more."""


class Elector:
    """Takes and keeps the Lease. Times are in seconds of the event loop's clock."""

    def __init__(self, kube: Kube, settings: LeaderElection, namespace: str, identity: str):
        self._kube = kube
        self._settings = settings
        self._namespace = settings.lease_namespace or namespace
        self._identity = identity
        self._observed: tuple[str, str] = ("", "")
        self._observed_at = float("-inf")
        self._renewed = float("-inf")
        self.leading = False

    def check(self) -> None:
        """Raise LeaseLost unless the Lease was renewed recently enough: to be called before every write."""
        if (
            not self.leading
            or asyncio.get_running_loop().time() - self._renewed > self._settings.renew_deadline_seconds
        ):
            raise LeaseLost("the Lease was not renewed in time")

    async def acquire(self) -> None:
        """Wait until this replica leads."""
        logger.info("waiting for Lease %s/%s", self._namespace, self._settings.lease_name)
        while not await self._try():  # noqa: ASYNC110 -- what is waited for happens on the API server
            await asyncio.sleep(self._settings.retry_period_seconds)
        self.leading = True
        logger.info("this replica leads")

    async def keep(self) -> None:
        """Renew until that fails. Errors: LeaseLost."""
        while True:
            await asyncio.sleep(self._settings.retry_period_seconds)
            await self._try()
            self.check()

    async def release(self) -> None:
        """Let another replica lead at once."""
        if not self.leading:
            return
        self.leading = False
        try:
            found = await self._kube.get(LEASE, self._namespace, self._settings.lease_name)
            if (found.get("spec") or {}).get("holderIdentity") == self._identity:
                found["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                await self._kube.replace(LEASE, self._namespace, found)
        except KubeError as error:
            logger.info("the Lease was not released: %s", error)

    async def _try(self) -> bool:
        """Take or renew once; True if the Lease is ours."""
        started = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._settings.renew_deadline_seconds):
                held = await self._take_or_renew()
        except (KubeError, TimeoutError) as error:
            logger.info("the Lease cannot be written: %s", error or "no answer in time")
            return False
        if held:
            self._renewed = started
        return held

    async def _take_or_renew(self) -> bool:
        name = self._settings.lease_name
        try:
            found = await self._kube.get(LEASE, self._namespace, name)
        except NotFound:
            return await self._create(name)
        spec = found.get("spec") or {}
        holder = str(spec.get("holderIdentity") or "")
        self._observe(holder, str(spec.get("renewTime") or ""))
        if holder not in ("", self._identity) and not self._expired():
            if self.leading:
                raise LeaseLost(f"{holder} leads now")
            return False
        changes: dict[str, Any] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._settings.lease_duration_seconds)),
            "renewTime": _now(),
        }
        if holder != self._identity:
            changes |= {"acquireTime": _now(), "leaseTransitions": int(spec.get("leaseTransitions") or 0) + 1}
        found["spec"] = spec | changes
        try:
            await self._kube.replace(LEASE, self._namespace, found)
        except Conflict:
            return False
        return True

    async def _create(self, name: str) -> bool:
        body: Object = {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.kind,
            "metadata": {"name": name, "namespace": self._namespace},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._settings.lease_duration_seconds)),
                "acquireTime": _now(),
                "renewTime": _now(),
                "leaseTransitions": 0,
            },
        }
        try:
            await self._kube.create(LEASE, self._namespace, body)
        except AlreadyExists:
            return False
        return True

    def _observe(self, holder: str, renewed: str) -> None:
        if (holder, renewed) != self._observed:
            self._observed = (holder, renewed)
            self._observed_at = asyncio.get_running_loop().time()

    def _expired(self) -> bool:
        """The holder has been silent for the whole duration, by our clock."""
        return asyncio.get_running_loop().time() - self._observed_at > self._settings.lease_duration_seconds


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
