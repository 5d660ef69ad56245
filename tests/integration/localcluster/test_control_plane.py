"""Several control planes can run at the same time. A stopped control plane leaves no processes or files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localcluster import ApiError, ControlPlane, Endpoint, build, processes
from localcluster.control_plane import lock_state_folder
from localcluster.errors import ClusterBusy

pytestmark = pytest.mark.integration


def _run_localcluster(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "localcluster", *arguments], capture_output=True, text=True)


@pytest.fixture
def state_folder(tmp_path: Path) -> Iterator[Path]:
    """A state folder for the local cluster. After the test, its cluster is killed, even if the test has failed."""
    yield tmp_path / "c"
    processes.end_owned_processes(tmp_path / "c")


def test_two_control_planes_are_independent(control_plane: Endpoint, tmp_path: Path) -> None:
    with ControlPlane(tmp_path / "other") as other_plane:
        assert other_plane.server != control_plane.server
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "only-here"}}
        other_plane.request("POST", "/api/v1/namespaces", manifest)
        assert other_plane.exists("/api/v1/namespaces/only-here")
        assert not control_plane.exists("/api/v1/namespaces/only-here")
        with pytest.raises(ApiError) as refusal:
            Endpoint(other_plane.kubeconfig, other_plane.server, control_plane.token, other_plane.ca).get("/api/v1/namespaces")
        assert refusal.value.status == 401
    assert processes.list_owned_pids(tmp_path / "other") == []
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_command_line_starts_shows_and_stops_a_cluster(state_folder: Path) -> None:
    state_option = ["--state", str(state_folder)]
    up_result = _run_localcluster("up", "--mode", "control-plane", *state_option)
    assert up_result.stdout == f"export KUBECONFIG={state_folder}/kubeconfig\n"
    assert "start the control plane" in up_result.stderr
    pids = processes.list_owned_pids(state_folder)
    assert len(pids) == 3
    assert _run_localcluster("up", "--mode", "control-plane", *state_option).returncode == 0
    assert sorted(processes.list_owned_pids(state_folder)) == sorted(pids)
    assert "mode    control-plane" in _run_localcluster("status", *state_option).stdout
    assert _run_localcluster("kubectl", *state_option, "--", "get", "--raw", "/readyz").stdout == "ok"
    node_mode_result = _run_localcluster("up", "--nodes", "2", *state_option)
    assert (node_mode_result.returncode, node_mode_result.stderr.count("\n")) == (1, 1)
    assert "a control-plane cluster is running in" in node_mode_result.stderr
    for pid in pids[:1]:
        os.kill(pid, signal.SIGKILL)
    assert _run_localcluster("up", "--mode", "control-plane", *state_option).returncode == 0
    assert set(processes.list_owned_pids(state_folder)).isdisjoint(pids)
    assert _run_localcluster("down", *state_option).returncode == 0
    assert processes.list_owned_pids(state_folder) == []
    status_result = _run_localcluster("status", *state_option)
    assert (status_result.returncode, status_result.stderr) == (1, f"localcluster: no cluster is running in {state_folder}: run `localcluster up`\n")


def test_ctrl_c_during_up_leaves_no_process(state_folder: Path) -> None:
    command = [sys.executable, "-m", "localcluster", "up", "--mode", "control-plane", "--state", str(state_folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as up_process:
        deadline = time.monotonic() + 20
        while not processes.list_owned_pids(state_folder):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        up_process.send_signal(signal.SIGINT)
        _, stderr = up_process.communicate()
    assert up_process.returncode == 130
    assert stderr.splitlines()[-1] == "localcluster: interrupted; all started processes were stopped"
    assert processes.list_owned_pids(state_folder) == []


def test_node_options_are_refused_for_a_control_plane(tmp_path: Path) -> None:
    refused_process = _run_localcluster("up", "--mode", "control-plane", "--gpus", "1", "--state", str(tmp_path / "c"))
    assert refused_process.returncode == 2
    assert "--nodes and --gpus need --mode node" in refused_process.stderr


def test_second_command_in_the_same_state_folder_is_refused(tmp_path: Path) -> None:
    with lock_state_folder(tmp_path), pytest.raises(ClusterBusy, match="another localcluster command is running"):
        ControlPlane(tmp_path).up()


def test_the_server_reports_the_version_that_was_built(control_plane: Endpoint) -> None:
    version = control_plane.get("/version")["gitVersion"]
    assert version == f"v{build.PROGRAM_BY_NAME[build.KUBE_PROGRAM].version}"


def test_only_the_owner_can_read_files_with_secrets(control_plane: Endpoint) -> None:
    folder = control_plane.kubeconfig.parent
    for name in ("kubeconfig", "tokens.csv", "sa.key", "state.json"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name
