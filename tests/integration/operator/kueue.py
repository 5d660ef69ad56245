"""A stand-in for Kueue: does to a Job what Kueue's job reconciler does, and decides by priority as its scheduler does; nothing else.

Kueue itself cannot be installed where these tests run. Each step names the function of Kueue's source (v0.14 to v0.19) that it follows:
a batch/v1 Job with a queue label is created suspended; admission starts it, eviction suspends it again.
"""

from __future__ import annotations

from finetune_api.names import Label
from finetune_operator.objects import JOB, Kind, Object

from tests.integration.operator.rig import Rig

PRIORITY_CLASS = Kind("scheduling.k8s.io/v1", "PriorityClass", "priorityclasses")
WORKLOAD_CLASS = "kueue.x-k8s.io/priority-class"
"""Label of a Job that names a WorkloadPriorityClass (`constants.WorkloadPriorityClassLabel`)."""


class Queue:
    """One LocalQueue, admitting and evicting by hand, or by priority with `schedule`."""

    def __init__(self, world: Rig):
        self._world = world

    async def waiting(self, name: str) -> Object:
        """Wait for a Job that asks for quota: labelled and suspended (`jobframework.QueueName`, `Job.IsSuspended`)."""
        job = await self._world.job(name)
        assert job["metadata"]["labels"][Label.QUEUE]
        assert job["spec"]["suspend"] is True
        return job

    async def admit(self, name: str, selector: dict[str, str]) -> None:
        """Start a Job: node selectors of the flavour and `suspend: false`, in one update (`Job.RunWithPodSetsInfo`)."""
        spec = {"suspend": False, "template": {"spec": {"nodeSelector": selector}}}
        await self._world.kube.patch(JOB, self._world.namespace, name, {"spec": spec})

    async def evict(self, name: str) -> None:
        """Stop a Job: suspend it, forget its start, give back its own node selectors (`Job.Stop`, `Job.RestorePodSetsInfo`).

        Between these, the Job controller has to have suspended it: Kueue comes back until the update is accepted, this waits.
        """
        kube, namespace = self._world.kube, self._world.namespace
        await kube.patch(JOB, namespace, name, {"spec": {"suspend": True}})
        await self._world.until("suspended", lambda: self._suspended(name))
        await kube.patch(JOB, namespace, name, {"status": {"startTime": None}}, subresource="status")
        await self._world.until("no start", lambda: "startTime" not in self._world.jobs.items[name]["status"])
        await kube.patch(JOB, namespace, name, {"spec": {"template": {"spec": {"nodeSelector": None}}}})

    async def schedule(self) -> str | None:
        """One cycle with a quota of one Job; the Job that was admitted, if any.

        The highest priority comes first, then the oldest (`baseCompareFunc` of the cluster queue). If another holds the quota it is
        evicted, provided that its priority is lower (`withinClusterQueue: LowerPriority`), and the quota is free when none of its
        pods is left (`Job.IsActive`).
        """
        jobs = [
            one
            for one in self._world.jobs.items.values()
            if Label.QUEUE in one["metadata"]["labels"] and not _over(one)
        ]
        ranks = {one["metadata"]["name"]: await self._priority(one) for one in jobs}
        held = [one["metadata"]["name"] for one in jobs if not one["spec"]["suspend"]]
        waiting = sorted(
            (one for one in jobs if one["spec"]["suspend"] and one["metadata"]["name"] not in held),
            key=lambda one: (-ranks[one["metadata"]["name"]], one["metadata"]["creationTimestamp"]),
        )
        if not waiting:
            return None
        first = waiting[0]["metadata"]["name"]
        if held and ranks[held[0]] >= ranks[first]:
            return None
        for name in held:
            await self.evict(name)
        await self.admit(first, {})
        return str(first)

    async def _priority(self, job: Object) -> int:
        """A Job's: of its own label's class, else of its pods' (`jobframework.ExtractPriority`), else 0 (`DefaultPriority`)."""
        assert WORKLOAD_CLASS not in job["metadata"]["labels"], (
            "there is no such class here: Kueue would refuse the Job"
        )
        name = job["spec"]["template"]["spec"].get("priorityClassName")
        return int((await self._world.kube.get(PRIORITY_CLASS, "", name))["value"]) if name else 0

    def _suspended(self, name: str) -> bool:
        status = self._world.jobs.items[name].get("status", {})
        conditions = status.get("conditions", [])
        return not status.get("active") and any(c["type"] == "Suspended" and c["status"] == "True" for c in conditions)


def _over(job: Object) -> bool:
    """Whether it holds no quota any more (`Job.Finished`)."""
    conditions = job.get("status", {}).get("conditions", [])
    return any(c["type"] in ("Complete", "Failed") and c["status"] == "True" for c in conditions)
