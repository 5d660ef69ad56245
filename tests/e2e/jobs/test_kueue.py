"""Kueue's own controller admits a job on the nodes, and its pod trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from finetune_api.names import Phase

from localcluster.processes import wait_until
from tests.e2e.jobs.installation import LONG_RUN_STEPS, Installation, JobNamespace, make_job
from tests.support.kueue_controller import NodeNetwork, QueueObjects, running_kueue

QUOTAS = {"cpu": "4", "memory": "16Gi", "ephemeral-storage": "40Gi"}


@pytest.fixture
def queue(installation: Installation, job_namespace: JobNamespace, tmp_path: Path) -> Iterator[QueueObjects]:
    """Kueue runs in the network namespace of the first node until the test ends. Returns the Kueue objects of one queue."""
    cluster = installation.cluster
    network = NodeNetwork(cluster.network_namespace_pid, cluster.plan.api_address)
    with running_kueue(cluster.endpoint, tmp_path / "kueue", network):
        yield QueueObjects(cluster.endpoint, job_namespace.namespace)


@pytest.mark.slow
def test_kueue_admits_a_job_and_its_pod_trains(queue: QueueObjects, job_namespace: JobNamespace) -> None:
    queue.create({**QUOTAS, "cpu": "0"})
    job_namespace.apply(make_job("queued", training={"maxSteps": LONG_RUN_STEPS}, placement={"queueName": "team-a"}))
    job_namespace.wait("queued", lambda s: s.phase is Phase.QUEUED, "queued")
    assert job_namespace.pods("queued") == []

    queue.set_quotas(QUOTAS)
    job_namespace.wait("queued", lambda s: s.phase is Phase.RUNNING, "running")
    (pod,) = job_namespace.pods("queued")
    assert (pod["metadata"]["labels"]["kueue.x-k8s.io/podset"], pod["spec"].get("schedulingGates", [])) == ("main", [])
    assert queue.read_usage("cpu") == "100m"
    status = job_namespace.wait_finished("queued")
    assert status.restarts == 0 and status.output is not None and status.output.uri is not None
    assert "adapter_model.safetensors" in job_namespace.installation.read_file_hashes(status.output.uri)
    wait_until("the quota is free", lambda: queue.read_usage("cpu") == "0", servers=[], timeout=60)
