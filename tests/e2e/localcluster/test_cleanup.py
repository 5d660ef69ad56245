"""When a cluster ends, for any reason, no process, namespace, mount, network link or cgroup remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from localcluster import LocalClusterError, NodeCluster, leftovers, processes
from localcluster.errors import ClusterBusy, ClusterDiffers
from localcluster.leftovers import NO_LEFTOVERS, Leftovers
from localcluster.machine import Machine
from tests.e2e.localcluster.pods import NamespaceApi, pod, pod_phase

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster(node_cluster: NodeCluster) -> NodeCluster:
    """The cluster that all e2e tests share. Tests that stop the cluster run last. A test that needs the cluster calls up()."""
    return node_cluster


def _run_pods_that_ignore_sigterm(cluster: NodeCluster) -> None:
    """Run a pod that ignores SIGTERM on each node."""
    api = NamespaceApi(cluster, "default")
    for node in ("n1", "n2"):
        api.create(pod(f"p-{node}", "sleep", "600", nodeSelector={"kubernetes.io/hostname": node}))
    for node in ("n1", "n2"):
        api.wait("pod", f"p-{node}", lambda p: pod_phase(p) == "Running")


def _wait(is_true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def _command(cluster: NodeCluster, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "localcluster", *arguments, "--state", str(cluster.state_dir)]


def test_second_up_uses_the_running_cluster_and_other_options_are_refused(cluster: NodeCluster, tmp_path: Path) -> None:
    pid = Machine(cluster.state_dir).pid()
    again = NodeCluster(cluster.state_dir, nodes=2).up()
    assert Machine(again.state_dir).pid() == pid
    with pytest.raises(ClusterDiffers, match="2 node.*but 1 node.*are requested: run `localcluster down` first"):
        NodeCluster(cluster.state_dir, nodes=1).up()
    with pytest.raises(ClusterBusy, match="only one can run per machine"):
        NodeCluster(tmp_path / "other").up()
    assert cluster.endpoint.is_ready()


def test_status_shows_nodes_and_s3(cluster: NodeCluster) -> None:
    status = subprocess.run(_command(cluster, "status"), capture_output=True, text=True).stdout
    assert "nodes   n1 Ready, n2 Ready" in status
    assert cluster.s3.host_url in status
    with pytest.raises(LocalClusterError, match="there is no node n9: the nodes are n1, n2"):
        cluster.stop_kubelet("n9")


@pytest.mark.slow
def test_up_after_kill_9_of_the_first_process_removes_the_old_cluster(cluster: NodeCluster, testbox: str) -> None:
    assert testbox
    _run_pods_that_ignore_sigterm(cluster.up())
    namespaces = leftovers.list_cluster_namespaces(cluster.state_dir)
    before = leftovers.find_leftovers(cluster.state_dir, namespaces)
    old_pids = [int(line.split()[0]) for line in before.processes]
    start_times = {pid: processes.start_time(pid) for pid in old_pids}
    os.kill(Machine(cluster.state_dir).pid(), signal.SIGKILL)
    cluster.up()
    assert [pid for pid in old_pids if start_times[pid] and processes.start_time(pid) == start_times[pid]] == []
    after = leftovers.find_leftovers(cluster.state_dir, leftovers.list_cluster_namespaces(cluster.state_dir))
    assert len(after.namespaces) == len(before.namespaces)
    assert after.mounts == ()
    pods = cluster.endpoint.get("/api/v1/pods")["items"]
    assert {p["metadata"]["namespace"] for p in pods} == {"s3"}


def test_down_leaves_nothing(cluster: NodeCluster, testbox: str) -> None:
    assert testbox
    _run_pods_that_ignore_sigterm(cluster.up())
    namespaces = leftovers.list_cluster_namespaces(cluster.state_dir)
    before = leftovers.find_leftovers(cluster.state_dir, namespaces)
    assert len(before.namespaces) >= 5  # network and mount namespaces of two nodes, and a PID namespace
    assert len(before.processes) > 15
    assert before.links and before.cgroups
    cluster.down()
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) == NO_LEFTOVERS
    assert sorted(p.name for p in cluster.state_dir.iterdir()) == ["lock"]


def test_down_after_kill_9_of_up_leaves_nothing(cluster: NodeCluster) -> None:
    cluster.down()
    started = subprocess.Popen(_command(cluster, "up", "--nodes", "2"), stderr=subprocess.DEVNULL)
    _wait((cluster.state_dir / "certs" / "apiserver.crt").exists)
    namespaces = leftovers.list_cluster_namespaces(cluster.state_dir)
    started.kill()
    started.wait()
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) != NO_LEFTOVERS
    assert subprocess.run(_command(cluster, "down"), stderr=subprocess.DEVNULL).returncode == 0
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) == NO_LEFTOVERS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_up_leaves_nothing(cluster: NodeCluster, number: signal.Signals) -> None:
    cluster.down()
    with subprocess.Popen(_command(cluster, "up", "--nodes", "2"), stderr=subprocess.PIPE, text=True) as started:
        _wait((cluster.state_dir / "certs" / "apiserver.crt").exists)
        namespaces = leftovers.list_cluster_namespaces(cluster.state_dir)
        started.send_signal(number)
        _, stderr = started.communicate()
    assert started.returncode == 130
    assert stderr.splitlines()[-1] == "localcluster: interrupted; all started processes were stopped"
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) == NO_LEFTOVERS


def test_cluster_ends_with_the_program_that_started_it(cluster: NodeCluster) -> None:
    cluster.down()
    program = (
        "import pathlib, localcluster; "
        f"localcluster.NodeCluster(pathlib.Path({str(cluster.state_dir)!r}), nodes=2).up(); "
        "print('up', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        namespaces = leftovers.list_cluster_namespaces(cluster.state_dir)
        owner.kill()
    _wait(lambda: leftovers.find_leftovers(cluster.state_dir, namespaces).processes == ())


def test_leftovers_include_network_links() -> None:
    assert Leftovers((), (), (), ("ftlc0",), ()) != NO_LEFTOVERS
