"""A stand-in for Kueue: does to a Job what Kueue's job reconciler does, and nothing else.

Kueue itself cannot be installed where these tests run. Each step names the function of Kueue's source (v0.14 to v0.19) that it follows:
a batch/v1 Job with a queue label is created suspended; admission starts it, eviction suspends it again.
"""

from __future__ import annotations

from finetune_api.names import Label
from finetune_operator.objects import JOB, Object

from tests.integration.operator.rig import Rig


class Queue:
    """One LocalQueue, admitting and evicting by hand."""

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
        await kube.patch(JOB, namespace, name, {"status": {"startTime": None}}, sub="status")
        await self._world.until("no start", lambda: "startTime" not in self._world.jobs.items[name]["status"])
        await kube.patch(JOB, namespace, name, {"spec": {"template": {"spec": {"nodeSelector": None}}}})

    def _suspended(self, name: str) -> bool:
        status = self._world.jobs.items[name].get("status", {})
        conditions = status.get("conditions", [])
        return not status.get("active") and any(c["type"] == "Suspended" and c["status"] == "True" for c in conditions)
