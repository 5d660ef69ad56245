"""Starts child processes, lists all descendants, and kills and reaps them.

If the agent dies, its ranks keep running and could even commit checkpoints. The supervisor therefore becomes the subreaper of its
descendants (as PID 1 always is), so that it can kill all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

from finetune_trainer.logs import configure_logging

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_spared_pids: set[int] = set()
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make this process a subreaper: it becomes the parent of each descendant whose own parent ends."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def seconds_since_process_start() -> float:
    """Return the seconds since the start of this process."""
    stat_fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start_seconds_after_boot = int(stat_fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - start_seconds_after_boot)


def die_with_parent() -> None:
    """Let the kernel kill the calling process when its parent ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def begin_child(process_name: str) -> None:
    """Prepare a process that a supervisor or an agent has started: a rank, a stage, or the check of a preparation.

    The process ends with its parent, prints the stacks of its threads on SIGUSR1, and names itself `process_name` in log lines. The process ignores
    Ctrl-C, because its parent handles Ctrl-C.
    """
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(process_name)


def end_child(exit_code: int) -> NoReturn:
    """End the process. Exit handlers are skipped, because some libraries' handlers wait forever for a lost rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class ChildProcess:
    """A direct child process, which has its own process group."""

    def __init__(self, command: list[str], env: dict[str, str], *, cwd: Path | None = None, pass_fds: Collection[int] = ()) -> None:
        self._process = subprocess.Popen(command, env=env, cwd=cwd, start_new_session=True, pass_fds=tuple(pass_fds))
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code (negative if a signal ended the child), or None while the child runs. Reaps a child that has ended."""
        return self._process.poll()

    def stop(self, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to the child's process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal_number)


def spare_process(pid: int) -> None:
    """Exclude a child process and its descendants from `kill_all_descendants`."""
    _spared_pids.add(pid)


def descendants(root: int | None = None, *, without: Collection[int] = ()) -> list[int]:
    """Return the pids of all running descendants of `root` (default: this process), without zombie processes.

    The processes in `without` and their descendants are left out too.
    """
    parent_pids: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parent_pids[int(folder.name)] = int(parent)
    found_pids, new_pids = set(), {root or os.getpid()}
    while new_pids:
        new_pids = {pid for pid, parent in parent_pids.items() if parent in new_pids and pid not in found_pids and pid not in without}
        found_pids |= new_pids
    return sorted(found_pids)


def kill_all_descendants(timeout: float = 10.0) -> None:
    """Send SIGKILL to all descendants of this process, except spared ones, and reap them."""
    deadline = time.monotonic() + timeout
    while (running_pids := descendants(without=_spared_pids)) and time.monotonic() < deadline:
        for pid in running_pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        reap_children()
        time.sleep(0.02)
    reap_children()


def reap_children() -> None:
    """Collect the exit status of all ended children."""
    with contextlib.suppress(ChildProcessError):
        for folder in Path(f"/proc/{os.getpid()}/task").iterdir():
            child_pids: list[str] = []
            with contextlib.suppress(OSError):  # the thread may have ended; its children then belong to another thread
                child_pids = (folder / "children").read_text().split()
            for pid in map(int, child_pids):
                with contextlib.suppress(ChildProcessError, OSError):
                    os.waitpid(pid, os.WNOHANG)


def has_oom_kill() -> bool:
    """Whether the kernel has killed a process of this container for lack of memory."""
    for file, key in (
        ("/sys/fs/cgroup/memory.events", "oom_kill"),
        ("/sys/fs/cgroup/memory/memory.oom_control", "oom_kill"),
    ):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(file).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == key:
                    return int(value) > 0
    return False
