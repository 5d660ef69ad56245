"""The cache: newer and older versions of objects, deleted pods, removal of objects that a full list lacks, and which updates count as changes."""

from __future__ import annotations

from finetune_operator.cache import CacheUpdate, FullList, JobCache
from finetune_operator.workqueue import JobKey

from tests.unit.operator.samples import UID, finetunejob, job, pod

RUN = JobKey("team", "run")


def make_full_list(*finetunejobs: str, version: int, namespaces: frozenset[str] = frozenset()) -> FullList:
    """Return a full list that contains these FineTuneJobs, but no Jobs and no pods."""
    return FullList(frozenset(finetunejobs), frozenset(), frozenset(), version, namespaces)


def test_older_version_never_replaces_a_newer_one() -> None:
    cache = JobCache()
    cache.put_pod(pod(version=5, phase="Failed"))
    cache.put_pod(pod(version=4, phase="Running"))
    assert [p.phase for p in cache.get(RUN).pods.values()] == ["Failed"]


def test_deleted_pod_stays_until_its_attempt_is_dropped() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob())
    cache.put_pod(pod(version=5, phase="Failed"))
    cache.mark_pod_deleted(pod(version=4, phase="Running"))
    (deleted_pod,) = cache.get(RUN).pods.values()
    assert (deleted_pod.is_deleted, deleted_pod.phase) == (True, "Failed")
    cache.put_pod(pod(version=9))
    assert all(p.is_deleted for p in cache.get(RUN).pods.values())
    cache.drop_deleted_pods(RUN, before_attempt=2)
    assert cache.get(RUN).pods == {}


def test_pods_of_the_current_attempt_are_not_dropped() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob())
    cache.mark_pod_deleted(pod(2))
    cache.put_pod(pod(1, uid="still-there"))
    cache.drop_deleted_pods(RUN, before_attempt=2)
    assert sorted(p.attempt for p in cache.get(RUN).pods.values()) == [1, 2]


def test_deleted_pods_are_dropped_with_the_finetunejob_and_its_jobs() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob())
    cache.put_job(job())
    cache.put_pod(pod())
    cache.mark_pod_deleted(pod())
    cache.drop_job(job())
    cache.drop_finetunejob(RUN, UID)
    assert cache.list_keys() == []
    assert cache.get(RUN).pods == {}


def test_a_job_that_was_added_again_before_its_deletion_is_handled_stays_cached() -> None:
    cache = JobCache()
    cache.put_job(job(version=12))
    cache.drop_job(job(version=11))
    assert [found.version for found in cache.get(RUN).jobs.values()] == [12]
    cache.drop_job(job(version=13))
    assert cache.get(RUN).jobs == {}


def test_deleting_a_finetunejob_keeps_a_new_one_of_the_same_name() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob(uid="new", version=9))
    cache.drop_finetunejob(RUN, UID)
    assert cache.list_keys() == [RUN]


def test_full_list_prunes_deleted_objects_and_keeps_newer_ones() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob(version=3))
    cache.put_pod(pod(version=4))
    cache.put_pod(pod(index=1, version=50))
    cache.put_job(job(version=4))
    assert cache.prune(make_full_list(UID, version=10)) == {RUN}
    entry = cache.get(RUN)
    assert entry.finetunejob is not None
    assert entry.jobs == {}
    assert sorted((p.completion_index, p.is_deleted) for p in entry.pods.values()) == [(0, True), (1, False)]


def test_full_list_prunes_a_deleted_finetunejob() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob(version=3))
    assert cache.prune(make_full_list(version=10)) == {RUN}
    assert cache.list_keys() == []


def test_other_namespaces_are_not_pruned() -> None:
    cache = JobCache()
    cache.put_finetunejob(finetunejob(version=3))
    assert cache.prune(make_full_list(version=10, namespaces=frozenset({"other"}))) == set()
    assert cache.list_keys() == [RUN]


def test_update_without_a_relevant_change_does_not_count_as_a_change() -> None:
    cache = JobCache()
    assert cache.put_finetunejob(finetunejob(version=3)) == CacheUpdate(RUN, has_changed=True, is_new=True)
    assert not cache.put_finetunejob(finetunejob(version=3)).has_changed
    assert not cache.put_finetunejob(finetunejob(version=2)).has_changed
    assert cache.put_finetunejob(finetunejob(version=4)) == CacheUpdate(RUN, has_changed=True)
    assert cache.put_job(job(version=5)) == CacheUpdate(RUN, has_changed=True)
    assert not cache.put_job(job(version=7)).has_changed
    assert cache.put_job(job(version=8, is_suspended=True)).has_changed
    assert not cache.put_job(job(version=7)).has_changed
    assert cache.put_pod(pod(version=6)) == CacheUpdate(RUN, has_changed=True)
    assert not cache.put_pod(pod(version=9)).has_changed
    assert cache.put_pod(pod(version=10, is_ready=False)).has_changed
    assert not cache.put_pod(pod(version=8)).has_changed
    assert [view.version for view in cache.get(RUN).pods.values()] == [10]
