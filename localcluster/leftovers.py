"""Find the processes, namespaces, mounts, network links and cgroups that a cluster has left behind."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from localcluster import cgroups, processes
from localcluster.layout import HOST_LINK
from localcluster.machine import pid_in_namespace

KINDS = ("net", "mnt", "pid")


@dataclass(frozen=True)
class Leftovers:
    """Names of the leftovers, by kind."""

    processes: tuple[str, ...]
    namespaces: tuple[str, ...]
    mounts: tuple[str, ...]
    links: tuple[str, ...]
    cgroups: tuple[str, ...]


NOTHING = Leftovers((), (), (), (), ())


def namespaces_of(state_dir: Path) -> frozenset[str]:
    """List the namespaces of a running cluster's processes, except the namespaces of this process."""
    namespaces = set()
    for pid in processes.owned_by(state_dir):
        if pid_in_namespace(pid) is not None:
            namespaces.update(_namespaces(pid))
    return frozenset(namespaces - _namespaces(os.getpid()))


def find(state_dir: Path, namespaces: frozenset[str] = frozenset()) -> Leftovers:
    """Find everything that belongs to the cluster in `state_dir`. `namespaces` is the result of `namespaces_of` while the cluster was running.

    A process belongs to the cluster if the cluster has started it, or if it runs in one of `namespaces`, like the processes of containers.
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
    namespaces = set()
    for kind in KINDS:
        with contextlib.suppress(OSError):  # the process has ended or is a zombie
            namespaces.add(str(Path(f"/proc/{pid}/ns/{kind}").readlink()))
    return namespaces


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    return "?"
