"""Create, use and remove the Linux namespaces of a cluster with nodes, from outside these namespaces.

Only one cluster with nodes can run per machine, because its cgroups and its veth pair have fixed names. A file lock protects the cgroups and the
veth pair. The cluster's processes hold the lock; when the last process ends, the kernel releases the lock. While the lock is free, all
existing cgroups and links are leftovers and can be removed.
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

from localcluster import cgroups, namespace_init, paths, processes
from localcluster.errors import ClusterBusy, NotRunning, StartFailed
from localcluster.layout import HOST_LINK, Node, Plan
from localcluster.processes import Lifetime, Server

LOCK_FILE = Path("/run/finetune-localcluster.lock")
PROGRAM_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Machine:
    """Manages the Linux namespaces of the cluster in `folder`. This program or an earlier one may have started the cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, plan: Plan, lifetime: Lifetime) -> Server:
        """Create the Linux namespaces, the nodes' networks and the veth pair to this machine. This method starts no components."""
        lock = take_lock(self.folder)
        with lock:
            clean_machine()
            cgroups.create_cgroups([node.name for node in plan.nodes])
            (self.folder / "plan.json").write_text(plan.dump())
            server = processes.spawn(
                "the nodes' namespaces",
                ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "--propagation", "private", sys.executable, "-m", "localcluster.namespace_init", self.folder],
                owner=self.folder, log=self.folder / "logs" / "machine.log", lifetime=lifetime,
                env={"PATH": PROGRAM_SEARCH_PATH, "PYTHONPATH": str(paths.CHECKOUT_FOLDER), "HOME": "/root", "LANG": "C.UTF-8"},
                pass_fds=[lock.fileno()],
            )
        processes.wait_until("the nodes' network", self.is_responding, servers=[server], timeout=20)
        self._connect_network(plan)
        return server

    def _connect_network(self, plan: Plan) -> None:
        run("ip", "link", "add", HOST_LINK, "type", "veth", "peer", "name", "host", "netns", str(self.find_pid()))
        run("ip", "addr", "add", f"{plan.host_address}/24", "dev", HOST_LINK)
        run("ip", "link", "set", HOST_LINK, "up")
        run("nsenter", "-t", str(self.find_pid()), "-n", "ip", "link", "set", "host", "master", "lan0", "up")

    def is_responding(self) -> bool:
        """Whether the first process inside the Linux namespaces answers requests."""
        try:
            namespace_init.send_request(self.folder, "get_exit_codes")
        except OSError:
            return False
        return True

    def request(self, method: str, **arguments: Any) -> Any:
        """Send a request to the first process inside the Linux namespaces.

        Errors: NotRunning if this process does not exist, StartFailed if the request fails.
        """
        try:
            return namespace_init.send_request(self.folder, method, **arguments)
        except OSError:
            raise make_not_running_error(self.folder) from None
        except RuntimeError as error:
            raise StartFailed(str(error)) from None

    def start_component(self, name: str, node: Node, argv: list[str]) -> None:
        """Start a component on a node. The component's output goes to the cluster's log folder."""
        log_file = self.folder / "logs" / f"{name}.log"
        self.request("start", name=name, node=node.name, argv=argv, log=str(log_file))

    def check_components(self) -> None:
        """Check that no component has exited. Errors: StartFailed with the end of the component's log."""
        for name, exit_code in self.request("get_exit_codes").items():
            if exit_code is not None:
                raise StartFailed(f"{name} exited with {exit_code}: {processes.join_last_lines(self.folder / 'logs' / f'{name}.log')}")

    def is_running(self, names: Sequence[str]) -> bool:
        """Whether the Linux namespaces exist and all components in `names` are running."""
        try:
            exit_codes = namespace_init.send_request(self.folder, "get_exit_codes")
        except OSError:
            return False
        return all(name in exit_codes and exit_codes[name] is None for name in names)

    def find_pid(self, node: str | None = None) -> int:
        """Return the pid on this machine of a process in the Linux namespaces of `node`, or of the cluster's first process if `node` is None."""
        namespace_pid = 1 if node is None else self.request("get_holder_pid", node=node)
        for pid in processes.list_owned_pids(self.folder):
            if read_pid_in_namespace(pid) == namespace_pid:
                return pid
        raise make_not_running_error(self.folder)

    def kill_shims(self, node: str) -> None:
        """Kill the containerd shims of a node. Otherwise containers would keep running after containerd has been killed."""
        mount_namespace = Path(f"/proc/{self.find_pid(node)}/ns/mnt").readlink()
        for pid in processes.list_owned_pids(self.folder):
            with contextlib.suppress(OSError):  # ignore a process that has ended
                is_shim = Path(f"/proc/{pid}/comm").read_text().startswith("containerd-shim")
                if is_shim and Path(f"/proc/{pid}/ns/mnt").readlink() == mount_namespace:
                    os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill all processes of the cluster. Remove the veth pair and the cgroups unless another cluster is using them."""
        processes.end_owned_processes(self.folder)
        try:
            lock = take_lock(self.folder)
        except ClusterBusy:
            return  # another cluster is running and owns the link and the cgroups
        with lock:
            clean_machine()


def make_not_running_error(folder: Path) -> NotRunning:
    """Create the error for a command that needs a running cluster with nodes."""
    return NotRunning(f"no cluster with nodes is running in {folder}: run `localcluster up --mode node`")


def read_pid_in_namespace(pid: int) -> int | None:
    """Return the pid of a process inside its PID namespace; None if the process has ended, or is in the same PID namespace as this program."""
    try:
        status_text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    namespace_pids = next(line for line in status_text.splitlines() if line.startswith("NSpid:")).split()[1:]
    return int(namespace_pids[-1]) if len(namespace_pids) > 1 else None


def take_lock(folder: Path) -> TextIO:
    """Take the lock that allows one cluster with nodes per machine.

    Errors: ClusterBusy if another cluster holds the lock; the message names the state folder of this cluster.

    If the cluster in `folder` holds the lock, wait for the lock: the caller has killed the cluster's processes, but some may still be
    exiting. `processes.list_owned_pids` does not find an exiting process, because the kernel frees the environment of the process before it closes the
    lock file.
    """
    lock = LOCK_FILE.open("a+")
    try:
        processes.wait_until(f"the end of the cluster in {folder}", lambda: _try_lock(lock, folder), servers=[], timeout=20)
    except BaseException:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(f"{folder}\n")
    lock.flush()
    os.set_inheritable(lock.fileno(), True)
    return lock


def _try_lock(lock: TextIO, folder: Path) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        if (holder_folder := lock.read().strip()) == str(folder):
            return False
        raise ClusterBusy(
            f"another cluster with nodes is running, but only one can run per machine: stop it with "
            f"`localcluster down --state {holder_folder}`"
        ) from None
    return True


def clean_machine() -> None:
    """Remove the veth pair and the cgroups. The caller must hold the lock from `take_lock`."""
    link_path = Path(f"/sys/class/net/{HOST_LINK}")
    if link_path.exists():
        # Ignore errors: when the namespace of the peer device ends, the kernel removes the link, possibly at the same time.
        subprocess.run(["ip", "link", "del", HOST_LINK], capture_output=True)
        processes.wait_until(f"the end of {HOST_LINK}", lambda: not link_path.exists(), servers=[], timeout=10)
    cgroups.remove_cgroups()


def run(*argv: str) -> None:
    """Run a command. Errors: StartFailed with the error output of the command, if the command fails."""
    completed_process = subprocess.run(argv, capture_output=True, text=True)
    if completed_process.returncode != 0:
        raise StartFailed(f"`{' '.join(argv)}` failed: {completed_process.stderr.strip()}")
