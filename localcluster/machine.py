"""The namespaces of a cluster with nodes, seen from outside: start them, reach into them, end them, leave nothing.

There is one such cluster per machine, as its cgroups and its cable have fixed names: whoever holds the lock owns them,
the kernel drops the lock with the last process, and whatever still lies around then is garbage.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from localcluster import cgroups, inside, paths, processes
from localcluster.errors import ClusterBusy, NotRunning, StartFailed
from localcluster.layout import HOST_LINK, Node, Plan
from localcluster.processes import Lifetime, Server

LOCK = Path("/run/finetune-localcluster.lock")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Machine:
    """The namespaces of the cluster in `folder`, whether this program started them or an earlier one did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, plan: Plan, lifetime: Lifetime) -> Server:
        """Make the namespaces, the nodes' networks and the cable. The components are started by `start_component`."""
        lock = take_lock(self.folder)
        with lock:
            clean_machine()
            cgroups.create([node.name for node in plan.nodes])
            (self.folder / "plan.json").write_text(plan.dump())
            server = processes.spawn(
                "the nodes' namespaces",
                ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "--propagation", "private", sys.executable, "-m", "localcluster.inside", self.folder],
                owner=self.folder, log=self.folder / "logs" / "machine.log", lifetime=lifetime,
                env={"PATH": PATH, "PYTHONPATH": str(paths.CHECKOUT), "HOME": "/root", "LANG": "C.UTF-8"},
                pass_fds=[lock.fileno()],
            )
        processes.wait_until("the nodes' network", self.answers, servers=[server], timeout=20)
        self._connect(plan)
        return server

    def _connect(self, plan: Plan) -> None:
        run("ip", "link", "add", HOST_LINK, "type", "veth", "peer", "name", "host", "netns", str(self.pid()))
        run("ip", "addr", "add", f"{plan.host_address}/24", "dev", HOST_LINK)
        run("ip", "link", "set", HOST_LINK, "up")
        run("nsenter", "-t", str(self.pid()), "-n", "ip", "link", "set", "host", "master", "lan0", "up")

    def answers(self) -> bool:
        """Whether the first process inside takes requests."""
        try:
            inside.ask(self.folder, "states")
        except OSError:
            return False
        return True

    def ask(self, do: str, **arguments: Any) -> Any:
        """A request to the first process inside. NotRunning if there is none, StartFailed if it refuses."""
        try:
            return inside.ask(self.folder, do, **arguments)
        except OSError:
            raise not_running(self.folder) from None
        except RuntimeError as error:
            raise StartFailed(str(error)) from None

    def start_component(self, name: str, node: Node, argv: list[str]) -> None:
        """Start a component on a node, its output in the cluster's logs."""
        log = self.folder / "logs" / f"{name}.log"
        self.ask("start", name=name, node=node.name, argv=argv, log=str(log))

    def check(self) -> None:
        """StartFailed with the end of its log if a component has ended."""
        for name, code in self.ask("states").items():
            if code is not None:
                raise StartFailed(f"{name} ended with {code}: {processes.tail(self.folder / 'logs' / f'{name}.log')}")

    def is_whole(self, names: Sequence[str]) -> bool:
        """Whether the machine runs and these components with it."""
        try:
            states = inside.ask(self.folder, "states")
        except OSError:
            return False
        return all(name in states and states[name] is None for name in names)

    def pid(self, node: str | None = None) -> int:
        """The pid, on this machine, of a process in a node's namespaces (without one: the first process inside)."""
        number = 1 if node is None else self.ask("holder", node=node)
        for pid in processes.owned_by(self.folder):
            if inner_pid(pid) == number:
                return pid
        raise not_running(self.folder)

    def kill_shims(self, node: str) -> None:
        """End what holds a node's containers while containerd is away."""
        mounts = Path(f"/proc/{self.pid(node)}/ns/mnt").readlink()
        for pid in processes.owned_by(self.folder):
            with contextlib.suppress(OSError):  # it has ended
                shim = Path(f"/proc/{pid}/comm").read_text().startswith("containerd-shim")
                if shim and Path(f"/proc/{pid}/ns/mnt").readlink() == mounts:
                    os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """End everything inside, and remove its cable and cgroups if they are this cluster's."""
        processes.end_all(self.folder)
        try:
            lock = take_lock(self.folder)
        except ClusterBusy:
            return  # another cluster's: nothing on the machine is ours
        with lock:
            clean_machine()


def not_running(folder: Path) -> NotRunning:
    """What to say when a running cluster is needed and there is none."""
    return NotRunning(f"no cluster with nodes is up in {folder}: run `localcluster up --mode node`")


def inner_pid(pid: int) -> int | None:
    """The pid that a process has inside its own PID namespace; None if it has none of its own or has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
    return int(numbers[-1]) if len(numbers) > 1 else None


def take_lock(folder: Path) -> TextIO:
    """The machine's lock. ClusterBusy, naming the cluster that holds it, if another folder's cluster does.

    What this folder's own cluster still holds is waited for (the caller has ended it): a process that is ending can no
    longer be told whose it is, since its memory is gone before its files are.
    """
    lock = LOCK.open("a+")
    try:
        processes.wait_until(f"the end of the cluster in {folder}", lambda: _taken(lock, folder), servers=[], timeout=20)
    except BaseException:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(f"{folder}\n")
    lock.flush()
    os.set_inheritable(lock.fileno(), True)
    return lock


def _taken(lock: TextIO, folder: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        if (holder := lock.read().strip()) == str(folder):
            return False
        raise ClusterBusy(
            f"a cluster with nodes is up already, one per machine is possible: end it with "
            f"`localcluster down --state {holder}`"
        ) from None
    return True


def clean_machine() -> None:
    """Remove the cable and the cgroups. Only for the holder of the lock."""
    link = Path(f"/sys/class/net/{HOST_LINK}")
    if link.exists():
        # The kernel may be removing it at this moment, with the namespace that its other end was in.
        subprocess.run(["ip", "link", "del", HOST_LINK], capture_output=True)
        processes.wait_until(f"the end of {HOST_LINK}", lambda: not link.exists(), servers=[], timeout=10)
    cgroups.remove()


def run(*argv: str) -> None:
    """Run a command; StartFailed with its words if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise StartFailed(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
