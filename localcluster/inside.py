"""The first process inside a cluster's namespaces: it is the machine that the nodes run on.

Runs as PID 1 of new PID, mount and network namespaces. It lays the cables, gives each node a private /run and
/var/lib, starts and ends components when told to over a socket, reaps orphans, and takes everything along when it
ends: the kernel kills all processes of the PID namespace, and mounts, links and addresses go with the last of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localcluster.components import SERVICE_CIDR
from localcluster.layout import Node, Plan

CONTROL = "control.sock"
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
PRIVATE = ("/run", "/var/log", "/var/lib/cni", "/var/lib/kubelet")
"""Folders that components of a node write to under fixed names: each node has its own, in memory."""
SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
"""The kubelet sets these for the whole machine; it gets files of its own instead."""


def call(*argv: str) -> None:
    """Run a command of the set-up; its output goes to our log, a failure ends us."""
    subprocess.run(argv, check=True)


def mount_private(folder: Path, dns: str) -> None:
    """The node's private folders, its sysctl files, and a resolver that knows the cluster alone."""
    for path in PRIVATE:
        Path(path).mkdir(parents=True, exist_ok=True)
        call("mount", "-t", "tmpfs", "tmpfs", path)
    Path("/run/finetune").mkdir()
    files = folder / "sysctl"
    files.mkdir(parents=True, exist_ok=True)
    for name, value in SYSCTLS.items():
        own = files / name.replace("/", ".")
        own.write_text(value + "\n")
        call("mount", "--bind", str(own), f"/proc/sys/{name}")
    resolver = files / "resolv.conf"
    resolver.write_text(f"nameserver {dns}\noptions timeout:1 attempts:1\n")
    if Path("/etc/resolv.conf").exists():
        call("mount", "--bind", str(resolver), "/etc/resolv.conf")


def write_sysctl(name: str, value: str) -> None:
    """A sysctl of this network namespace."""
    Path("/proc/sys", name).write_text(value)


def set_up_first_node(plan: Plan) -> None:
    """The bridge that all nodes and the machine hang on, and the first node's addresses."""
    first = plan.nodes[0]
    call("ip", "link", "set", "lo", "up")
    call("ip", "link", "add", "lan0", "type", "bridge")
    call("ip", "addr", "add", f"{first.address}/24", "dev", "lan0")
    call("ip", "link", "set", "lan0", "up")
    for other in plan.nodes[1:]:
        call("ip", "route", "add", other.pod_cidr, "via", other.address)
    finish_network("lan0")


def finish_network(device: str) -> None:
    """What every node needs: forwarding, and a way for its own processes to service addresses."""
    call("ip", "route", "add", SERVICE_CIDR, "dev", device)
    write_sysctl("net/ipv4/ip_forward", "1")
    with contextlib.suppress(FileNotFoundError):  # built without bridge filtering: services between neighbours only
        write_sysctl("net/bridge/bridge-nf-call-iptables", "1")


def set_up_other_node(node: Node, plan: Plan) -> None:
    """Runs in the node's own namespaces, with the cable's end in place."""
    call("ip", "link", "set", "lo", "up")
    call("ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
    call("ip", "link", "set", "eth0", "up")
    for other in plan.nodes:
        if other != node:
            call("ip", "route", "add", other.pod_cidr, "via", other.address)
    finish_network("eth0")
    mount_private(node.folder, plan.api_address)


def fork_node(node: Node, plan: Plan) -> int:
    """A process that holds another node's network and mount namespaces. Returns its pid."""
    made_read, made_write = os.pipe()
    wired_read, wired_write = os.pipe()
    done_read, done_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            unshare(_CLONE_NEWNET | _CLONE_NEWNS)
            os.write(made_write, b"1")
            os.read(wired_read, 1)
            set_up_other_node(node, plan)
            os.write(done_write, b"1")
            os.close(done_write)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    for end in (made_write, wired_read, done_write):
        os.close(end)
    os.read(made_read, 1)
    call("ip", "link", "add", node.name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    call("ip", "link", "set", node.name, "master", "lan0", "up")
    os.write(wired_write, b"1")
    if os.read(done_read, 1) != b"1":
        raise RuntimeError(f"the network of {node.name} could not be set up")
    for end in (made_read, wired_write, done_read):
        os.close(end)
    return pid


def unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def enter(pid: int) -> None:
    """Join the mount and network namespaces of `pid`; only between fork and exec."""
    for kind in ("mnt", "net"):
        handle = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        if _libc.setns(handle, 0) != 0:
            os._exit(126)
        os.close(handle)


@dataclass
class Component:
    """A process that was started on request. `code` is None while it runs."""

    pid: int
    code: int | None = None


@dataclass
class Machine:
    """The requests that the socket answers, and the processes that they started."""

    plan: Plan
    holders: dict[str, int]
    components: dict[str, Component] = field(default_factory=dict)

    def start(self, name: str, node: str, argv: list[str], log: str) -> int:
        """Start a component on a node. Refused while one of that name runs."""
        current = self.components.get(name)
        if current and current.code is None:
            raise ValueError(f"{name} is running")
        holder = self.holders.get(node)
        with Path(log).open("ab") as out:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=(lambda: enter(holder)) if holder else None,
            )
        process.returncode = 0  # the reaper below is the one that waits
        self.components[name] = Component(process.pid)
        return process.pid

    def kill(self, name: str, number: int) -> None:
        """Send a signal to a component; nothing if it has ended."""
        component = self.components[name]
        if component.code is None:
            os.kill(component.pid, number)

    def holder(self, node: str) -> int:
        """A process in the node's namespaces, by its number inside."""
        return self.holders.get(node, 1)

    def states(self) -> dict[str, int | None]:
        """Exit code by component, None for those that run."""
        return {name: component.code for name, component in self.components.items()}

    def reap(self) -> None:
        """Take note of everything that has ended, orphans of containers included."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                for component in self.components.values():
                    if component.pid == pid:
                        component.code = os.waitstatus_to_exitcode(status)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            result = getattr(self, request.pop("do"))(**request)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"result": result}


def serve(machine: Machine) -> None:
    """Answer one request a connection, and reap, for ever."""
    wake_read, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = listen(machine.plan.folder)
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(wake_read, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is wake_read:
                    wake_read.recv(4096)
                    machine.reap()
                else:
                    with contextlib.suppress(OSError):  # whoever asked has gone
                        answer_one(listener, machine)


def answer_one(listener: socket.socket, machine: Machine) -> None:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw") as stream:
        connection.settimeout(5)
        machine.reap()
        stream.write(json.dumps(machine.answer(json.loads(stream.readline()))) + "\n")


@contextlib.contextmanager
def short_path(folder: Path, name: str) -> Iterator[str]:
    """A path to a socket in `folder` that fits the kernel's 107 characters, however deep the folder lies."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{name}"
    finally:
        os.close(handle)


def listen(folder: Path) -> socket.socket:
    (folder / CONTROL).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_path(folder, CONTROL) as path:
        listener.bind(path)
    (folder / CONTROL).chmod(0o600)
    listener.listen(16)
    return listener


def ask(folder: Path, do: str, **arguments: Any) -> Any:
    """Used from outside: one request to the cluster in `folder`. RuntimeError with its words if it is refused."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        with short_path(folder, CONTROL) as path:
            connection.connect(path)
        with connection.makefile("rw") as stream:
            stream.write(json.dumps({"do": do, **arguments}) + "\n")
            stream.flush()
            answer = json.loads(stream.readline())
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]


def main() -> None:
    """PID 1: the cluster's folder is the one argument."""
    plan = Plan.load((Path(sys.argv[1]) / "plan.json").read_text())
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    set_up_first_node(plan)
    mount_private(plan.nodes[0].folder, plan.api_address)
    holders = {node.name: fork_node(node, plan) for node in plan.nodes[1:]}
    serve(Machine(plan, holders))


if __name__ == "__main__":
    main()
