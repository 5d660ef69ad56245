"""Create and remove the cgroups that hold the containers: one for each node in each cgroup hierarchy."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from localcluster.errors import StartFailed
from localcluster.layout import PARENT_CGROUP

CGROUP_ROOT = Path("/sys/fs/cgroup")
CPU_WEIGHT_FACTOR = 4
"""CPU weight of the cgroup that holds all containers, as a multiple of the default weight of a cgroup."""


def list_hierarchies() -> list[Path]:
    """List the mounted cgroup hierarchies: cgroup v2 has a single hierarchy, cgroup v1 has one per controller."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return [CGROUP_ROOT]
    return [path for path in CGROUP_ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def create_cgroups(node_names: list[str]) -> None:
    """Create a cgroup for each node."""
    for hierarchy in list_hierarchies():
        parent_cgroup = hierarchy / PARENT_CGROUP
        for node in node_names:
            (parent_cgroup / node).mkdir(parents=True, exist_ok=True)
        if hierarchy == CGROUP_ROOT:
            for folder in (CGROUP_ROOT, parent_cgroup):
                controller_names = (folder / "cgroup.controllers").read_text().split()
                (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controller_names))
        elif (parent_cgroup / "cpuset.cpus").exists():
            _inherit_cpuset(parent_cgroup, [parent_cgroup / node for node in node_names])
        _raise_cpu_weight(parent_cgroup)


def _raise_cpu_weight(cgroup: Path) -> None:
    """Raise the CPU weight of a cgroup. With the default weight, all pods together would get only as much CPU time as one other cgroup."""
    for name, default_weight in (("cpu.weight", 100), ("cpu.shares", 1024)):
        if (cgroup / name).exists():
            (cgroup / name).write_text(str(CPU_WEIGHT_FACTOR * default_weight))


def _inherit_cpuset(parent_cgroup: Path, node_cgroups: list[Path]) -> None:
    """Give each cgroup the cpuset of its parent. In cgroup v1, the cpuset of a new cgroup is empty, so no process can run in the cgroup."""
    for cgroup in [parent_cgroup, *node_cgroups]:
        for name in ("cpuset.cpus", "cpuset.mems"):
            (cgroup / name).write_text((cgroup.parent / name).read_text())


def list_cgroups() -> list[Path]:
    """List the existing cgroups of local clusters, deepest first."""
    return [Path(cgroup_path) for hierarchy in list_hierarchies() for cgroup_path, _, _ in os.walk(hierarchy / PARENT_CGROUP, topdown=False)]


def kill_node(node_name: str) -> None:
    """Kill all containers of a node at once, as a power cut would."""
    for hierarchy in list_hierarchies():
        for cgroup_path, _, _ in os.walk(hierarchy / PARENT_CGROUP / node_name):
            with contextlib.suppress(OSError):
                for pid in (Path(cgroup_path) / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)


def remove_cgroups(timeout_seconds: float = 10.0) -> None:
    """Remove the cgroups of all local clusters. The caller must kill their processes first.

    Errors: StartFailed if a cgroup is still in use after `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    while remaining_cgroups := list_cgroups():
        for cgroup in remaining_cgroups:
            with contextlib.suppress(OSError):  # still in use: the kernel has not yet removed the last killed process
                cgroup.rmdir()
        if time.monotonic() > deadline:
            raise StartFailed(f"cgroups cannot be removed: {', '.join(str(f) for f in remaining_cgroups[:3])}")
        if list_cgroups():
            time.sleep(0.02)
