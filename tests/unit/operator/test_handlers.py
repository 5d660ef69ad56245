"""Watch events update the cache and add keys to the work queue."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import MANAGER_NAME, Label
from finetune_operator.cache import CacheUpdate, JobCache
from finetune_operator.handlers import cache_finetunejob, cache_job, cache_pod, create_handlers
from finetune_operator.objects import FINETUNEJOB, JOB, POD, Object
from finetune_operator.throttle import BURST_COUNT
from finetune_operator.workqueue import UPDATE_DELAY_SECONDS, JobKey, WorkQueue

from tests.unit.operator.samples import UID, finetunejob

RUN = JobKey("team", "run")


def test_event_of_a_cached_version_is_not_parsed_again() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob(version=4, resource_version="4"))
    meta = {"namespace": "team", "name": "run", "uid": UID, "resourceVersion": "4"}
    update = cache_finetunejob(cache, "MODIFIED", {"metadata": meta, "status": "not even a status"})
    assert update == CacheUpdate(RUN, has_changed=False)
    assert cache_finetunejob(cache, "MODIFIED", {"metadata": meta | {"resourceVersion": "5"}, "spec": {}}).has_changed
    assert cache_finetunejob(cache, "DELETED", {"metadata": meta}).has_changed
    assert cache.get(RUN).finetunejob is None


def test_objects_without_the_operators_labels_are_ignored() -> None:
    cache = JobCache()
    foreign_object = {"metadata": {"namespace": "team", "name": "run-1", "uid": "u", "labels": {}}}
    assert cache_job(cache, "ADDED", foreign_object) is None
    assert cache_pod(cache, "ADDED", foreign_object) is None


def make_object_of_run(version: int, spec: dict[str, Any] | None = None, **meta: Any) -> Object:
    labels = {Label.MANAGED_BY: MANAGER_NAME, Label.JOB_NAME: "run", Label.ATTEMPT: "1"}
    identity: Object = {"namespace": "team", "name": "run-1", "uid": "u", "creationTimestamp": "2026-03-01T11:00:00Z"}
    identity |= {"resourceVersion": str(version), "labels": labels}
    return {"metadata": identity | meta, "spec": spec or {"completions": version}, "status": {"podIP": str(version)}}


def make_queue_in_burst() -> WorkQueue:
    queue = WorkQueue(lambda: 1000.0)
    for _ in range(BURST_COUNT):
        queue.add_update(JobKey("other", "run"))
    queue.clear()
    return queue


@pytest.mark.parametrize("plural", [JOB.plural, POD.plural])
@pytest.mark.parametrize(
    ("event_type", "body", "is_delayed"),
    [
        ("MODIFIED", make_object_of_run(2), True),
        ("MODIFIED", make_object_of_run(2, deletionTimestamp="2026-03-01T12:00:00Z"), False),
        ("DELETED", make_object_of_run(2), False),
    ],
)
async def test_only_the_end_of_a_job_or_pod_is_reconciled_at_once_during_a_burst(plural: str, event_type: str, body: Object, is_delayed: bool) -> None:
    """If another client ends an attempt, the operator can see this only while the Job is being deleted. After the deletion, the reason is lost."""
    queue = make_queue_in_burst()
    create_handlers(JobCache(), queue)[plural](event_type, body)
    assert (len(queue), queue.seconds_until_due()) == ((0, UPDATE_DELAY_SECONDS) if is_delayed else (1, None))


async def test_suspended_job_is_reconciled_at_once_during_a_burst() -> None:
    queue = make_queue_in_burst()
    create_handlers(JobCache(), queue)[JOB.plural]("MODIFIED", make_object_of_run(2, {"suspend": True}))
    assert (len(queue), queue.seconds_until_due()) == (1, None)


async def test_unchanged_objects_are_not_reconciled() -> None:
    queue, cache = make_queue_in_burst(), JobCache()
    for plural in (JOB.plural, POD.plural):
        create_handlers(cache, queue)[plural]("ADDED", make_object_of_run(2))
        queue.clear()
        create_handlers(cache, queue)[plural]("MODIFIED", make_object_of_run(2))
    assert (len(queue), queue.seconds_until_due()) == (0, None)


async def test_change_of_a_finetunejob_is_reconciled_at_once_during_a_burst() -> None:
    queue, cache = make_queue_in_burst(), JobCache()
    cache.put_finetunejob(finetunejob(version=4, resource_version="4"))
    meta = {"namespace": "team", "name": "run", "uid": UID, "resourceVersion": "5"}
    create_handlers(cache, queue)[FINETUNEJOB.plural]("MODIFIED", {"metadata": meta, "spec": {"suspend": True}})
    assert (len(queue), queue.seconds_until_due()) == (1, None)
