"""The handlers of events: each event updates the cache, and a relevant change adds the job to the work queue.

kopf calls them for the objects in its lists and for deletions. `watch_stream.py` calls the same functions for changes.

The operator uses only `on.login` and `on.event`, so kopf sets no finalizer, writes no annotation and keeps no state on any object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf
from finetune_api.names import GROUP, VERSION

from finetune_operator import kopf_adapter
from finetune_operator.cache import Cache, CacheUpdate
from finetune_operator.kopf_adapter import WatchMonitor
from finetune_operator.kube import KubeClient
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Object
from finetune_operator.views import read_finetunejob, read_job, read_pod
from finetune_operator.workqueue import Key, WorkQueue

DELETED_EVENT_TYPE = "DELETED"


def create_registry(kube: KubeClient, cache: Cache, queue: WorkQueue, monitor: WatchMonitor) -> kopf.OperatorRegistry:
    """Return handlers that update `cache` and `queue`. `monitor` observes all requests that kopf sends."""
    registry, handlers = kopf.OperatorRegistry(), create_handlers(cache, queue)

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return await kopf_adapter.login(kube, monitor, handlers)

    for group, version, kind in ((GROUP, VERSION, FINETUNEJOB), ("batch", "v1", JOB), ("", "v1", POD)):

        @kopf.on.event(group, version, kind.plural, registry=registry, id=kind.plural, param=handlers[kind.plural])
        async def on_event(type: str | None, body: kopf.Body, param: Any = None, **_: Any) -> None:
            param(type, dict(body))

    return registry


def create_handlers(cache: Cache, queue: WorkQueue) -> dict[str, Callable[[str | None, Object], None]]:
    """Return a handler of events for each plural. Its arguments: the type of the event, or None for an object from a list; the object."""

    def enqueue(update: CacheUpdate) -> None:
        if not update.has_changed:
            return
        if update.is_new:
            queue.add_high_priority(update.key)
        else:
            queue.add(update.key)

    def enqueue_update(update: CacheUpdate | None, event_type: str | None, body: Object) -> None:
        if update is None or not update.has_changed:
            return
        if shows_end(event_type, body):
            queue.add(update.key)
        else:
            queue.add_update(update.key)

    return {
        FINETUNEJOB.plural: lambda event_type, body: enqueue(cache_finetunejob(cache, event_type, body)),
        JOB.plural: lambda event_type, body: enqueue_update(cache_job(cache, event_type, body), event_type, body),
        POD.plural: lambda event_type, body: enqueue_update(cache_pod(cache, event_type, body), event_type, body),
    }


def shows_end(event_type: str | None, body: Object) -> bool:
    """Whether a Job or pod is deleted, is being deleted, or is suspended.

    Such a change is reconciled without delay, because only this state may show why the attempt ends.
    """
    is_suspended = (body.get("spec") or {}).get("suspend") is True
    return event_type == DELETED_EVENT_TYPE or "deletionTimestamp" in body["metadata"] or is_suspended


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
