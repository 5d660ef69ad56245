"""Processes are found by their owner, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localcluster import machine, processes
from localcluster.errors import ClusterBusy, StartFailed
from localcluster.processes import Lifetime


def _spawn(owner: Path, script: str, lifetime: Lifetime = Lifetime.PARENT) -> processes.Server:
    return processes.spawn("x", ["sh", "-c", script], owner=owner, log=owner / "log", lifetime=lifetime)


def _until(what: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():  # type: ignore[operator]  # a function without arguments
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_grandchildren_are_found_and_ended(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    _spawn(mine, "sleep 600 & sleep 600 & wait", Lifetime.DETACHED)
    _spawn(other, "exec sleep 600")
    _until(lambda: len(processes.owned_by(mine)) == 3)
    assert processes.end_all(mine) == 3
    assert processes.owned_by(mine) == []
    assert len(processes.owned_by(other)) == 1
    processes.end_all(other)


def test_a_bound_process_ends_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import pathlib; from localcluster import processes as p; o = pathlib.Path({o!r})\n"
        "p.spawn('x', ['sleep', '600'], owner=o, log=o / 'log', lifetime=p.Lifetime.{life})\n"
        "print('ready', flush=True); input()"
    )
    for life, expected in ((Lifetime.PARENT, 0), (Lifetime.DETACHED, 1)):
        owner = tmp_path / life.value
        program = script.format(o=str(owner), life=life.name)
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            assert len(processes.owned_by(owner)) == 1
            parent.send_signal(signal.SIGKILL)
        if expected == 0:
            _until(lambda owner=owner: processes.owned_by(owner) == [])
        assert processes.end_all(owner) == expected


def test_waiting_tells_early_that_a_server_has_ended(tmp_path: Path) -> None:
    server = _spawn(tmp_path, "echo no such flag; exit 3")
    with pytest.raises(StartFailed, match="x ended with 3 while starting: no such flag"):
        processes.wait_until("x", lambda: False, servers=[server], timeout=10)


def test_waiting_has_a_limit_and_names_the_log(tmp_path: Path) -> None:
    server = _spawn(tmp_path, "echo hello; exec sleep 600")
    _until(lambda: (tmp_path / "log").read_text())
    with pytest.raises(StartFailed, match=rf"x was not ready after 0 s: x: hello \(log: {tmp_path}/log\)"):
        processes.wait_until("x", lambda: False, servers=[server], timeout=0)
    processes.end_all(tmp_path)


def test_the_dead_were_not_born() -> None:
    child = subprocess.Popen(["true"])
    _until(lambda: processes.born(child.pid) is None)  # a zombie until it is waited for
    child.wait()
    assert processes.born(os.getpid()) is not None


def test_the_lock_of_a_cluster_that_is_ending_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LOCK", tmp_path / "machine.lock")
    ending = machine.take_lock(tmp_path / "own")
    looks: list[float] = []

    def end(seconds: float) -> None:
        looks.append(seconds)
        ending.close()

    monkeypatch.setattr(processes.time, "sleep", end)
    with machine.take_lock(tmp_path / "own"):
        assert len(looks) == 1
        with pytest.raises(ClusterBusy, match=f"`localcluster down --state {tmp_path}/own`"):
            machine.take_lock(tmp_path / "other")
        assert (tmp_path / "machine.lock").read_text() == f"{tmp_path}/own\n"
