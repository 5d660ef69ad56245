"""Processes below the supervisor: it starts the agent, reaps whatever dies below it, and leaves nobody behind.

When an agent dies, its ranks live on (an orphan would train to the end and commit), so that the supervisor is made the
subreaper of all below it, as PID 1 is anyway, and kills every process that has it among its ancestors.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Become the parent of all orphans below this process."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends. To be called by the child itself."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Child:
    """A direct child. `poll` gives its exit code once it ended (negative: the signal's number)."""

    def __init__(self, command: list[str], env: dict[str, str], *, cwd: Path | None = None) -> None:
        self._process = subprocess.Popen(command, env=env, cwd=cwd, start_new_session=True)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit code, or None while it lives. Also reaps it."""
        return self._process.poll()

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Signal its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)


def descendants(root: int | None = None) -> list[int]:
    """Pids of all living processes below `root` (default: this one), from /proc; zombies do not count."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(folder.name)] = int(parent)
    below, frontier = set(), {root or os.getpid()}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier and pid not in below}
        below |= frontier
    return sorted(below)


def kill_all_below(timeout: float = 10.0) -> None:
    """SIGKILL everything below this process and reap it."""
    end = time.monotonic() + timeout
    while (living := descendants()) and time.monotonic() < end:
        for pid in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        reap_orphans(set())
        time.sleep(0.02)
    reap_orphans(set())


def reap_orphans(own: set[int]) -> None:
    """Collect ended children that are not in `own` (those are collected by their `Child`)."""
    with contextlib.suppress(ChildProcessError):
        for folder in Path(f"/proc/{os.getpid()}/task").iterdir():
            children = (folder / "children").read_text().split() if (folder / "children").exists() else []
            for pid in {int(one) for one in children} - own:
                with contextlib.suppress(ChildProcessError, OSError):
                    os.waitpid(pid, os.WNOHANG)


def killed_for_memory() -> bool:
    """Whether the kernel killed a process of this container for memory (cgroup v2, then v1)."""
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
