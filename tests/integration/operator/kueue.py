"""A substitute for Kueue. It changes Jobs like Kueue's job reconciler, and chooses Jobs by priority like Kueue's scheduler.

Tests with the substitute take only seconds. The substitute sends the same updates as Kueue v0.19.2. These updates were recorded in the tests of
`test_kueue.py`, which run the real controller. Each method names the function of Kueue that it imitates. A batch/v1 Job with a queue label is created
suspended. Admission starts the Job, and eviction suspends it again.
"""

from __future__ import annotations

from finetune_api.names import Label
from finetune_operator.objects import JOB, Kind, Object

from tests.integration.operator.rig import Rig

PRIORITY_CLASS = Kind("scheduling.k8s.io/v1", "PriorityClass", "priorityclasses")
WORKLOAD_CLASS = "kueue.x-k8s.io/priority-class"
"""Label of a Job with the name of its WorkloadPriorityClass (`constants.WorkloadPriorityClassLabel`)."""
STOPPING = "kueue.x-k8s.io/stopping"
POD_METADATA = {
    "labels": {"kueue.x-k8s.io/cluster-queue-name": "gpus", "kueue.x-k8s.io/local-queue-name": "team-a", "kueue.x-k8s.io/podset": "main"},
    "annotations": {"kueue.x-k8s.io/workload": "job-run-1-5c1d2"},
}
"""Metadata that Kueue adds to the pods of an admitted Job."""


class Queue:
    """One LocalQueue. The caller of `admit` and `evict` names the Job; `schedule` chooses the Job by priority."""

    def __init__(self, world: Rig):
        self._world = world

    async def wait_for_waiting_job(self, name: str) -> Object:
        """Wait until a Job requests quota, that is, has a queue label and is suspended (`jobframework.QueueName`, `Job.IsSuspended`)."""
        job = await self._world.wait_for_job(name)
        assert job["metadata"]["labels"][Label.QUEUE]
        assert job["spec"]["suspend"] is True
        return job

    async def admit(self, name: str, selector: dict[str, str]) -> None:
        """Start a Job. One update sets the flavour's node selectors, Kueue's pod metadata and `suspend: false` (`Job.RunWithPodSetsInfo`)."""
        await self._patch_pods(name, POD_METADATA, selector, suspend=False)

    async def evict(self, name: str) -> None:
        """Stop a Job: suspend it, clear its start time, and restore its original pod template (`Job.Stop`, `Job.RestorePodSetsInfo`).

        The start time is cleared at once. The annotation STOPPING stays until the Job controller has ended the pods and reported the Job as suspended.
        """
        kube, namespace = self._world.kube, self._world.namespace
        await kube.patch(JOB, namespace, name, {"metadata": {"annotations": {STOPPING: "true"}}, "spec": {"suspend": True}})
        await kube.patch(JOB, namespace, name, {"status": {"startTime": None}}, subresource="status")
        await self._world.wait_until("suspended", lambda: self._is_suspended(name))
        await kube.patch(JOB, namespace, name, {"metadata": {"annotations": {STOPPING: None}}})
        await self._patch_pods(name, {group: dict.fromkeys(values) for group, values in POD_METADATA.items()}, None)

    async def _patch_pods(self, name: str, metadata: Object, selector: dict[str, str] | None, **spec: bool) -> None:
        template = {"metadata": metadata, "spec": {"nodeSelector": selector}}
        await self._world.kube.patch(JOB, self._world.namespace, name, {"spec": {**spec, "template": template}})

    async def schedule(self) -> str | None:
        """Run one scheduling cycle with a quota of one Job. Returns the name of the admitted Job, or None.

        The waiting Job with the highest priority is admitted; if several Jobs have this priority, the oldest of them (`baseCompareFunc` of the cluster
        queue). If a Job of lower priority holds the quota, this Job is evicted first (`withinClusterQueue: LowerPriority`). An evicted Job releases the quota
        when all its pods are gone (`Job.IsActive`).
        """
        jobs = [
            job
            for job in self._world.jobs.items.values()
            if Label.QUEUE in job["metadata"]["labels"] and not _is_finished(job)
        ]
        priorities = {job["metadata"]["name"]: await self._read_priority(job) for job in jobs}
        admitted_names = [job["metadata"]["name"] for job in jobs if not job["spec"]["suspend"]]
        waiting_jobs = sorted(
            (job for job in jobs if job["spec"]["suspend"] and job["metadata"]["name"] not in admitted_names),
            key=lambda job: (-priorities[job["metadata"]["name"]], job["metadata"]["creationTimestamp"]),
        )
        if not waiting_jobs:
            return None
        first_name = waiting_jobs[0]["metadata"]["name"]
        if admitted_names and priorities[admitted_names[0]] >= priorities[first_name]:
            return None
        for name in admitted_names:
            await self.evict(name)
        await self.admit(first_name, {})
        return str(first_name)

    async def _read_priority(self, job: Object) -> int:
        """Return a Job's priority: the value of its pods' PriorityClass (`jobframework.ExtractPriority`), or 0 without one (`DefaultPriority`)."""
        assert WORKLOAD_CLASS not in job["metadata"]["labels"], (
            "the WorkloadPriorityClass does not exist: Kueue would refuse the Job"
        )
        name = job["spec"]["template"]["spec"].get("priorityClassName")
        return int((await self._world.kube.get(PRIORITY_CLASS, "", name))["value"]) if name else 0

    def _is_suspended(self, name: str) -> bool:
        status = self._world.jobs.items[name].get("status", {})
        conditions = status.get("conditions", [])
        return not status.get("active") and any(c["type"] == "Suspended" and c["status"] == "True" for c in conditions)


def _is_finished(job: Object) -> bool:
    """Whether the Job is finished, so that it no longer holds quota (`Job.Finished`)."""
    conditions = job.get("status", {}).get("conditions", [])
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)
