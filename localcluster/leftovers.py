"""Find the processes, Linux namespaces, mounts, network links and cgroups that a cluster has left behind."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from localcluster import cgroups, processes
from localcluster.layout import HOST_LINK
from localcluster.machine import read_pid_in_namespace

LINUX_NAMESPACE_KINDS = ("net", "mnt", "pid")


@dataclass(frozen=True)
class Leftovers:
    """What a cluster has left behind, with one tuple of names for each kind of thing."""

    processes: tuple[str, ...]
    namespaces: tuple[str, ...]
    mounts: tuple[str, ...]
    links: tuple[str, ...]
    cgroups: tuple[str, ...]


NO_LEFTOVERS = Leftovers((), (), (), (), ())


def list_linux_namespaces(state_dir: Path) -> frozenset[str]:
    """List the Linux namespaces of a running cluster's processes, except the namespaces of this process."""
    namespace_names = set()
    for pid in processes.list_owned_pids(state_dir):
        if read_pid_in_namespace(pid) is not None:
            namespace_names.update(_list_namespaces_of_process(pid))
    return frozenset(namespace_names - _list_namespaces_of_process(os.getpid()))


def find_leftovers(state_dir: Path, linux_namespaces: frozenset[str] = frozenset()) -> Leftovers:
    """Find everything that belongs to the cluster in `state_dir`. `linux_namespaces` is the result of `list_linux_namespaces` while the cluster was running.

    A process belongs to the cluster if the cluster has started it, or if it runs in one of `linux_namespaces`, as the processes of containers do.
    """
    mount_lines = Path("/proc/self/mountinfo").read_text().splitlines()
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and processes.read_start_time(int(p.name))]
    namespaces_by_pid = {pid: _list_namespaces_of_process(pid) & linux_namespaces for pid in pids}
    owned_pids = set(processes.list_owned_pids(state_dir)) | {pid for pid, namespaces_of_process in namespaces_by_pid.items() if namespaces_of_process}
    return Leftovers(
        processes=tuple(sorted(f"{pid} {_read_command_line(pid)}" for pid in owned_pids)),
        namespaces=tuple(sorted({name for namespaces_of_process in namespaces_by_pid.values() for name in namespaces_of_process})),
        mounts=tuple(line for line in mount_lines if str(state_dir) in line or "/run/finetune/" in line),
        links=tuple(p.name for p in Path("/sys/class/net").iterdir() if p.name == HOST_LINK),
        cgroups=tuple(str(p) for p in cgroups.list_cgroups()),
    )


def _list_namespaces_of_process(pid: int) -> set[str]:
    namespace_names = set()
    for kind in LINUX_NAMESPACE_KINDS:
        with contextlib.suppress(OSError):  # ignore a process that has ended or is a zombie
            namespace_names.add(str(Path(f"/proc/{pid}/ns/{kind}").readlink()))
    return namespace_names


def _read_command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    return "?"
