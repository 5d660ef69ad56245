"""The containers' cgroups: one folder per node in every hierarchy, made before and removed after."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from localcluster.errors import StartFailed
from localcluster.layout import CGROUP

ROOT = Path("/sys/fs/cgroup")
SHARE = 4
"""What all containers together weigh against one process of this machine, when cores are short."""


def hierarchies() -> list[Path]:
    """The mounted hierarchies: one with cgroup v2, one per controller with v1."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT]
    return [path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def create(nodes: list[str]) -> None:
    """A cgroup for each node."""
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
        _weigh(ours)


def _weigh(folder: Path) -> None:
    """A new group counts like a single process: pods would starve beside whatever else is at work here."""
    for name, one in (("cpu.weight", 100), ("cpu.shares", 1024)):
        if (folder / name).exists():
            (folder / name).write_text(str(SHARE * one))


def _inherit_cpuset(ours: Path, nodes: list[Path]) -> None:
    """A new v1 cpuset is empty, and nothing can run in it."""
    for folder in [ours, *nodes]:
        for name in ("cpuset.cpus", "cpuset.mems"):
            (folder / name).write_text((folder.parent / name).read_text())


def left() -> list[Path]:
    """Cgroups of ours that exist, deepest first."""
    return [Path(top) for h in hierarchies() for top, _, _ in os.walk(h / CGROUP, topdown=False)]


def kill(node: str) -> None:
    """End all containers of a node at once, as a power cut would."""
    for hierarchy in hierarchies():
        for top, _, _ in os.walk(hierarchy / CGROUP / node):
            with contextlib.suppress(OSError):
                for pid in (Path(top) / "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)


def remove(timeout: float = 10.0) -> None:
    """Remove them all; their processes must be dead or dying. StartFailed if some are still busy after `timeout` s."""
    deadline = time.monotonic() + timeout
    while folders := left():
        for folder in folders:
            with contextlib.suppress(OSError):  # busy: the kernel is not done with its last process
                folder.rmdir()
        if time.monotonic() > deadline:
            raise StartFailed(f"cgroups do not go away: {', '.join(str(f) for f in folders[:3])}")
        if left():
            time.sleep(0.02)
