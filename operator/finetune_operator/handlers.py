"""The handlers that kopf calls: each event updates the cache, and a relevant change adds the job to the work queue.

The operator uses only `on.login` and `on.event`, so kopf sets no finalizer, writes no annotation and keeps no state on any object.
"""

from __future__ import annotations

from typing import Any

import kopf
from finetune_api.names import GROUP, PLURAL, VERSION

from finetune_operator import kopf_adapter
from finetune_operator.cache import Cache, CacheUpdate
from finetune_operator.kopf_adapter import WatchMonitor
from finetune_operator.kube import KubeClient
from finetune_operator.objects import Object
from finetune_operator.views import read_finetunejob, read_job, read_pod
from finetune_operator.workqueue import Key, WorkQueue

DELETED_EVENT_TYPE = "DELETED"


def create_registry(kube: KubeClient, cache: Cache, queue: WorkQueue, monitor: WatchMonitor) -> kopf.OperatorRegistry:
    """Return handlers that update `cache` and `queue`. `monitor` observes all requests that kopf sends."""
    registry = kopf.OperatorRegistry()

    def enqueue(update: CacheUpdate | None) -> None:
        if update is None or not update.has_changed:
            return
        if update.is_new:
            queue.add_high_priority(update.key)
        else:
            queue.add(update.key)

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return await kopf_adapter.login(kube, monitor)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def on_finetunejob(type: str | None, body: kopf.Body, **_: Any) -> None:
        enqueue(cache_finetunejob(cache, type, dict(body)))

    @kopf.on.event("batch", "v1", "jobs", registry=registry)
    async def on_job(type: str | None, body: kopf.Body, **_: Any) -> None:
        enqueue(cache_job(cache, type, dict(body)))

    @kopf.on.event("", "v1", "pods", registry=registry)
    async def on_pod(type: str | None, body: kopf.Body, **_: Any) -> None:
        enqueue(cache_pod(cache, type, dict(body)))

    return registry


def cache_finetunejob(cache: Cache, event_type: str | None, body: Object) -> CacheUpdate:
    """Apply a watch event of a FineTuneJob to the cache. `event_type` is None for an object from a list."""
    meta = body["metadata"]
    key = Key(meta["namespace"], meta["name"])
    if event_type == DELETED_EVENT_TYPE:
        cache.drop_finetunejob(key, meta["uid"])
        return CacheUpdate(key, has_changed=True)
    if cache.has_version(key, meta["uid"], str(meta.get("resourceVersion", ""))):
        return CacheUpdate(key, has_changed=False)
    return cache.put_finetunejob(read_finetunejob(body))


def cache_job(cache: Cache, event_type: str | None, body: Object) -> CacheUpdate | None:
    """Apply a watch event of a Job to the cache. Returns None if the operator did not create the Job."""
    view = read_job(body)
    if view is None:
        return None
    return CacheUpdate(cache.drop_job(view), has_changed=True) if event_type == DELETED_EVENT_TYPE else cache.put_job(view)


def cache_pod(cache: Cache, event_type: str | None, body: Object) -> CacheUpdate | None:
    """Apply a watch event of a pod to the cache. Returns None if the pod belongs to no Job of the operator."""
    view = read_pod(body)
    if view is None:
        return None
    return CacheUpdate(cache.mark_pod_deleted(view), has_changed=True) if event_type == DELETED_EVENT_TYPE else cache.put_pod(view)
