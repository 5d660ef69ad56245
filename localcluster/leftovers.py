"""Find the processes, namespaces, mounts, links and cgroups of a cluster. After its end there must be none."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from localcluster import cgroups, processes
from localcluster.layout import HOST_LINK
from localcluster.machine import inner_pid

KINDS = ("net", "mnt", "pid")


@dataclass(frozen=True)
class Leftovers:
    """What was found, by name."""

    processes: tuple[str, ...]
    namespaces: tuple[str, ...]
    mounts: tuple[str, ...]
    links: tuple[str, ...]
    cgroups: tuple[str, ...]


NOTHING = Leftovers((), (), (), (), ())


def namespaces_of(state_dir: Path) -> frozenset[str]:
    """The namespaces of a running cluster's processes, without those of this process."""
    found = set()
    for pid in processes.owned_by(state_dir):
        if inner_pid(pid) is not None:
            found.update(_namespaces(pid))
    return frozenset(found - _namespaces(os.getpid()))


def find(state_dir: Path, namespaces: frozenset[str] = frozenset()) -> Leftovers:
    """Find what belongs to the cluster in `state_dir`, whose namespaces were `namespaces` while it ran.

    A process belongs to it if the cluster has started it or if it is in one of these namespaces, as are the processes of containers.
    """
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and processes.start_time(int(p.name))]
    namespaces_by_pid = {pid: _namespaces(pid) & namespaces for pid in pids}
    owned = set(processes.owned_by(state_dir)) | {pid for pid, inside in namespaces_by_pid.items() if inside}
    return Leftovers(
        processes=tuple(sorted(f"{pid} {_command(pid)}" for pid in owned)),
        namespaces=tuple(sorted({name for inside in namespaces_by_pid.values() for name in inside})),
        mounts=tuple(line for line in mounts if str(state_dir) in line or "/run/finetune/" in line),
        links=tuple(p.name for p in Path("/sys/class/net").iterdir() if p.name == HOST_LINK),
        cgroups=tuple(str(p) for p in cgroups.existing()),
    )


def _namespaces(pid: int) -> set[str]:
    found = set()
    for kind in KINDS:
        with contextlib.suppress(OSError):  # it has ended or is a zombie
            found.add(str(Path(f"/proc/{pid}/ns/{kind}").readlink()))
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    return "?"
