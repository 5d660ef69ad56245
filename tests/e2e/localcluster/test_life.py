"""However a cluster ends, nothing of it is left: no process, namespace, mount, link or cgroup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from localcluster import LocalClusterError, NodeCluster, census, processes
from localcluster.census import NOTHING, Census
from localcluster.errors import ClusterBusy, ClusterDiffers
from localcluster.machine import Machine
from tests.e2e.localcluster.pods import Lab, phase, pod

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster(node_cluster: NodeCluster) -> NodeCluster:
    """The common cluster. These tests come last of all (conftest), and bring it up only if they need it."""
    return node_cluster


def _busy(cluster: NodeCluster) -> None:
    """Pods that resist: one deaf to SIGTERM, on each node."""
    lab = Lab(cluster, "default")
    for node in ("n1", "n2"):
        lab.create(pod(f"p-{node}", "sleep", "600", nodeSelector={"kubernetes.io/hostname": node}))
    for node in ("n1", "n2"):
        lab.wait("pod", f"p-{node}", lambda p: phase(p) == "Running")


def _wait(what: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def _command(cluster: NodeCluster, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "localcluster", *arguments, "--state", str(cluster.state_dir)]


def test_a_second_up_joins_and_a_different_one_is_told(cluster: NodeCluster, tmp_path: Path) -> None:
    pid = Machine(cluster.state_dir).pid()
    again = NodeCluster(cluster.state_dir, nodes=2).up()
    assert Machine(again.state_dir).pid() == pid
    with pytest.raises(ClusterDiffers, match="2 node.*not 1: run `localcluster down` first"):
        NodeCluster(cluster.state_dir, nodes=1).up()
    with pytest.raises(ClusterBusy, match="one per machine"):
        NodeCluster(tmp_path / "other").up()
    assert cluster.endpoint.ready()


def test_command_line_tells_what_is_up(cluster: NodeCluster) -> None:
    told = subprocess.run(_command(cluster, "status"), capture_output=True, text=True).stdout
    assert "nodes   n1 Ready, n2 Ready" in told
    assert cluster.s3.host_url in told
    with pytest.raises(LocalClusterError, match="there is no node n9: the nodes are n1, n2"):
        cluster.stop_node("n9")


def test_kill_9_of_the_first_process_then_up_leaves_only_the_new_cluster(cluster: NodeCluster, testbox: str) -> None:
    assert testbox
    _busy(cluster.up())
    namespaces = census.namespaces_of(cluster.state_dir)
    before = census.take(cluster.state_dir, namespaces)
    old = [int(line.split()[0]) for line in before.processes]
    born = {pid: processes.born(pid) for pid in old}
    os.kill(Machine(cluster.state_dir).pid(), signal.SIGKILL)
    cluster.up()
    assert [pid for pid in old if born[pid] and processes.born(pid) == born[pid]] == []
    after = census.take(cluster.state_dir, census.namespaces_of(cluster.state_dir))
    assert len(after.namespaces) == len(before.namespaces)
    assert after.mounts == ()
    pods = cluster.endpoint.get("/api/v1/pods")["items"]
    assert {p["metadata"]["namespace"] for p in pods} == {"s3"}


def test_down_leaves_nothing(cluster: NodeCluster, testbox: str) -> None:
    assert testbox
    _busy(cluster.up())
    namespaces = census.namespaces_of(cluster.state_dir)
    before = census.take(cluster.state_dir, namespaces)
    assert len(before.namespaces) >= 5  # of both nodes, and of processes
    assert len(before.processes) > 15
    assert before.links and before.cgroups
    cluster.down()
    assert census.take(cluster.state_dir, namespaces) == NOTHING
    assert sorted(p.name for p in cluster.state_dir.iterdir()) == ["lock"]


def test_kill_9_of_up_itself_then_down_leaves_nothing(cluster: NodeCluster) -> None:
    cluster.down()
    started = subprocess.Popen(_command(cluster, "up", "--nodes", "2"), stderr=subprocess.DEVNULL)
    _wait((cluster.state_dir / "certs" / "apiserver.crt").exists)
    namespaces = census.namespaces_of(cluster.state_dir)
    started.kill()
    started.wait()
    assert census.take(cluster.state_dir, namespaces) != NOTHING
    assert subprocess.run(_command(cluster, "down"), stderr=subprocess.DEVNULL).returncode == 0
    assert census.take(cluster.state_dir, namespaces) == NOTHING


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_up_leaves_nothing(cluster: NodeCluster, number: signal.Signals) -> None:
    cluster.down()
    with subprocess.Popen(_command(cluster, "up", "--nodes", "2"), stderr=subprocess.PIPE, text=True) as started:
        _wait((cluster.state_dir / "certs" / "apiserver.crt").exists)
        namespaces = census.namespaces_of(cluster.state_dir)
        started.send_signal(number)
        _, words = started.communicate()
    assert started.returncode == 130
    assert words.splitlines()[-1] == "localcluster: interrupted, nothing was left running"
    assert census.take(cluster.state_dir, namespaces) == NOTHING


def test_the_end_of_the_program_that_started_it_is_its_end(cluster: NodeCluster) -> None:
    cluster.down()
    program = (
        "import pathlib, localcluster; "
        f"localcluster.NodeCluster(pathlib.Path({str(cluster.state_dir)!r}), nodes=2).up(); "
        "print('up', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        namespaces = census.namespaces_of(cluster.state_dir)
        owner.kill()
    _wait(lambda: census.take(cluster.state_dir, namespaces).processes == ())


def test_a_census_that_finds_something_is_not_nothing() -> None:
    assert Census((), (), (), ("ftlc0",), ()) != NOTHING
