"""Run a Kubernetes API server with etcd and the controllers, but without nodes: for tests that write pod statuses as a kubelet does.

The control plane consists of three processes on the loopback interface and needs neither root nor Linux namespaces. The control plane is ready in about
three seconds. Several control planes can run at the same time (each needs 600 MB of memory).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from localcluster import build, components, processes
from localcluster.api import Endpoint
from localcluster.components import ADMIN_GROUP, ControlPlaneAddresses, User
from localcluster.errors import ClusterBusy, ClusterDiffers, StartFailed
from localcluster.ports import find_free_ports
from localcluster.processes import Lifetime, Server
from localcluster.steps import Step, silent_step

AUDITED_GROUP = "finetune-operator.io"
"""API group; the audit log records all writes to objects of this group."""
MAX_START_ATTEMPTS = 4
"""Maximum number of start attempts. Each attempt uses new ports, because another program may bind a chosen port first."""
PROCESS_NAMES = ("etcd", "kube-apiserver", "kube-controller-manager")
STATE_FILE = "state.json"
CONTROL_PLANE_MODE = "control-plane"
NODE_MODE = "node"
PLAN_FILE = "plan.json"
"""File in the state folder of a cluster with nodes. This file is written before any process starts."""
DEFAULT_SERVICE_ACCOUNT_PATH = "/api/v1/namespaces/default/serviceaccounts/default"
"""URL path of a ServiceAccount that the controllers create. If this ServiceAccount exists, the controllers work."""


class ControlPlane:
    """Runs etcd, kube-apiserver and kube-controller-manager, with their files in `state_dir`. `scheduler=True` adds kube-scheduler.

    Use a ControlPlane as a context manager, or call `up()` and `down()`. With the default lifetime, the kernel kills the processes when the thread that
    started them ends, even if `kill -9` ends this thread. If an earlier cluster has left processes or files in `state_dir`, they are removed first. Errors:
    StartFailed, MissingRequirement (the programs are not built, and Go is missing), ClusterDiffers (a cluster with nodes is running in this
    folder).
    """

    def __init__(
        self, state_dir: Path, *, lifetime: Lifetime = Lifetime.UNTIL_PARENT_ENDS, scheduler: bool = False, step: Step = silent_step
    ) -> None:
        self.state_dir = state_dir.absolute()
        self._lifetime = lifetime
        self._has_scheduler = scheduler
        self._step = step

    def up(self) -> Endpoint:
        """Start the control plane unless it is running in this folder."""
        with lock_state_folder(self.state_dir):
            if running_endpoint := self.find_running_endpoint():
                return running_endpoint
            kube_program = build.ensure_built(build.KUBE_PROGRAM, self._step)
            with self._step("start the control plane"):
                for attempt in range(MAX_START_ATTEMPTS):
                    self._clean_state_folder()
                    try:
                        return self._start(kube_program)
                    except StartFailed:
                        has_port_conflict = self._has_port_conflict()
                        self._end_processes()
                        if attempt == MAX_START_ATTEMPTS - 1 or not has_port_conflict:
                            raise
                    except BaseException:
                        self._end_processes()
                        raise
        raise AssertionError("unreachable")

    def find_running_endpoint(self) -> Endpoint | None:
        """Return the endpoint of the API server, or None if the control plane is not running or not ready."""
        endpoint = read_endpoint(self.state_dir, CONTROL_PLANE_MODE)
        is_complete = len(processes.list_owned_pids(self.state_dir)) >= len(PROCESS_NAMES) + self._has_scheduler
        return endpoint if is_complete and endpoint and endpoint.is_ready() else None

    def _start(self, kube_program: Path) -> Endpoint:
        etcd_name, api_server_name, controller_manager_name = PROCESS_NAMES
        api_server_port, etcd_port, peer_port = find_free_ports(3)
        addresses = ControlPlaneAddresses("127.0.0.1", "127.0.0.1", api_server_port, etcd_port, peer_port)
        token = write_credentials(self.state_dir, kube_program, addresses, [])
        servers = [
            self._spawn(etcd_name, components.make_etcd_command(kube_program, self.state_dir, addresses)),
            self._spawn(api_server_name, components.make_api_server_command(kube_program, self.state_dir, addresses)),
        ]
        endpoint = wait_for_api(self.state_dir, addresses, token, servers)
        controller_manager_command = components.make_controller_manager_command(kube_program, self.state_dir, node_grace_seconds=40)
        servers.append(self._spawn(controller_manager_name, controller_manager_command))
        if self._has_scheduler:
            servers.append(self._spawn("kube-scheduler", components.make_scheduler_command(kube_program, self.state_dir)))
        processes.wait_until(
            "the controller manager", lambda: endpoint.exists(DEFAULT_SERVICE_ACCOUNT_PATH), servers=servers, timeout=60
        )
        write_state(self.state_dir, CONTROL_PLANE_MODE, endpoint)
        return endpoint

    def _spawn(self, name: str, argv: list[str]) -> Server:
        log_file = self.state_dir / "logs" / f"{name}.log"
        return processes.spawn(name, argv, owner=self.state_dir, log=log_file, lifetime=self._lifetime)

    def _has_port_conflict(self) -> bool:
        log_files = (self.state_dir / "logs").glob("*.log")
        return any("address already in use" in log.read_text(errors="replace") for log in log_files)

    def down(self) -> None:
        """Stop the control plane and remove its state folder, if the folder exists."""
        if self.state_dir.exists():
            with lock_state_folder(self.state_dir):
                self._clean_state_folder()
            shutil.rmtree(self.state_dir, ignore_errors=True)

    def _clean_state_folder(self) -> None:
        self._end_processes()
        for path in self.state_dir.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _end_processes(self) -> None:
        processes.end_owned_processes(self.state_dir)

    def __enter__(self) -> Endpoint:
        return self.up()

    def __exit__(self, *raised: object) -> None:
        self.down()


@contextlib.contextmanager
def lock_state_folder(state_dir: Path) -> Iterator[None]:
    """Lock a state folder, so that only one command at a time uses it. Errors: ClusterBusy if another command holds the lock."""
    state_dir.mkdir(parents=True, exist_ok=True)
    with (state_dir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterBusy(f"another localcluster command is running in {state_dir}: wait for it") from None
        yield


def write_credentials(folder: Path, kube_program: Path, addresses: ControlPlaneAddresses, node_users: list[User]) -> str:
    """Write the keys, tokens, the components' kubeconfig and the audit policy into `folder`. Returns the administrator's token."""
    admin_user = User(secrets.token_hex(20), "admin", ADMIN_GROUP)
    (folder / "certs").mkdir(exist_ok=True)
    for name, content in {
        "tokens.csv": "".join(user.token_file_line for user in [admin_user, *node_users]),
        "kubeconfig": components.make_kubeconfig(addresses.server, admin_user.token, None),
        components.AUDIT_POLICY_FILE: components.make_audit_policy(AUDITED_GROUP),
    }.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(content)
    subprocess.run([kube_program, "service-account-key", folder / "sa.key"], check=True)
    return admin_user.token


def wait_for_api(folder: Path, addresses: ControlPlaneAddresses, token: str, servers: list[Server]) -> Endpoint:
    """Wait until the API server has a certificate and is ready.

    After that, add the API server's certificate to the kubeconfig, so that clients verify the server.
    """
    certificate_file = folder / "certs" / "apiserver.crt"
    processes.wait_until("the API server's certificate", certificate_file.exists, servers=servers, timeout=60)
    endpoint = Endpoint(folder / "kubeconfig", addresses.server, token, folder / "ca.crt")

    def is_ready() -> bool:
        shutil.copy(certificate_file, endpoint.ca)  # Copy at each call: the API server creates the certificate's file before it writes the content.
        return endpoint.is_ready()

    processes.wait_until("the API server", is_ready, servers=servers, timeout=60)
    endpoint.kubeconfig.write_text(components.make_kubeconfig(addresses.server, token, certificate_file.read_bytes()))
    return endpoint


def write_state(folder: Path, mode: str, endpoint: Endpoint, **extra_fields: object) -> None:
    """Write the state file of a running cluster. This file is written as the last step of a start, so it exists only if the start has succeeded."""
    unfinished_file = folder / f".{STATE_FILE}"
    unfinished_file.touch(mode=0o600)
    unfinished_file.write_text(json.dumps({"mode": mode, "server": endpoint.server, "token": endpoint.token, **extra_fields}))
    unfinished_file.rename(folder / STATE_FILE)


def read_endpoint(folder: Path, mode: str) -> Endpoint | None:
    """Return the endpoint from the state file, or None if the file names no cluster of this mode.

    Errors: ClusterDiffers if a cluster of another mode is running.
    """
    try:
        state_fields = json.loads((folder / STATE_FILE).read_text())
    except FileNotFoundError:
        return None
    endpoint = Endpoint(folder / "kubeconfig", state_fields["server"], state_fields["token"], folder / "ca.crt")
    if state_fields["mode"] != mode:
        if endpoint.is_ready():
            raise ClusterDiffers(f"a {state_fields['mode']} cluster is running in {folder}: run `localcluster down` first")
        return None
    return endpoint


def read_mode(folder: Path) -> str | None:
    """Return the mode of the cluster in `folder`, even if its start was interrupted; None if the folder contains no cluster."""
    with contextlib.suppress(FileNotFoundError):
        return str(json.loads((folder / STATE_FILE).read_text())["mode"])
    return NODE_MODE if (folder / PLAN_FILE).exists() else None
