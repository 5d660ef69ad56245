"""Run as the first process (PID 1) inside a cluster's PID, mount and network namespaces.

This process sets up the nodes' networks and gives each node a private /run and /var/lib/kubelet. Over a socket, it accepts requests to start components and
to send signals to them. It also reaps orphans. When this process ends, the kernel kills all processes of the PID namespace and removes their mounts and
links.
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

CONTROL_SOCKET = "control.sock"
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
PRIVATE_FOLDERS = ("/run", "/var/log", "/var/lib/cni", "/var/lib/kubelet")
"""Folders whose paths are hard-coded in the components. On each node, a private tmpfs is mounted over each of these folders."""
PROTECTED_SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}
"""Sysctls that the kubelet would change for the whole machine. Regular files are mounted over these sysctls, so that the machine's values do not change.
"""


def run_setup_command(*argv: str) -> None:
    """Run a setup command. Errors: CalledProcessError, which ends this process."""
    subprocess.run(argv, check=True)


def mount_private_folders(folder: Path, dns_address: str) -> None:
    """Mount the node's private folders, the files over `PROTECTED_SYSCTLS`, and a resolv.conf that names only the cluster's DNS server."""
    for path in PRIVATE_FOLDERS:
        Path(path).mkdir(parents=True, exist_ok=True)
        run_setup_command("mount", "-t", "tmpfs", "tmpfs", path)
    Path("/run/finetune").mkdir()
    sysctl_folder = folder / "sysctl"
    sysctl_folder.mkdir(parents=True, exist_ok=True)
    for name, value in PROTECTED_SYSCTLS.items():
        sysctl_file = sysctl_folder / name.replace("/", ".")
        sysctl_file.write_text(value + "\n")
        run_setup_command("mount", "--bind", str(sysctl_file), f"/proc/sys/{name}")
    resolv_conf = sysctl_folder / "resolv.conf"
    resolv_conf.write_text(f"nameserver {dns_address}\noptions timeout:1 attempts:1\n")
    if Path("/etc/resolv.conf").exists():
        run_setup_command("mount", "--bind", str(resolv_conf), "/etc/resolv.conf")


def write_sysctl(name: str, value: str) -> None:
    """Set a sysctl of this network namespace."""
    Path("/proc/sys", name).write_text(value)


def set_up_first_node(plan: Plan) -> None:
    """Create the bridge that connects all nodes and this machine, and give it the first node's address."""
    first_node = plan.nodes[0]
    run_setup_command("ip", "link", "set", "lo", "up")
    run_setup_command("ip", "link", "add", "lan0", "type", "bridge")
    run_setup_command("ip", "addr", "add", f"{first_node.address}/24", "dev", "lan0")
    run_setup_command("ip", "link", "set", "lan0", "up")
    for other_node in plan.nodes[1:]:
        run_setup_command("ip", "route", "add", other_node.pod_cidr, "via", other_node.address)
    enable_forwarding("lan0")


def enable_forwarding(device: str) -> None:
    """Enable IP forwarding, and route service addresses to `device`, so that the node's own processes can reach services."""
    run_setup_command("ip", "route", "add", SERVICE_CIDR, "dev", device)
    write_sysctl("net/ipv4/ip_forward", "1")
    with contextlib.suppress(FileNotFoundError):  # the kernel has no bridge filtering: pods cannot use a service whose backend is on their own node
        write_sysctl("net/bridge/bridge-nf-call-iptables", "1")


def set_up_other_node(node: Node, plan: Plan) -> None:
    """Set up a node other than the first one. The caller must run inside the node's Linux namespaces, and must create the node's veth device first."""
    run_setup_command("ip", "link", "set", "lo", "up")
    run_setup_command("ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
    run_setup_command("ip", "link", "set", "eth0", "up")
    for other_node in plan.nodes:
        if other_node != node:
            run_setup_command("ip", "route", "add", other_node.pod_cidr, "via", other_node.address)
    enable_forwarding("eth0")
    mount_private_folders(node.folder, plan.api_address)


def fork_node(node: Node, plan: Plan) -> int:
    """Start a process that creates the network and mount namespaces of a node and keeps them alive. Returns its pid."""
    namespaces_created_read_fd, namespaces_created_write_fd = os.pipe()
    device_connected_read_fd, device_connected_write_fd = os.pipe()
    network_ready_read_fd, network_ready_write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            unshare(_CLONE_NEWNET | _CLONE_NEWNS)
            os.write(namespaces_created_write_fd, b"1")
            os.read(device_connected_read_fd, 1)
            set_up_other_node(node, plan)
            os.write(network_ready_write_fd, b"1")
            os.close(network_ready_write_fd)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    for fd in (namespaces_created_write_fd, device_connected_read_fd, network_ready_write_fd):
        os.close(fd)
    os.read(namespaces_created_read_fd, 1)
    run_setup_command("ip", "link", "add", node.name, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    run_setup_command("ip", "link", "set", node.name, "master", "lan0", "up")
    os.write(device_connected_write_fd, b"1")
    if os.read(network_ready_read_fd, 1) != b"1":
        raise RuntimeError(f"the network of {node.name} could not be set up")
    for fd in (namespaces_created_read_fd, device_connected_write_fd, network_ready_read_fd):
        os.close(fd)
    return pid


def unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def enter_namespaces(pid: int) -> None:
    """Join the mount and network namespaces of process `pid`. Popen calls this function between fork and exec."""
    for kind in ("mnt", "net"):
        namespace_fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        if _libc.setns(namespace_fd, 0) != 0:
            os._exit(126)
        os.close(namespace_fd)


@dataclass
class Component:
    """A process that a request has started. `exit_code` is None while the process runs."""

    pid: int
    exit_code: int | None = None


@dataclass
class ComponentManager:
    """Runs the method that each request asks for. A request can ask for any public method except `reap` and `handle_request`."""

    plan: Plan
    holder_pid_by_node: dict[str, int]
    component_by_name: dict[str, Component] = field(default_factory=dict)

    def start(self, name: str, node: str, argv: list[str], log: str) -> int:
        """Start a component on a node. Returns its pid. Errors: ValueError if a component of this name is running."""
        existing_component = self.component_by_name.get(name)
        if existing_component and existing_component.exit_code is None:
            raise ValueError(f"{name} is running")
        holder_pid = self.holder_pid_by_node.get(node)
        with Path(log).open("ab") as out:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=(lambda: enter_namespaces(holder_pid)) if holder_pid else None,
            )
        process.returncode = 0  # prevents Popen from waiting for the process, because `reap` collects the exit code
        self.component_by_name[name] = Component(process.pid)
        return process.pid

    def kill(self, name: str, signal_number: int) -> None:
        """Send a signal to a component, unless it has ended."""
        component = self.component_by_name[name]
        if component.exit_code is None:
            os.kill(component.pid, signal_number)

    def get_holder_pid(self, node: str) -> int:
        """Return the pid (in the cluster's PID namespace) of the process that keeps the node's Linux namespaces alive."""
        return self.holder_pid_by_node.get(node, 1)

    def get_exit_codes(self) -> dict[str, int | None]:
        """Return the exit code of each component; None while the component runs."""
        return {name: component.exit_code for name, component in self.component_by_name.items()}

    def reap(self) -> None:
        """Collect the exit codes of all ended processes, including orphans of containers."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                for component in self.component_by_name.values():
                    if component.pid == pid:
                        component.exit_code = os.waitstatus_to_exitcode(status)

    def handle_request(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            result = getattr(self, request.pop("method"))(**request)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"result": result}


def serve_requests(manager: ComponentManager) -> None:
    """Serve one request per connection and reap ended processes, until this process is killed."""
    wake_read, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = open_control_socket(manager.plan.folder)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is wake_read:
                    wake_read.recv(4096)
                    manager.reap()
                else:
                    with contextlib.suppress(OSError):  # the client has closed the connection
                        serve_connection(listener, manager)


def serve_connection(listener: socket.socket, manager: ComponentManager) -> None:
    connection, _ = listener.accept()
    with connection, connection.makefile("rw") as stream:
        connection.settimeout(5)
        manager.reap()
        stream.write(json.dumps(manager.handle_request(json.loads(stream.readline()))) + "\n")


@contextlib.contextmanager
def open_short_path(folder: Path, name: str) -> Iterator[str]:
    """Yield a short path to the socket `name` in `folder`: the kernel limits the path of a socket to 108 characters."""
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder_fd}/{name}"
    finally:
        os.close(folder_fd)


def open_control_socket(folder: Path) -> socket.socket:
    (folder / CONTROL_SOCKET).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with open_short_path(folder, CONTROL_SOCKET) as path:
        listener.bind(path)
    (folder / CONTROL_SOCKET).chmod(0o600)
    listener.listen(16)
    return listener


def send_request(folder: Path, method: str, **arguments: Any) -> Any:
    """Call a ComponentManager method of the cluster in `folder`. Errors: OSError if the cluster is not running, RuntimeError if the
    requested method fails in the init process.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        with open_short_path(folder, CONTROL_SOCKET) as path:
            connection.connect(path)
        with connection.makefile("rw") as stream:
            stream.write(json.dumps({"method": method, **arguments}) + "\n")
            stream.flush()
            response = json.loads(stream.readline())
    if "error" in response:
        raise RuntimeError(response["error"])
    return response["result"]


def main() -> None:
    """Run as PID 1. The only argument is the cluster's state folder."""
    plan = Plan.load((Path(sys.argv[1]) / "plan.json").read_text())
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    set_up_first_node(plan)
    mount_private_folders(plan.nodes[0].folder, plan.api_address)
    holder_pid_by_node = {node.name: fork_node(node, plan) for node in plan.nodes[1:]}
    serve_requests(ComponentManager(plan, holder_pid_by_node))


if __name__ == "__main__":
    main()
