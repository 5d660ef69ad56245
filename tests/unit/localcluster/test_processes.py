"""The local cluster finds its processes by their owner. These processes end when their parent ends, or when the cluster is stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localcluster import machine, processes
from localcluster.errors import ClusterBusy, StartFailed
from localcluster.processes import Lifetime


def _spawn(owner: Path, script: str, lifetime: Lifetime = Lifetime.UNTIL_PARENT_ENDS) -> processes.Server:
    return processes.spawn("x", ["sh", "-c", script], owner=owner, log=owner / "log", lifetime=lifetime)


def _wait_until(is_true: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():  # type: ignore[operator]  # a function without arguments
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_descendants_of_an_owner_are_found_and_killed(tmp_path: Path) -> None:
    owner, other_owner = tmp_path / "owner", tmp_path / "other"
    _spawn(owner, "sleep 600 & sleep 600 & wait", Lifetime.UNTIL_STOPPED)
    _spawn(other_owner, "exec sleep 600")
    _wait_until(lambda: len(processes.list_owned_pids(owner)) == 3)
    assert processes.end_owned_processes(owner) == 3
    assert processes.list_owned_pids(owner) == []
    assert len(processes.list_owned_pids(other_owner)) == 1
    processes.end_owned_processes(other_owner)


def test_a_process_in_execve_is_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, find_processes = _spawn(tmp_path, "exec sleep 600", Lifetime.UNTIL_STOPPED), processes.find_processes
    unfinished_searches = iter([processes.FoundProcesses([], [server.process.pid])])
    monkeypatch.setattr(processes, "find_processes", lambda owner: next(unfinished_searches, None) or find_processes(owner))
    assert processes.end_owned_processes(tmp_path) == 1
    assert processes.read_start_time(server.process.pid) is None


@pytest.mark.parametrize(("stack_start", "expected"), [("140000000000000", []), ("0", None)], ids=["program without environment", "inside execve"])
def test_an_empty_environment_is_complete_only_after_execve(
    stack_start: str, expected: list[bytes] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside `execve`, a process can already have arguments but not yet an environment."""
    with subprocess.Popen(["sleep", "600"], env={}) as process:
        read_stat = processes._read_stat
        _wait_until(lambda: processes.read_environment(process.pid) == [])
        monkeypatch.setattr(
            processes, "_read_stat", lambda pid: [stack_start if index == 25 else text for index, text in enumerate(read_stat(pid))]
        )
        assert processes.read_environment(process.pid) == expected
        process.kill()


def test_a_process_that_stays_in_execve_does_not_stop_the_search_from_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_processes", lambda owner: processes.FoundProcesses([], [1]))
    monkeypatch.setattr(processes, "EXEC_WAIT_SECONDS", 0.0)
    assert processes.end_owned_processes(tmp_path) == 0


def test_a_process_that_replaces_its_program_all_the_time_is_found(tmp_path: Path) -> None:
    """During `execve`, the environment of a process is read as empty. A search at this moment must not conclude that the process has no environment."""
    script = tmp_path / "again.sh"
    script.write_text("exec sh \"$0\"\n")
    server = processes.spawn("x", ["sh", script], owner=tmp_path, log=tmp_path / "log", lifetime=Lifetime.UNTIL_STOPPED)
    for _ in range(200):
        found_processes = processes.find_processes(tmp_path)
        assert [server.process.pid] in (found_processes.owned_pids, [pid for pid in found_processes.pids_in_exec if pid == server.process.pid])
    assert processes.end_owned_processes(tmp_path) == 1


def test_processes_of_others_may_have_no_environment_and_any_name(tmp_path: Path) -> None:
    program = os.fsencode(tmp_path) + b"/\xff\xfe"
    Path(os.fsdecode(program)).symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen([program, "600"], env={}) as child:
        _wait_until(lambda: Path(f"/proc/{child.pid}/cmdline").read_bytes())
        assert Path(f"/proc/{child.pid}/environ").read_bytes() == b""
        found_processes = processes.find_processes(tmp_path)
        assert child.pid not in found_processes.owned_pids + found_processes.pids_in_exec
        child.kill()


def test_kernel_threads_are_no_programs() -> None:
    stats_by_pid = {stat.parent.name: stat.read_bytes() for stat in Path("/proc").glob("[0-9]*/stat") if stat.parent.name != "1"}
    kernel_threads = [int(pid) for pid, stat in stats_by_pid.items() if stat.rpartition(b")")[2].split()[1] == b"2"]
    assert [pid for pid in kernel_threads if processes.is_running_program(pid)] == []
    assert processes.is_running_program(os.getpid())


def test_process_with_lifetime_parent_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import pathlib; from localcluster import processes as p; o = pathlib.Path({o!r})\n"
        "p.spawn('x', ['sleep', '600'], owner=o, log=o / 'log', lifetime=p.Lifetime.{lifetime})\n"
        "print('ready', flush=True); input()"
    )
    for lifetime, expected_count in ((Lifetime.UNTIL_PARENT_ENDS, 0), (Lifetime.UNTIL_STOPPED, 1)):
        owner = tmp_path / lifetime.value
        program = script.format(o=str(owner), lifetime=lifetime.name)
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            # Popen may return before the kernel has set the environment of the new program.
            _wait_until(lambda owner=owner: len(processes.list_owned_pids(owner)) == 1)
            parent.send_signal(signal.SIGKILL)
        if expected_count == 0:
            _wait_until(lambda owner=owner: processes.list_owned_pids(owner) == [])
        assert processes.end_owned_processes(owner) == expected_count


def test_waiting_fails_as_soon_as_a_server_has_ended(tmp_path: Path) -> None:
    server = _spawn(tmp_path, "echo no such flag; exit 3")
    with pytest.raises(StartFailed, match="x exited with 3 while starting: no such flag"):
        processes.wait_until("x", lambda: False, servers=[server], timeout=10)


def test_waiting_fails_after_the_timeout_with_the_log(tmp_path: Path) -> None:
    server = _spawn(tmp_path, "echo hello; exec sleep 600")
    _wait_until(lambda: (tmp_path / "log").read_text())
    with pytest.raises(StartFailed, match=rf"still waiting for x after 0 s: x: hello \(log: {tmp_path}/log\)"):
        processes.wait_until("x", lambda: False, servers=[server], timeout=0)
    processes.end_owned_processes(tmp_path)


def test_zombie_has_no_start_time() -> None:
    child = subprocess.Popen(["true"])
    _wait_until(lambda: processes.read_start_time(child.pid) is None)  # the child is a zombie until child.wait()
    child.wait()
    assert processes.read_start_time(os.getpid()) is not None


def test_lock_waits_while_the_cluster_of_the_same_folder_is_ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOCK_FILE", tmp_path / "machine.lock")
    first_lock = machine.take_lock(tmp_path / "own")
    pauses: list[float] = []

    def record_pause_and_end(seconds: float) -> None:
        pauses.append(seconds)
        first_lock.close()

    monkeypatch.setattr(processes.time, "sleep", record_pause_and_end)
    with machine.take_lock(tmp_path / "own"):
        assert len(pauses) == 1
        with pytest.raises(ClusterBusy, match=f"`localcluster down --state {tmp_path}/own`"):
            machine.take_lock(tmp_path / "other")
        assert (tmp_path / "machine.lock").read_text() == f"{tmp_path}/own\n"
