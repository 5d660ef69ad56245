"""Lists all objects: at startup to fill the cache, and later to remove deleted objects whose deletion the watches did not report.

kopf 1.45 does not report a deletion that happens between the end of a watch and the next list. Without the lists of this module, the deleted object
would stay in the cache forever. This problem was observed with a pod that was deleted before the watch of pods ended with status 410.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from finetune_operator.cache import FullList, JobCache
from finetune_operator.handlers import cache_finetunejob, cache_job, cache_pod
from finetune_operator.kube import KubeClient, KubeError, NotFound
from finetune_operator.objects import FINETUNEJOB, JOB, MANAGED_BY_SELECTOR, POD, Kind, Object
from finetune_operator.settings import StartError
from finetune_operator.workqueue import WorkQueue

logger = logging.getLogger(__name__)

OBJECTS_PER_STEP = 20
"""After this many parsed objects, the event loop runs other tasks."""


class _KindList(NamedTuple):
    """The uids of all objects of one kind, from full lists. `version` is the lowest resourceVersion of these lists."""

    uids: set[str]
    version: int


class Resyncer:
    """Lists all objects into the cache and adds all FineTuneJobs to the work queue."""

    def __init__(self, kube: KubeClient, cache: JobCache, queue: WorkQueue, namespaces: tuple[str, ...]):
        self._kube, self._cache, self._queue = kube, cache, queue
        self._namespaces = namespaces
        self._last_version = 0
        self._lock = asyncio.Lock()
        self.cache_filled = asyncio.Event()
        """This event is set after all objects were listed for the first time."""

    async def run_periodically(self, period_seconds: float) -> None:
        """List all objects periodically until cancelled. The first of these lists begins one period after the cache was filled at startup."""
        await self.cache_filled.wait()
        while True:
            await asyncio.sleep(period_seconds)
            try:
                await self.run_once()
            except KubeError as error:
                logger.warning("the resync failed and is repeated in %.0f s: %s", period_seconds, error)

    async def run_once(self) -> None:
        """List all objects once and update the cache. Errors: KubeError; StartError if the CRD is missing or the server's resourceVersion decreased."""
        # Two concurrent resyncs could finish in the wrong order. The resourceVersion would then seem to decrease, as after etcd was restored from
        # a backup.
        async with self._lock:
            await self._list_all()

    async def _list_all(self) -> None:
        finetunejobs = await self._list_kind(FINETUNEJOB, "", cache_finetunejob)
        jobs = await self._list_kind(JOB, MANAGED_BY_SELECTOR, cache_job)
        pods = await self._list_kind(POD, MANAGED_BY_SELECTOR, cache_pod)
        full_list = FullList(
            finetunejob_uids=frozenset(finetunejobs.uids),
            job_uids=frozenset(jobs.uids),
            pod_uids=frozenset(pods.uids),
            version=min(kind_list.version for kind_list in (finetunejobs, jobs, pods)),
            namespaces=frozenset(self._namespaces),
        )
        if full_list.version < self._last_version:
            # etcd was restored from a backup. The cached objects have higher versions, so the cache would reject each new event as old.
            raise StartError(
                f"the API server's resourceVersion decreased from {self._last_version} to {full_list.version}: "
                "the operator must restart with an empty cache"
            )
        self._last_version = full_list.version
        for key in [*self._cache.prune(full_list), *self._cache.list_keys()]:
            self._queue.add(key)
        self.cache_filled.set()

    async def _list_kind(self, kind: Kind, label_selector: str, cache_object: Callable[[JobCache, None, Object], Any]) -> _KindList:
        """Store all objects of a kind in the cache, in small steps, so that thousands of objects do not block the event loop."""
        uids: set[str] = set()
        versions: list[int] = []
        try:
            for namespace in self._namespaces or (None,):
                uids_of_namespace: set[str] = set()
                async for page in self._kube.list_pages(kind, namespace, label_selector=label_selector):
                    if page.is_first_page:
                        uids_of_namespace.clear()
                    for number, body in enumerate(page.items, start=1):
                        cache_object(self._cache, None, body)
                        uids_of_namespace.add(body["metadata"]["uid"])
                        if number % OBJECTS_PER_STEP == 0:
                            await asyncio.sleep(0)
                uids |= uids_of_namespace
                versions.append(page.version)
        except NotFound as error:
            raise StartError(
                f"the API server does not serve {kind.plural} of {kind.api_version}: install the CRD first"
            ) from error
        return _KindList(uids, min(versions))
