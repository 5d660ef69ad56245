"""However a cluster ends, no process, namespace, mount, network link or cgroup of it remains."""

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
from tests.e2e.localcluster.pods import NamespaceApi, make_pod, read_phase

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster(node_cluster: NodeCluster) -> NodeCluster:
    """The cluster that all e2e tests share. The tests of this file stop it, so they run last, and each test that needs it calls `up()` first."""
    return node_cluster


def _run_pods_that_ignore_sigterm(cluster: NodeCluster) -> None:
    """On each node, run a pod that ignores SIGTERM."""
    api = NamespaceApi(cluster, "default")
    for node in ("n1", "n2"):
        api.create(make_pod(f"p-{node}", "sleep", "600", nodeSelector={"kubernetes.io/hostname": node}))
    for node in ("n1", "n2"):
        api.wait("pod", f"p-{node}", lambda p: read_phase(p) == "Running")


def _wait_until(is_true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"the condition is still false after {seconds} s"
        time.sleep(0.02)


def _make_command(cluster: NodeCluster, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "localcluster", *arguments, "--state", str(cluster.state_dir)]


def test_a_second_up_uses_the_running_cluster_and_refuses_other_options(cluster: NodeCluster, tmp_path: Path) -> None:
    pid = Machine(cluster.state_dir).find_pid()
    repeated_cluster = NodeCluster(cluster.state_dir, nodes=2).up()
    assert Machine(repeated_cluster.state_dir).find_pid() == pid
    with pytest.raises(ClusterDiffers, match="2 node.*but 1 node.*are requested: run `localcluster down` first"):
        NodeCluster(cluster.state_dir, nodes=1).up()
    with pytest.raises(ClusterBusy, match="only one can run per machine"):
        NodeCluster(tmp_path / "other").up()
    assert cluster.endpoint.is_ready()


def test_status_shows_nodes_and_s3(cluster: NodeCluster) -> None:
    status = subprocess.run(_make_command(cluster, "status"), capture_output=True, text=True).stdout
    assert "nodes   n1 Ready, n2 Ready" in status
    assert cluster.s3.host_url in status
    with pytest.raises(LocalClusterError, match="there is no node n9: the nodes are n1, n2"):
        cluster.stop_kubelet("n9")


@pytest.mark.slow
def test_up_removes_the_old_cluster_after_its_main_process_was_killed(cluster: NodeCluster, testbox: str) -> None:
    assert testbox
    _run_pods_that_ignore_sigterm(cluster.up())
    namespaces = leftovers.list_linux_namespaces(cluster.state_dir)
    leftovers_before = leftovers.find_leftovers(cluster.state_dir, namespaces)
    old_pids = [int(line.split()[0]) for line in leftovers_before.processes]
    start_times = {pid: processes.read_start_time(pid) for pid in old_pids}
    os.kill(Machine(cluster.state_dir).find_pid(), signal.SIGKILL)
    cluster.up()
    assert [pid for pid in old_pids if start_times[pid] and processes.read_start_time(pid) == start_times[pid]] == []
    leftovers_after = leftovers.find_leftovers(cluster.state_dir, leftovers.list_linux_namespaces(cluster.state_dir))
    assert len(leftovers_after.namespaces) == len(leftovers_before.namespaces)
    assert leftovers_after.mounts == ()
    pods = cluster.endpoint.get("/api/v1/pods")["items"]
    assert {p["metadata"]["namespace"] for p in pods} == {"s3"}


def test_down_leaves_nothing_behind(cluster: NodeCluster, testbox: str) -> None:
    assert testbox
    _run_pods_that_ignore_sigterm(cluster.up())
    namespaces = leftovers.list_linux_namespaces(cluster.state_dir)
    leftovers_before = leftovers.find_leftovers(cluster.state_dir, namespaces)
    assert len(leftovers_before.namespaces) >= 5  # each of the two nodes has a network and a mount namespace, and there is at least one PID namespace
    assert len(leftovers_before.processes) > 15
    assert leftovers_before.links and leftovers_before.cgroups
    cluster.down()
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) == NO_LEFTOVERS
    assert sorted(p.name for p in cluster.state_dir.iterdir()) == ["lock"]


def test_down_leaves_nothing_behind_after_up_was_killed(cluster: NodeCluster) -> None:
    cluster.down()
    up_process = subprocess.Popen(_make_command(cluster, "up", "--nodes", "2"), stderr=subprocess.DEVNULL)
    _wait_until((cluster.state_dir / "certs" / "apiserver.crt").exists)
    namespaces = leftovers.list_linux_namespaces(cluster.state_dir)
    up_process.kill()
    up_process.wait()
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) != NO_LEFTOVERS
    assert subprocess.run(_make_command(cluster, "down"), stderr=subprocess.DEVNULL).returncode == 0
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) == NO_LEFTOVERS


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_nothing_behind(cluster: NodeCluster, signal_number: signal.Signals) -> None:
    cluster.down()
    with subprocess.Popen(_make_command(cluster, "up", "--nodes", "2"), stderr=subprocess.PIPE, text=True) as up_process:
        _wait_until((cluster.state_dir / "certs" / "apiserver.crt").exists)
        namespaces = leftovers.list_linux_namespaces(cluster.state_dir)
        up_process.send_signal(signal_number)
        _, stderr = up_process.communicate()
    assert up_process.returncode == 130
    assert stderr.splitlines()[-1] == "localcluster: interrupted; all started processes were stopped"
    assert leftovers.find_leftovers(cluster.state_dir, namespaces) == NO_LEFTOVERS


def test_the_cluster_ends_with_the_program_that_started_it(cluster: NodeCluster) -> None:
    cluster.down()
    program = (
        "import pathlib, localcluster; "
        f"localcluster.NodeCluster(pathlib.Path({str(cluster.state_dir)!r}), nodes=2).up(); "
        "print('up', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        namespaces = leftovers.list_linux_namespaces(cluster.state_dir)
        owner.kill()
    _wait_until(lambda: leftovers.find_leftovers(cluster.state_dir, namespaces).processes == ())


def test_the_search_for_leftovers_finds_network_links() -> None:
    assert Leftovers((), (), (), ("ftlc0",), ()) != NO_LEFTOVERS
