"""The operator with the real Kueue controller: admission, eviction, preemption by priority, gang quota, suspension, and retries in a full queue.

The quick tests of `test_queue.py` use a substitute for Kueue. The tests of this file check that the real controller behaves like the substitute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from finetune_api.names import ExitCode
from finetune_api.pod import TerminationMessage
from finetune_operator.objects import EVENT, Object

from localcluster import ControlPlane, Endpoint
from tests.integration.operator.conftest import CRD_FILE
from tests.integration.operator.kueue import PRIORITY_CLASS
from tests.integration.operator.rig import TIMEOUT_SECONDS, Heartbeat, Rig, install_crd
from tests.support.kueue_controller import QueueObjects, running_kueue

pytestmark = pytest.mark.slow
GPU = "nvidia.com/gpu"
UNLIMITED_QUOTAS = {"cpu": "1000", "memory": "10Ti", "ephemeral-storage": "100Ti"}
"""Quotas that no test exhausts. A ClusterQueue needs a quota for every resource that the pods request."""
QUEUE_PLACEMENT = {"queueName": "team-a"}


@pytest.fixture(scope="module")
def endpoint_with_crd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A separate control plane, because Kueue's webhooks apply to all Jobs of a control plane."""
    folder = tmp_path_factory.mktemp("kueue")
    with ControlPlane(folder / "state") as endpoint:
        install_crd(endpoint, CRD_FILE)
        heartbeat = Heartbeat(endpoint)
        with running_kueue(endpoint, folder / "kueue"):
            yield endpoint
        heartbeat.close()


@pytest.fixture
def queue(world: Rig) -> QueueObjects:
    return QueueObjects(world.endpoint, world.namespace)


async def poll_until(expected: str, condition: Callable[[], bool]) -> None:
    """Poll until `condition` is true, because the test does not watch Kueue's objects."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not await asyncio.to_thread(condition):  # noqa: ASYNC110 -- Kueue's objects are not watched
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"not within {TIMEOUT_SECONDS:.0f} s: {expected}") from None


def is_inadmissible(queue: QueueObjects, job: str) -> bool:
    """Whether Kueue has tried to admit a Job's Workload and found no quota."""
    conditions = queue.workloads_by_job().get(job, {}).get("status", {}).get("conditions", [])
    return any(condition["type"] == "QuotaReserved" and condition["status"] == "False" for condition in conditions)


def make_gpu_resources(nodes: int, per_node: int) -> Object:
    return {"nodes": nodes, "gpusPerNode": per_node}


async def create_priority_class(world: Rig, value: int) -> str:
    name = f"urgent-{world.namespace}"[:63].rstrip("-")
    await world.kube.create(PRIORITY_CLASS, "", {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": value})
    return name


async def wait_for_event(world: Rig, reason: str) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while reason not in {event["reason"] for event in (await world.kube.list(EVENT, world.namespace)).items}:  # noqa: ASYNC110 -- events are not watched
            await asyncio.sleep(0.05)


async def test_a_job_is_queued_admitted_evicted_and_admitted_again(world: Rig, queue: QueueObjects) -> None:
    quotas = {**UNLIMITED_QUOTAS, GPU: "2"}
    queue.create({**quotas, GPU: "0"}, node_labels={"flavour": "spot"})
    await world.create(placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 2))
    await poll_until("no quota", lambda: is_inadmissible(queue, "run-1"))
    await world.wait_for_phase("Queued")
    assert world.pods.items == {}
    quota_condition = world.condition("QuotaReserved")
    assert (quota_condition["status"], quota_condition["reason"]) == ("False", "Queued")

    queue.set_quotas(quotas)
    pod = await world.report_training("run-1", step=40)
    assert pod["spec"]["nodeSelector"]["flavour"] == "spot"
    await world.wait_for_phase("Running")
    assert world.condition("QuotaReserved")["status"] == "True"
    await poll_until("the quota is used", lambda: queue.read_usage(GPU) == "2")

    queue.set_quotas(quotas, stop_policy="HoldAndDrain")
    status = await world.wait_for_phase("Queued")
    assert (status["attempt"], status.get("retriesUsed")) == (1, None)
    await world.wait_until("no pods", lambda: not world.pods.items)
    await wait_for_event(world, "Preempted")
    await poll_until("the quota is free", lambda: queue.read_usage(GPU) == "0")

    queue.set_quotas(quotas)
    repeated_pod = await world.wait_for_pod("run-1", 0, "Running")
    assert repeated_pod["metadata"]["uid"] != pod["metadata"]["uid"]
    await world.kubelet.succeed(repeated_pod)
    status = await world.wait_for_phase("Succeeded")
    assert [(a["number"], a["reason"]) for a in status["attempts"]] == [(1, "Succeeded")]
    assert (status["restarts"], status["retriesUsed"]) == (0, 0)
    await poll_until("the quota is free", lambda: queue.read_usage(GPU) == "0")


@pytest.mark.parametrize("kind", ["PriorityClass", "WorkloadPriorityClass"])
async def test_a_job_with_higher_priority_preempts_another_which_resumes_afterwards(world: Rig, queue: QueueObjects, kind: str) -> None:
    queue.create({**UNLIMITED_QUOTAS, GPU: "1"})
    priority_name = await create_priority_class(world, 1000)
    if kind == "PriorityClass":
        placement: Object = {**QUEUE_PLACEMENT, "priorityClassName": priority_name}
    else:
        queue.create_workload_priority(priority_name, 1000)
        placement = {**QUEUE_PLACEMENT, "labels": {"kueue.x-k8s.io/priority-class": priority_name}}
    await world.create("low", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 1))
    uri = "s3://models/test/checkpoints/step-00000040/a1-0123abcd"
    pod = await world.report_training("low-1", step=40, checkpoints=[{"step": 40, "uri": uri, "healthy": True}], latestCheckpoint=uri)
    await world.wait_until("the checkpoint", lambda: world.status("low").get("latestCheckpoint") == uri)

    await world.create("high", placement=placement, resources=make_gpu_resources(1, 1))
    await world.wait_for_phase("Queued", "low")
    high_pod = await world.report_training("high-1")
    await world.wait_for_phase("Running", "high")
    await poll_until("one GPU is used", lambda: queue.read_usage(GPU) == "1")
    await world.kubelet.succeed(high_pod)
    await world.wait_for_phase("Succeeded", "high")

    repeated_pod = await world.wait_for_pod("low-1", 0, "Running")
    assert repeated_pod["metadata"]["uid"] != pod["metadata"]["uid"]
    status = world.status("low")
    assert (status["attempt"], status["restarts"], status.get("retriesUsed")) == (1, 0, None)
    assert (status["latestCheckpoint"], status["checkpoints"][0]["step"]) == (uri, 40)
    await world.kubelet.succeed(repeated_pod)
    status = await world.wait_for_phase("Succeeded", "low")
    assert [(a["number"], a["reason"]) for a in status["attempts"]] == [(1, "Succeeded")]


async def test_a_job_on_several_nodes_is_admitted_as_a_whole(world: Rig, queue: QueueObjects) -> None:
    """If the quota is enough for only one of a job's two pods, Kueue admits neither pod. A smaller job that comes later in the queue is admitted."""
    queue.create({**UNLIMITED_QUOTAS, GPU: "6"})
    await world.create("large", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(2, 4))
    await poll_until("no quota", lambda: is_inadmissible(queue, "large-1"))
    await world.create("small", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 4))
    await world.wait_for_pod("small-1", 0, "Running")
    await world.wait_for_phase("Queued", "large")
    assert {pod["metadata"]["labels"]["batch.kubernetes.io/job-name"] for pod in world.pods.items.values()} == {"small-1"}

    queue.set_quotas({**UNLIMITED_QUOTAS, GPU: "12"})
    pods = [await world.wait_for_pod("large-1", index, "Running") for index in range(2)]
    await poll_until("all GPUs are used", lambda: queue.read_usage(GPU) == "12")
    for pod in pods:
        await world.kubelet.succeed(pod)
    await world.wait_for_phase("Succeeded", "large")


async def test_suspended_jobs_release_their_quota(world: Rig, queue: QueueObjects) -> None:
    """Suspending a running job frees its quota for the next job. Suspending a waiting job removes it from the queue."""
    queue.create({**UNLIMITED_QUOTAS, GPU: "1"})
    await world.create("first", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 1))
    await world.report_training("first-1", step=40)
    await world.wait_for_phase("Running", "first")
    await world.create("second", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 1))
    await world.create("third", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 1))
    # The two jobs have equal workloads. Once Kueue has found one workload inadmissible, it does not try an equal one, so it marks only one of the two.
    await poll_until("two wait", lambda: {"second-1", "third-1"} <= set(queue.workloads_by_job()) and is_inadmissible(queue, "second-1"))
    await world.patch({"suspend": True}, "second")
    await world.wait_for_phase("Suspended", "second")
    await poll_until("second left the queue", lambda: "second-1" not in queue.workloads_by_job())

    await world.patch({"suspend": True}, "first")
    await world.wait_for_phase("Suspended", "first")
    pod = await world.wait_for_pod("third-1", 0, "Running")
    await world.patch({"suspend": False}, "first")
    await world.wait_for_phase("Queued", "first")
    await world.kubelet.succeed(pod)
    await world.wait_for_phase("Succeeded", "third")
    await world.kubelet.succeed(await world.wait_for_pod("first-2", 0, "Running"))
    status = await world.wait_for_phase("Succeeded", "first")
    assert (status["restarts"], status["retriesUsed"]) == (1, 0), "a resumed job begins another attempt, which is no retry"


async def test_a_retry_waits_in_the_queue_like_a_new_job(world: Rig, queue: QueueObjects) -> None:
    """If attempt 1 of a job fails while another job waits, the waiting job gets the quota. Attempt 2 of the failed job is admitted afterwards."""
    queue.create({**UNLIMITED_QUOTAS, GPU: "1"})
    await world.create("first", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 1))
    pod = await world.wait_for_pod("first-1", 0, "Running")
    await world.create("second", placement=QUEUE_PLACEMENT, resources=make_gpu_resources(1, 1))
    await poll_until("second waits", lambda: is_inadmissible(queue, "second-1"))
    await world.kubelet.end(pod, int(ExitCode.PEER_FAILED), TerminationMessage(code="RankDied", message="a rank was killed", step=10))
    other_pod = await world.wait_for_pod("second-1", 0, "Running")
    await world.wait_for_job("first-2")
    await world.wait_for_phase("Queued", "first")
    await poll_until("attempt 2 waits", lambda: is_inadmissible(queue, "first-2"))
    await world.kubelet.succeed(other_pod)
    await world.wait_for_phase("Succeeded", "second")
    await world.kubelet.succeed(await world.wait_for_pod("first-2", 0, "Running"))
    status = await world.wait_for_phase("Succeeded", "first")
    assert [(a["number"], a["reason"]) for a in status["attempts"]][1] == (2, "Succeeded")
    assert status["retriesUsed"] == 1


@pytest.mark.parametrize(
    ("queue_name", "missing_resource", "reason"),
    [("team-a", "ephemeral-storage", "ephemeral-storage"), ("team-b", "", "LocalQueue team-b")],
)
async def test_the_workload_says_why_a_job_waits(world: Rig, queue: QueueObjects, queue_name: str, missing_resource: str, reason: str) -> None:
    """A job waits if its ClusterQueue has no quota for a requested resource, or if its queue does not exist. A condition of the job's Workload states which
    of these is the reason.
    """
    queue.create({name: quantity for name, quantity in {**UNLIMITED_QUOTAS, GPU: "1"}.items() if name != missing_resource})
    await world.create(placement={"queueName": queue_name}, resources=make_gpu_resources(1, 1))
    await poll_until("not admitted", lambda: is_inadmissible(queue, "run-1"))
    conditions = queue.workloads_by_job()["run-1"]["status"]["conditions"]
    assert reason in next(condition["message"] for condition in conditions if condition["type"] == "QuotaReserved")
    await world.wait_for_phase("Queued")
    assert queue_name in world.condition("QuotaReserved")["message"]
    assert world.pods.items == {}
