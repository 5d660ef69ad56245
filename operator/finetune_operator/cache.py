"""Cache of FineTuneJobs, their Jobs and their pods, filled by watch events and lists. The cached state can be older than the cluster's state.

An older version of an object never replaces a newer version, so it does no harm if events arrive twice or out of order. An update without a relevant change
causes no reconcile. Updates without a relevant change are frequent: the watch also reports the operator's own writes, and each pod changes its Job's
counters. A deleted pod stays in the cache, marked as deleted, until the end of its attempt is recorded. The pod's exit code and termination message are
often the only evidence of how the attempt ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from finetune_operator.views import FineTuneJobView, JobView, PodView, mark_deleted
from finetune_operator.workqueue import JobKey


@dataclass
class CacheEntry:
    """A FineTuneJob, its Jobs by uid, and its pods by uid."""

    finetunejob: FineTuneJobView | None = None
    jobs: dict[str, JobView] = field(default_factory=dict)
    pods: dict[str, PodView] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether the entry holds no object, or only deleted pods."""
        return self.finetunejob is None and not self.jobs and all(pod.is_deleted for pod in self.pods.values())


class CacheUpdate(NamedTuple):
    """Result of a cache update. `has_changed`: whether a relevant field changed. `is_new`: whether the FineTuneJob was not cached before."""

    key: JobKey
    has_changed: bool
    is_new: bool = False


@dataclass(frozen=True)
class FullList:
    """The uids of all existing objects, from one full list of each kind. `version` is the lowest resourceVersion of these lists."""

    finetunejob_uids: frozenset[str]
    job_uids: frozenset[str]
    pod_uids: frozenset[str]
    version: int
    namespaces: frozenset[str] = frozenset()
    """Namespaces that were listed. An empty set means all namespaces."""

    def proves_deleted(self, view: FineTuneJobView | JobView | PodView, listed_uids: frozenset[str]) -> bool:
        """Whether the cached object `view` was deleted: the full list is newer, but `listed_uids` does not contain the object."""
        is_namespace_listed = not self.namespaces or view.namespace in self.namespaces
        return is_namespace_listed and view.version <= self.version and view.uid not in listed_uids


class JobCache:
    """Cache entries by FineTuneJob. Not thread-safe: all callers run in one event loop."""

    def __init__(self) -> None:
        self._entries: dict[JobKey, CacheEntry] = {}

    def get(self, key: JobKey) -> CacheEntry:
        """Return the entry of a FineTuneJob, or an empty entry if nothing is cached."""
        return self._entries.get(key) or CacheEntry()

    def list_keys(self) -> list[JobKey]:
        """Return the keys of all cached FineTuneJobs."""
        return [key for key, entry in self._entries.items() if entry.finetunejob is not None]

    def list_finetunejobs(self) -> list[FineTuneJobView]:
        """Return all cached FineTuneJobs."""
        return [entry.finetunejob for entry in self._entries.values() if entry.finetunejob is not None]

    def has_version(self, key: JobKey, uid: str, resource_version: str) -> bool:
        """Whether this version of a FineTuneJob is already cached, so that the caller need not parse its body again."""
        cached_job = self.get(key).finetunejob
        return cached_job is not None and (cached_job.uid, cached_job.resource_version) == (uid, resource_version)

    def put_finetunejob(self, view: FineTuneJobView) -> CacheUpdate:
        """Store a FineTuneJob unless the same or a newer version of it is cached."""
        key = JobKey(view.namespace, view.name)
        entry = self._get_or_create_entry(key)
        cached_job = entry.finetunejob
        if cached_job is not None and (view.version < cached_job.version or view == cached_job):
            return CacheUpdate(key, has_changed=False)
        if cached_job is not None and cached_job.uid != view.uid:
            entry.pods = {uid: pod for uid, pod in entry.pods.items() if not pod.is_deleted}
        entry.finetunejob = view
        return CacheUpdate(key, has_changed=True, is_new=cached_job is None)

    def drop_finetunejob(self, key: JobKey, uid: str) -> None:
        """Remove the FineTuneJob with this uid. A new FineTuneJob with the same name stays cached."""
        entry = self._get_or_create_entry(key)
        if entry.finetunejob is not None and entry.finetunejob.uid == uid:
            entry.finetunejob = None
        self._remove_if_empty(key)

    def put_job(self, view: JobView) -> CacheUpdate:
        """Store a Job unless a newer version of it is cached."""
        key = JobKey(view.namespace, view.finetunejob_name)
        jobs = self._get_or_create_entry(key).jobs
        cached_job = jobs.get(view.uid)
        if cached_job is not None and view.version < cached_job.version:
            return CacheUpdate(key, has_changed=False)
        jobs[view.uid] = view
        return CacheUpdate(key, has_changed=cached_job is None or replace(cached_job, version=view.version) != view)

    def drop_job(self, view: JobView) -> JobKey:
        """Remove a deleted Job. Returns the key of its FineTuneJob.

        If a Job loses the label that the watch selects, and gets it back, the watch reports a deletion and an addition. The operator may handle the
        addition before the deletion, so it keeps a cached Job that is newer than the deleted version.
        """
        key = JobKey(view.namespace, view.finetunejob_name)
        jobs = self._get_or_create_entry(key).jobs
        cached_job = jobs.get(view.uid)
        if cached_job is not None and cached_job.version <= view.version:
            del jobs[view.uid]
        self._remove_if_empty(key)
        return key

    def put_pod(self, view: PodView) -> CacheUpdate:
        """Store a pod unless a newer version of it is cached."""
        key = JobKey(view.namespace, view.finetunejob_name)
        pods = self._get_or_create_entry(key).pods
        cached_pod = pods.get(view.uid)
        if cached_pod is not None and (view.version < cached_pod.version or cached_pod.is_deleted):
            return CacheUpdate(key, has_changed=False)
        pods[view.uid] = view
        return CacheUpdate(key, has_changed=cached_pod is None or replace(cached_pod, version=view.version) != view)

    def mark_pod_deleted(self, view: PodView) -> JobKey:
        """Mark a pod as deleted and keep its newest known state. Returns the key of its FineTuneJob."""
        key = JobKey(view.namespace, view.finetunejob_name)
        entry = self._get_or_create_entry(key)
        cached_pod = entry.pods.get(view.uid)
        entry.pods[view.uid] = mark_deleted(cached_pod if cached_pod is not None and cached_pod.version > view.version else view)
        self._remove_if_empty(key)
        return key

    def drop_deleted_pods(self, key: JobKey, *, before_attempt: int) -> None:
        """Remove the deleted pods of attempts before `before_attempt`, because the status already records how these attempts ended."""
        pods = self._get_or_create_entry(key).pods
        for uid in [uid for uid, pod in pods.items() if pod.is_deleted and pod.attempt < before_attempt]:
            del pods[uid]

    def prune(self, full_list: FullList) -> set[JobKey]:
        """Remove each object that was deleted according to the full lists. Returns the keys of the FineTuneJobs that changed."""
        changed_keys: set[JobKey] = set()
        for key, entry in list(self._entries.items()):
            cached_job = entry.finetunejob
            if cached_job is not None and full_list.proves_deleted(cached_job, full_list.finetunejob_uids):
                self.drop_finetunejob(key, cached_job.uid)
                changed_keys.add(key)
            for job in [job for job in entry.jobs.values() if full_list.proves_deleted(job, full_list.job_uids)]:
                changed_keys.add(self.drop_job(job))
            for pod in [p for p in entry.pods.values() if not p.is_deleted and full_list.proves_deleted(p, full_list.pod_uids)]:
                changed_keys.add(self.mark_pod_deleted(pod))
        return changed_keys

    def _get_or_create_entry(self, key: JobKey) -> CacheEntry:
        return self._entries.setdefault(key, CacheEntry())

    def _remove_if_empty(self, key: JobKey) -> None:
        entry = self._entries.get(key)
        if entry is not None and entry.is_empty:
            del self._entries[key]
