"""The containers' cgroups: one folder per node in each hierarchy, created before a cluster starts and removed after it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from localcluster.errors import StartFailed
from localcluster.layout import CGROUP

ROOT = Path("/sys/fs/cgroup")
WEIGHT = 4
"""CPU weight of all containers together, relative to one other process group of this machine."""


def hierarchies() -> list[Path]:
    """The mounted hierarchies: one with cgroup v2, one for each controller with v1."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def create(nodes: list[str]) -> None:
    """Create a cgroup for each node."""
    for hierarchy in hierarchies():
        ours = hierarchy / CGROUP
        for node in nodes:
            (ours / node).mkdir(parents=True, exist_ok=True)
        if hierarchy == ROOT:
            for folder in (ROOT, ours):
                names = (folder / "cgroup.controllers").read_text().split()
                (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in names))
        elif (ours / "cpuset.cpus").exists():
            _inherit_cpuset(ours, [ours / node for node in nodes])
        _set_weight(ours)


def _set_weight(folder: Path) -> None:
    """Raise the CPU weight. A new group has the weight of a single process, so that pods would get too little CPU next to other programs."""
    for name, one in (("cpu.weight", 100), ("cpu.shares", 1024)):
        if (folder / name).exists():
            (folder / name).write_text(str(WEIGHT * one))


def _inherit_cpuset(ours: Path, nodes: list[Path]) -> None:
    """Copy the parent's cpuset: a new one of cgroup v1 is empty, and no process can run in it."""
    for folder in [ours, *nodes]:
        for name in ("cpuset.cpus", "cpuset.mems"):
            (folder / name).write_text((folder.parent / name).read_text())


def existing() -> list[Path]:
    """The existing cgroups of local clusters, deepest first."""
    return [Path(top) for h in hierarchies() for top, _, _ in os.walk(h / CGROUP, topdown=False)]


def kill(node: str) -> None:
    """Kill all containers of a node at once, as a power cut would."""
    for hierarchy in hierarchies():
        for top, _, _ in os.walk(hierarchy / CGROUP / node):
            with contextlib.suppress(OSError):
                for pid in (Path(top) / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)


def remove(timeout: float = 10.0) -> None:
    """Remove all cgroups, whose processes must have been killed. Errors: StartFailed if some are in use after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while folders := existing():
        for folder in folders:
            with contextlib.suppress(OSError):  # in use: the kernel has not yet removed its last process
                folder.rmdir()
        if time.monotonic() > deadline:
            raise StartFailed(f"cgroups cannot be removed: {', '.join(str(f) for f in folders[:3])}")
        if existing():
            time.sleep(0.02)
