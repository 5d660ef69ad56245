"""A job with a queue waits for admission. An evicted job is admitted again, and its eviction does not count as a retry."""

from __future__ import annotations

import asyncio

from finetune_operator.objects import EVENT

from tests.integration.operator.kueue import PRIORITY_CLASS, Queue
from tests.integration.operator.rig import TIMEOUT_SECONDS, Rig


async def test_a_job_is_queued_admitted_evicted_and_admitted_again(world: Rig) -> None:
    queue = Queue(world)
    await world.create(placement={"queueName": "team-a"})
    await queue.wait_for_waiting_job("run-1")
    status = await world.wait_for_phase("Queued")
    assert world.pods.items == {}
    quota_condition = world.condition("QuotaReserved")
    assert (quota_condition["status"], quota_condition["reason"]) == ("False", "Queued")
    assert "team-a" in quota_condition["message"]

    await queue.admit("run-1", {"flavour": "spot"})
    pod = await world.report_training("run-1", step=40)
    assert pod["spec"]["nodeSelector"] == {"flavour": "spot"}
    await world.wait_for_phase("Running")
    assert world.condition("QuotaReserved")["status"] == "True"

    await queue.evict("run-1")
    status = await world.wait_for_phase("Queued")
    assert world.condition("QuotaReserved")["reason"] == "Queued"
    assert (status["attempt"], status.get("retriesUsed")) == (1, None)
    await world.wait_until("no pods", lambda: not world.pods.items)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while "Preempted" not in {e["reason"] for e in (await world.kube.list(EVENT, world.namespace)).items}:  # noqa: ASYNC110 -- events are not watched
            await asyncio.sleep(0.05)

    await queue.admit("run-1", {"flavour": "on-demand"})
    repeated_pod = await world.wait_for_pod("run-1", 0, "Running")
    assert repeated_pod["metadata"]["uid"] != pod["metadata"]["uid"]
    await world.kubelet.succeed(repeated_pod)
    status = await world.wait_for_phase("Succeeded")
    assert [(a["number"], a["reason"]) for a in status["attempts"]] == [(1, "Succeeded")]
    assert status["restarts"] == 0


async def test_the_deadline_does_not_include_time_in_the_queue(world: Rig) -> None:
    await world.create(placement={"queueName": "team-a"}, policy={"activeDeadlineSeconds": 2})
    await world.wait_for_phase("Queued")
    await asyncio.sleep(2.5)  # longer than activeDeadlineSeconds, to show that the time in the queue does not count
    assert world.status()["phase"] == "Queued"
    await Queue(world).admit("run-1", {})
    status = await world.wait_for_phase("Failed")
    assert status["failure"]["code"] == "DeadlineExceeded"


async def test_a_queued_job_can_be_suspended(world: Rig) -> None:
    await world.create(placement={"queueName": "team-a"})
    await world.wait_for_phase("Queued")
    await world.patch({"suspend": True})
    await world.wait_for_phase("Suspended")
    await world.wait_for_no_jobs_and_pods()
    await world.patch({"suspend": False, "placement": {"queueName": "team-b"}})


async def test_a_job_with_higher_priority_preempts_another_which_resumes_afterwards(world: Rig) -> None:
    """`placement.priorityClassName` is enough to set the priority, because Kueue reads it from the pods' PriorityClass."""
    queue, priority_name = Queue(world), f"urgent-{world.namespace}"[:63].rstrip("-")
    body = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": priority_name}, "value": 1000}
    await world.kube.create(PRIORITY_CLASS, "", body)
    await world.create("low", placement={"queueName": "team-a"})
    await queue.wait_for_waiting_job("low-1")
    assert await queue.schedule() == "low-1"
    pod = await world.report_training("low-1", step=40)
    await world.wait_for_phase("Running", "low")

    await world.create("high", placement={"queueName": "team-a", "priorityClassName": priority_name})
    await queue.wait_for_waiting_job("high-1")
    uri = "s3://models/test/checkpoints/step-00000040/a1-0123abcd"
    checkpoint_fields = {"checkpoints": [{"step": 40, "uri": uri, "healthy": True}], "latestCheckpoint": uri}
    await world.report_training("low-1", step=40, **checkpoint_fields)
    await world.wait_until("the checkpoint", lambda: world.status("low").get("latestCheckpoint") == uri)
    assert await queue.schedule() == "high-1"
    await world.wait_for_phase("Queued", "low")
    assert world.condition("QuotaReserved", "low")["reason"] == "Queued"
    high_pod = await world.report_training("high-1")
    assert high_pod["spec"]["priority"] == 1000
    await world.wait_for_phase("Running", "high")
    assert await queue.schedule() is None, "a Job of lower priority must not preempt a Job of higher priority"

    await world.kubelet.succeed(high_pod)
    await world.wait_for_phase("Succeeded", "high")
    assert await queue.schedule() == "low-1"
    repeated_pod = await world.wait_for_pod("low-1", 0, "Running")
    assert repeated_pod["metadata"]["uid"] != pod["metadata"]["uid"]
    status = world.status("low")
    assert (status["attempt"], status["restarts"], status.get("retriesUsed")) == (1, 0, None)
    assert (status["latestCheckpoint"], status["checkpoints"][0]["step"]) == (uri, 40)
    await world.kubelet.succeed(repeated_pod)
    status = await world.wait_for_phase("Succeeded", "low")
    assert [(a["number"], a["reason"]) for a in status["attempts"]] == [(1, "Succeeded")]
