"""Count what a cluster has on the machine: processes, namespaces, mounts, links, cgroups. After its end: nothing."""

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
class Census:
    """What was found, by name; empty tuples mean that nothing is left."""

    processes: tuple[str, ...]
    namespaces: tuple[str, ...]
    mounts: tuple[str, ...]
    links: tuple[str, ...]
    cgroups: tuple[str, ...]


NOTHING = Census((), (), (), (), ())


def namespaces_of(state_dir: Path) -> frozenset[str]:
    """The namespaces that a running cluster's processes are in and this program is not."""
    found = set()
    for pid in processes.owned_by(state_dir):
        if inner_pid(pid) is not None:
            found.update(_namespaces(pid))
    return frozenset(found - _namespaces(os.getpid()))


def take(state_dir: Path, namespaces: frozenset[str] = frozenset()) -> Census:
    """Count what belongs to the cluster in `state_dir`; `namespaces` are those it had while it ran.

    A process counts if it was started by the cluster, runs below its folder, or is in one of its namespaces, as every
    process of every container is.
    """
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and processes.born(int(p.name))]
    inhabited = {pid: _namespaces(pid) & namespaces for pid in pids}
    owned = set(processes.owned_by(state_dir)) | {pid for pid, inside in inhabited.items() if inside}
    return Census(
        processes=tuple(sorted(f"{pid} {_command(pid)}" for pid in owned)),
        namespaces=tuple(sorted({name for inside in inhabited.values() for name in inside})),
        mounts=tuple(line for line in mounts if str(state_dir) in line or "/run/finetune/" in line),
        links=tuple(p.name for p in Path("/sys/class/net").iterdir() if p.name == HOST_LINK),
        cgroups=tuple(str(p) for p in cgroups.left()),
    )


def _namespaces(pid: int) -> set[str]:
    found = set()
    for kind in KINDS:
        with contextlib.suppress(OSError):  # it has ended, or is a zombie
            found.add(str(Path(f"/proc/{pid}/ns/{kind}").readlink()))
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    return "?"
