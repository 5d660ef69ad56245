"""What was last seen of the cluster, by FineTuneJob. Filled by watch events and lists; never asked to be the last word.

An older view never replaces a newer one of the same object, so that events may arrive twice or out of order. What shows nothing
that was not known (a Job's counters move with each pod, each of our own writes comes back as an event) is told from news, so that
nobody looks at the job for it. A pod that is deleted stays as a memory (`gone`) until its attempt is forgotten: how it ended is often
the only witness of what happened.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from finetune_operator.views import JobObject, JobView, PodView, as_deleted
from finetune_operator.workqueue import Key


@dataclass
class Family:
    """One FineTuneJob and what carries its name."""

    job: JobObject | None = None
    jobs: dict[str, JobView] = field(default_factory=dict)
    """By uid."""
    pods: dict[str, PodView] = field(default_factory=dict)
    """By uid."""

    @property
    def empty(self) -> bool:
        """Nothing left to remember."""
        return self.job is None and not self.jobs and all(pod.is_deleted for pod in self.pods.values())


class Seen(NamedTuple):
    """Whose family a view belongs to, and whether it showed anything that was not known, or even a job that was not known."""

    key: Key
    news: bool
    new: bool = False


@dataclass(frozen=True)
class Listed:
    """Uids of everything that full lists showed, and the oldest version among the lists."""

    finetunejobs: frozenset[str]
    jobs: frozenset[str]
    pods: frozenset[str]
    version: int
    namespaces: frozenset[str] = frozenset()
    """What was listed; empty: all."""

    def lacks(self, view: JobObject | JobView | PodView, uids: frozenset[str]) -> bool:
        """Whether the lists prove that this object is gone: younger ones they could not have shown."""
        shown = not self.namespaces or view.namespace in self.namespaces
        return shown and view.version <= self.version and view.uid not in uids


class Cache:
    """All families by key. For one event loop."""

    def __init__(self) -> None:
        self._families: dict[Key, Family] = {}

    def family(self, key: Key) -> Family:
        """The family of a name; an empty one if nothing is known."""
        return self._families.get(key) or Family()

    def keys(self) -> list[Key]:
        """Names of all FineTuneJobs that exist."""
        return [key for key, family in self._families.items() if family.job is not None]

    def jobs(self) -> list[JobObject]:
        """All FineTuneJobs."""
        return [family.job for family in self._families.values() if family.job is not None]

    def knows(self, key: Key, uid: str, resource_version: str) -> bool:
        """Whether exactly this version of a FineTuneJob is known: each of our writes comes back, and need not be read again."""
        job = self.family(key).job
        return job is not None and (job.uid, job.resource_version) == (uid, resource_version)

    def put_finetunejob(self, view: JobObject) -> Seen:
        """Remember a FineTuneJob unless this version of it, or a newer one, is known."""
        key = Key(view.namespace, view.name)
        family = self._family(key)
        known = family.job
        if known is not None and (view.version < known.version or view == known):
            return Seen(key, news=False)
        if known is not None and known.uid != view.uid:
            family.pods = {uid: pod for uid, pod in family.pods.items() if not pod.is_deleted}
        family.job = view
        return Seen(key, news=True, new=known is None)

    def drop_finetunejob(self, key: Key, uid: str) -> None:
        """A FineTuneJob is gone; a namesake created since stays."""
        family = self._family(key)
        if family.job is not None and family.job.uid == uid:
            family.job = None
        self._sweep(key)

    def put_job(self, view: JobView) -> Seen:
        """Remember a Job unless a newer version of it is known."""
        key = Key(view.namespace, view.job_name)
        jobs = self._family(key).jobs
        known = jobs.get(view.uid)
        if known is not None and view.version < known.version:
            return Seen(key, news=False)
        jobs[view.uid] = view
        return Seen(key, news=known is None or replace(known, version=view.version) != view)

    def drop_job(self, view: JobView) -> Key:
        """A Job is gone."""
        key = Key(view.namespace, view.job_name)
        self._family(key).jobs.pop(view.uid, None)
        self._sweep(key)
        return key

    def put_pod(self, view: PodView) -> Seen:
        """Remember a pod unless a newer version of it is known."""
        key = Key(view.namespace, view.job_name)
        pods = self._family(key).pods
        known = pods.get(view.uid)
        if known is not None and (view.version < known.version or known.is_deleted):
            return Seen(key, news=False)
        pods[view.uid] = view
        return Seen(key, news=known is None or replace(known, version=view.version) != view)

    def drop_pod(self, view: PodView) -> Key:
        """A pod is gone: remember how it ended."""
        key = Key(view.namespace, view.job_name)
        family = self._family(key)
        known = family.pods.get(view.uid)
        family.pods[view.uid] = as_deleted(known if known is not None and known.version > view.version else view)
        self._sweep(key)
        return key

    def forget_pods(self, key: Key, *, before: int) -> None:
        """Drop memories of pods of attempts below `before`: their end is recorded in status."""
        pods = self._family(key).pods
        for uid in [uid for uid, pod in pods.items() if pod.is_deleted and pod.attempt < before]:
            del pods[uid]

    def prune(self, listed: Listed) -> set[Key]:
        """Take full lists for the truth: what they lack, and should have shown, is gone. Returns the names that changed."""
        changed: set[Key] = set()
        for key, family in list(self._families.items()):
            job = family.job
            if job is not None and listed.lacks(job, listed.finetunejobs):
                self.drop_finetunejob(key, job.uid)
                changed.add(key)
            for child in [c for c in family.jobs.values() if listed.lacks(c, listed.jobs)]:
                changed.add(self.drop_job(child))
            for pod in [p for p in family.pods.values() if not p.is_deleted and listed.lacks(p, listed.pods)]:
                changed.add(self.drop_pod(pod))
        return changed

    def _family(self, key: Key) -> Family:
        return self._families.setdefault(key, Family())

    def _sweep(self, key: Key) -> None:
        family = self._families.get(key)
        if family is not None and family.empty:
            del self._families[key]
