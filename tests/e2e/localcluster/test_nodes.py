"""Nodes whose kubelet is stopped, whose power is cut, that are drained, or that have too few GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localcluster import NodeCluster
from tests.e2e.localcluster.pods import NamespaceApi, has_true_condition, make_pod, read_phase, read_terminated_state

pytestmark = pytest.mark.e2e
NODE_SELECTOR_N2 = {"nodeSelector": {"kubernetes.io/hostname": "n2"}}


@pytest.fixture
def n2(node_cluster: NodeCluster) -> Iterator[str]:
    """The second node. After the test, the node is started again and uncordoned."""
    yield "n2"
    node_cluster.start_node("n2")
    node_cluster.kubectl("uncordon", "n2")


def _make_tolerations(seconds: int) -> list[dict[str, object]]:
    taints = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    return [{"key": k, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds} for k in taints]


@pytest.mark.slow
def test_a_node_without_kubelet_becomes_not_ready_and_its_pods_are_evicted(api: NamespaceApi, n2: str) -> None:
    manifest = make_pod("p", "graceful", "0", tolerations=_make_tolerations(1), terminationGracePeriodSeconds=5, **NODE_SELECTOR_N2)
    api.create(manifest)
    api.wait("pod", "p", lambda p: read_phase(p) == "Running")
    api.cluster.stop_kubelet(n2)
    api.wait("node", n2, lambda n: not has_true_condition(n, "Ready"), seconds=60)
    evicted_pod = api.wait("pod", "p", lambda p: p["metadata"].get("deletionTimestamp"), seconds=60)
    assert has_true_condition(evicted_pod, "DisruptionTarget")
    assert read_phase(evicted_pod) == "Running"  # no kubelet updates the status of the evicted pod
    api.cluster.start_node(n2)
    api.wait("node", n2, lambda n: has_true_condition(n, "Ready"))


def test_a_power_cut_ends_all_containers(api: NamespaceApi, n2: str) -> None:
    api.create(make_pod("p", "sleep", "600", **NODE_SELECTOR_N2))
    api.wait("pod", "p", lambda p: read_phase(p) == "Running")
    api.cluster.power_off(n2)
    api.cluster.start_node(n2)
    assert read_terminated_state(api.wait("pod", "p", read_terminated_state))["exitCode"] in (137, 255)
    assert read_terminated_state(api.run(make_pod("again", "exit", "0", **NODE_SELECTOR_N2)))["exitCode"] == 0


def test_a_drain_evicts_pods_and_new_pods_stay_pending(api: NamespaceApi, n2: str) -> None:
    api.create(make_pod("p", "graceful", "75", **NODE_SELECTOR_N2))
    api.wait("pod", "p", lambda p: read_phase(p) == "Running")
    api.kubectl("drain", n2, "--force", "--delete-emptydir-data", "--ignore-daemonsets", "--timeout=60s")
    api.create(make_pod("late", "exit", "0", **NODE_SELECTOR_N2))
    pending_pod = api.wait("pod", "late", lambda p: p["status"].get("conditions"))
    assert (read_phase(pending_pod), pending_pod["status"]["conditions"][0]["reason"]) == ("Pending", "Unschedulable")
    api.kubectl("uncordon", n2)
    assert read_terminated_state(api.wait("pod", "late", read_terminated_state))["exitCode"] == 0


def test_the_scheduler_respects_the_number_of_gpus(api: NamespaceApi) -> None:
    def make_gpu_limit(gpu_count: int) -> dict[str, object]:
        return {"resources": {"limits": {"nvidia.com/gpu": str(gpu_count)}}}

    api.create(make_pod("a", "graceful", "0", container=make_gpu_limit(3), **NODE_SELECTOR_N2))
    api.wait("pod", "a", lambda p: read_phase(p) == "Running")
    api.create(make_pod("b", "exit", "0", container=make_gpu_limit(2), **NODE_SELECTOR_N2))
    pending_pod = api.wait("pod", "b", lambda p: p["status"].get("conditions"))
    assert "Insufficient nvidia.com/gpu" in pending_pod["status"]["conditions"][0]["message"]
    api.delete("pod", "a")
    assert read_terminated_state(api.wait("pod", "b", read_terminated_state))["exitCode"] == 0
