"""Watch events become cache entries and queued keys."""

from __future__ import annotations

from finetune_operator.cache import Cache, CacheUpdate
from finetune_operator.handlers import cache_finetunejob, cache_job, cache_pod
from finetune_operator.workqueue import Key

from tests.unit.operator.samples import UID, finetunejob

RUN = Key("team", "run")


def test_event_of_a_cached_version_is_not_parsed_again() -> None:
    cache = Cache()
    cache.put_finetunejob(finetunejob(version=4, resource_version="4"))
    meta = {"namespace": "team", "name": "run", "uid": UID, "resourceVersion": "4"}
    unchanged = cache_finetunejob(cache, "MODIFIED", {"metadata": meta, "status": "not even a status"})
    assert unchanged == CacheUpdate(RUN, has_changed=False)
    assert cache_finetunejob(cache, "MODIFIED", {"metadata": meta | {"resourceVersion": "5"}, "spec": {}}).has_changed
    assert cache_finetunejob(cache, "DELETED", {"metadata": meta}).has_changed
    assert cache.get(RUN).finetunejob is None


def test_objects_without_the_operators_labels_are_ignored() -> None:
    cache = Cache()
    foreign = {"metadata": {"namespace": "team", "name": "run-1", "uid": "u", "labels": {}}}
    assert cache_job(cache, "ADDED", foreign) is None
    assert cache_pod(cache, "ADDED", foreign) is None
