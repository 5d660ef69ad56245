"""Create and remove the cgroups of the containers: in each cgroup hierarchy, every node has one cgroup."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from localcluster.errors import StartFailed
from localcluster.layout import CGROUP

ROOT = Path("/sys/fs/cgroup")
CPU_WEIGHT_FACTOR = 4
"""CPU weight of the cgroup that holds all containers, as a multiple of the default weight of a cgroup."""


def hierarchies() -> list[Path]:
    """List the mounted cgroup hierarchies: cgroup v2 has a single hierarchy, cgroup v1 has one per controller."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def create(nodes: list[str]) -> None:
    """Create a cgroup for each node."""
    for hierarchy in hierarchies():
        parent = hierarchy / CGROUP
        for node in nodes:
            (parent / node).mkdir(parents=True, exist_ok=True)
        if hierarchy == ROOT:
            for folder in (ROOT, parent):
                names = (folder / "cgroup.controllers").read_text().split()
                (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in names))
        elif (parent / "cpuset.cpus").exists():
            _inherit_cpuset(parent, [parent / node for node in nodes])
        _set_weight(parent)


def _set_weight(folder: Path) -> None:
    """Raise the CPU weight. With the default weight, all pods together would get only as much CPU time as one other cgroup."""
    for name, default_weight in (("cpu.weight", 100), ("cpu.shares", 1024)):
        if (folder / name).exists():
            (folder / name).write_text(str(CPU_WEIGHT_FACTOR * default_weight))


def _inherit_cpuset(parent: Path, nodes: list[Path]) -> None:
    """Copy the cpuset from each cgroup's parent. In cgroup v1 a new cpuset is empty, and no process can run in it."""
    for folder in [parent, *nodes]:
        for name in ("cpuset.cpus", "cpuset.mems"):
            (folder / name).write_text((folder.parent / name).read_text())


def existing() -> list[Path]:
    """List the existing cgroups of local clusters, deepest first."""
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
    """Remove all cgroups. The caller must have killed their processes. Errors: StartFailed if a cgroup is still in use after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while folders := existing():
        for folder in folders:
            with contextlib.suppress(OSError):  # still in use: the kernel has not yet removed the last killed process
                folder.rmdir()
        if time.monotonic() > deadline:
            raise StartFailed(f"cgroups cannot be removed: {', '.join(str(f) for f in folders[:3])}")
        if existing():
            time.sleep(0.02)
