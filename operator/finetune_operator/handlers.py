"""The handlers of watch events: each event updates the cache, and a relevant change adds the job to the work queue.

kopf calls the handlers for the objects in its lists and for deletions. `watch_stream.py` calls the handlers for changes of objects.
The operator uses only kopf's `on.login` and `on.event`, so kopf writes nothing to the objects: no finalizer and no annotation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf
from finetune_api.names import GROUP, VERSION

from finetune_operator import kopf_adapter
from finetune_operator.cache import CacheUpdate, JobCache
from finetune_operator.kopf_adapter import WatchMonitor
from finetune_operator.kube import KubeClient
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Object
from finetune_operator.views import read_finetunejob, read_job, read_pod
from finetune_operator.workqueue import JobKey, WorkQueue

DELETED_EVENT_TYPE = "DELETED"


def create_registry(kube: KubeClient, cache: JobCache, queue: WorkQueue, monitor: WatchMonitor) -> kopf.OperatorRegistry:
    """Return kopf's registry of handlers, which update `cache` and `queue`. `monitor` observes all requests of kopf."""
    registry, handlers = kopf.OperatorRegistry(), create_handlers(cache, queue)

    @kopf.on.login(registry=registry)
    async def login(**_: Any) -> kopf.AiohttpSession:
        return await kopf_adapter.login(kube, monitor, handlers)

    for group, version, kind in ((GROUP, VERSION, FINETUNEJOB), ("batch", "v1", JOB), ("", "v1", POD)):

        @kopf.on.event(group, version, kind.plural, registry=registry, id=kind.plural, param=handlers[kind.plural])
        async def on_event(type: str | None, body: kopf.Body, param: Any = None, **_: Any) -> None:
            param(type, dict(body))

    return registry


def create_handlers(cache: JobCache, queue: WorkQueue) -> dict[str, Callable[[str | None, Object], None]]:
    """Return the event handler of each kind, by plural. The arguments of a handler are the event's type (None for an object from a list) and the object."""

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
        if is_ending(event_type, body):
            queue.add(update.key)
        else:
            queue.add_update(update.key)

    return {
        FINETUNEJOB.plural: lambda event_type, body: enqueue(cache_finetunejob(cache, event_type, body)),
        JOB.plural: lambda event_type, body: enqueue_update(cache_job(cache, event_type, body), event_type, body),
        POD.plural: lambda event_type, body: enqueue_update(cache_pod(cache, event_type, body), event_type, body),
    }


def is_ending(event_type: str | None, body: Object) -> bool:
    """Whether a Job or pod was deleted, is being deleted, or is suspended.

    Deletions and suspensions are reconciled without delay, because later changes may hide why the attempt ends.
    """
    is_suspended = (body.get("spec") or {}).get("suspend") is True
    return event_type == DELETED_EVENT_TYPE or "deletionTimestamp" in body["metadata"] or is_suspended


def cache_finetunejob(cache: JobCache, event_type: str | None, body: Object) -> CacheUpdate:
    """Apply a watch event of a FineTuneJob to the cache. `event_type` is None for an object from a list."""
    metadata = body["metadata"]
    key = JobKey(metadata["namespace"], metadata["name"])
    if event_type == DELETED_EVENT_TYPE:
        cache.drop_finetunejob(key, metadata["uid"])
        return CacheUpdate(key, has_changed=True)
    if cache.has_version(key, metadata["uid"], str(metadata.get("resourceVersion", ""))):
        return CacheUpdate(key, has_changed=False)
    return cache.put_finetunejob(read_finetunejob(body))


def cache_job(cache: JobCache, event_type: str | None, body: Object) -> CacheUpdate | None:
    """Apply a watch event of a Job to the cache. Returns None if the operator did not create the Job."""
    view = read_job(body)
    if view is None:
        return None
    return CacheUpdate(cache.drop_job(view), has_changed=True) if event_type == DELETED_EVENT_TYPE else cache.put_job(view)


def cache_pod(cache: JobCache, event_type: str | None, body: Object) -> CacheUpdate | None:
    """Apply a watch event of a pod to the cache. Returns None if the pod belongs to no Job of the operator."""
    view = read_pod(body)
    if view is None:
        return None
    return CacheUpdate(cache.mark_pod_deleted(view), has_changed=True) if event_type == DELETED_EVENT_TYPE else cache.put_pod(view)
