"""Run a complete Kubernetes cluster, for the demo and the e2e tests. The cluster's nodes run real containers, and an S3 server runs in a pod.

The cluster runs in its own Linux namespaces. When the first process of the PID namespace ends, the kernel kills all other processes in this namespace.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from localcluster import build, cgroups, components, containerd, paths, processes, requirements, s3_pod
from localcluster.api import ApiError, Endpoint
from localcluster.components import ControlPlaneAddresses, User
from localcluster.control_plane import NODE_MODE as MODE
from localcluster.control_plane import (
    PLAN_FILE,
    PROCESS_NAMES,
    STATE_FILE,
    lock_state_folder,
    read_endpoint,
    wait_for_api,
    write_credentials,
    write_state,
)
from localcluster.errors import ClusterDiffers, ImageNotFound, NotRunning
from localcluster.layout import API_PORT, S3_NODE_PORT, Node, Plan, find_free_address_block, get_image_root_folder
from localcluster.machine import Machine, make_not_running_error, take_lock
from localcluster.oci import Image, find_index_entry, write_layout
from localcluster.processes import Lifetime, Server
from localcluster.s3 import S3Endpoint, is_ready, make_access_keys
from localcluster.steps import Step, silent_step
from localcluster.store import ContainerdImageStore

GPU_RESOURCE = "nvidia.com/gpu"
NODE_GRACE_SECONDS = 16
"""If a node sends no heartbeat for this time, it becomes NotReady. The upstream default is 50 s."""
LEASE_SECONDS = 8


@dataclass(frozen=True)
class NodeClusterOptions:
    """Number of nodes, and number of simulated GPUs per node."""

    nodes: int = 1
    gpus: int = 0


class NodeCluster:
    """Runs an API server, controllers, scheduler, DNS, S3, and `nodes` nodes with containerd. The state is stored in `state_dir`.

    Use a NodeCluster as a context manager, or call `up()` and `down()`. If the cluster was already running, the context manager does not stop it. With
    the default lifetime, the kernel kills the cluster when the thread that started it ends, even if `kill -9` ends this thread. Errors:
    MissingRequirement (root, packages, kernel, Go), ClusterBusy (another cluster is running on this machine), ClusterDiffers (this
    cluster is running with another number of nodes), StartFailed.
    """

    def __init__(
        self, state_dir: Path | None = None, *, nodes: int = 1, gpus: int = 0,
        lifetime: Lifetime = Lifetime.UNTIL_PARENT_ENDS, step: Step = silent_step,
    ) -> None:
        self.state_dir = (state_dir or paths.get_default_state_folder("default")).absolute()
        self.options = NodeClusterOptions(nodes, gpus)
        self._lifetime = lifetime
        self._step = step
        self._machine = Machine(self.state_dir)
        self._was_started_here = False

    def up(self) -> NodeCluster:
        """Start the cluster unless it is running in this folder. Returns when nodes, DNS and S3 work."""
        with lock_state_folder(self.state_dir):
            if not self._is_running():
                requirements.check_node()
                self._machine.end()
                take_lock(self.state_dir).close()
                program_paths = {name: build.ensure_built(name, self._step) for name in (build.KUBE_PROGRAM, "coredns", "pause")}
                try:
                    self._start(program_paths)
                    self._was_started_here = True
                except BaseException:
                    with self._step("clean up after the failed start"):
                        self._machine.end()
                    raise
            self._set_gpus()
        return self

    def _is_running(self) -> bool:
        endpoint = read_endpoint(self.state_dir, MODE)
        if endpoint is None or not endpoint.is_ready() or not self._machine.is_running(PROCESS_NAMES):
            return False
        if (running_node_count := self.plan.node_count) != self.options.nodes:
            raise ClusterDiffers(
                f"the cluster in {self.state_dir} is running with {running_node_count} node(s), but {self.options.nodes} node(s) are requested: "
                f"run `localcluster down` first"
            )
        return True

    def _start(self, program_paths: dict[str, Path]) -> None:
        with self._step("create the network"):
            self._clean_state_folder()
            plan = Plan(self.state_dir, find_free_address_block(), self.options.nodes)
            server = self._machine.start(plan, self._lifetime)
        with self._step("start containerd and the control plane"):
            endpoint = self._start_control_plane(plan, program_paths[build.KUBE_PROGRAM], server)
        with self._step("load the system images"):
            self._load_system_images(plan, program_paths["pause"])
        access_key, secret_key = make_access_keys()
        with self._step(f"start {plan.node_count} node(s)"):
            self._start_nodes(plan, program_paths, endpoint)
            # S3 runs on the first node, so that it stays available when a test stops another node.
            s3_pod.apply_objects(endpoint, access_key, secret_key, node=plan.nodes[0].name)
            self._wait_until("the nodes", lambda: len(list_ready_nodes(endpoint)) == plan.node_count)
        with self._step("start S3"):
            s3_endpoint = make_s3_endpoint(plan, access_key, secret_key)
            self._wait_until("S3", lambda: is_ready(s3_endpoint))
        write_state(self.state_dir, MODE, endpoint, access_key=access_key, secret_key=secret_key)

    def _start_control_plane(self, plan: Plan, kube_program: Path, server: Server) -> Endpoint:
        first_node = plan.nodes[0]
        addresses = ControlPlaneAddresses("0.0.0.0", plan.api_address, API_PORT, 2379, 2380)  # noqa: S104 - in its own namespace
        node_users = [User(secrets.token_hex(20), f"system:node:{node.name}", "system:nodes") for node in plan.nodes]
        token = write_credentials(self.state_dir, kube_program, addresses, node_users)
        self._machine.start_component("etcd", first_node, components.make_etcd_command(kube_program, self.state_dir, addresses))
        self._machine.start_component("kube-apiserver", first_node, components.make_api_server_command(kube_program, self.state_dir, addresses))
        for node in plan.nodes:
            self._start_containerd(node)
        endpoint = wait_for_api(self.state_dir, addresses, token, [server])
        for node, user in zip(plan.nodes, node_users, strict=True):
            node_kubeconfig = node.folder / "kubeconfig"
            node_kubeconfig.touch(mode=0o600)
            node_kubeconfig.write_text(components.make_kubeconfig(addresses.server, user.token, endpoint.ca.read_bytes()))
        controller_manager_command = components.make_controller_manager_command(kube_program, self.state_dir, node_grace_seconds=NODE_GRACE_SECONDS)
        self._machine.start_component("kube-controller-manager", first_node, controller_manager_command)
        self._machine.start_component("kube-scheduler", first_node, components.make_scheduler_command(kube_program, self.state_dir))
        return endpoint

    def _start_containerd(self, node: Node) -> None:
        """Remove the containers of an earlier cluster from the node's store, then start containerd. The kubelet must not see old containers."""
        has_old_store = node.image_folder.exists()
        containerd.write_configuration(node)
        name = f"containerd-{node.name}"
        if has_old_store:
            configuration_without_cri = node.folder / "containerd-without-cri.toml"
            self._machine.start_component(name, node, ["containerd", "-c", str(configuration_without_cri)])
            self._wait_until(name, self.containerd(node).is_responding)
            self.containerd(node).remove_containers()
            self._kill_component(name)
        self._machine.start_component(name, node, ["containerd", "-c", str(node.folder / "containerd.toml")])

    def _has_ended(self, name: str) -> bool:
        return self._machine.request("get_exit_codes")[name] is not None

    def _load_system_images(self, plan: Plan, pause_program: Path) -> None:
        pause_layout_folder = pause_program.parent / "image"
        layout_folders = [write_layout(pause_layout_folder, Image(containerd.PAUSE_IMAGE, {"/pause": pause_program}, ["/pause"])), s3_pod.write_image_layout()]
        for node in plan.nodes:
            image_store = self.containerd(node)
            self._wait_until(f"containerd of {node.name}", image_store.is_responding)
            for layout_folder in layout_folders[: 2 if node.number == 1 else 1]:
                image_store.load(layout_folder)

    def _start_nodes(self, plan: Plan, program_paths: dict[str, Path], endpoint: Endpoint) -> None:
        kube_program, first_node = program_paths[build.KUBE_PROGRAM], plan.nodes[0]
        corefile_path = self.state_dir / "Corefile"
        corefile_path.write_text(
            f".:53 {{\n  errors\n  ready 127.0.0.1:18181\n"
            f"  kubernetes {components.DNS_DOMAIN} {{\n    kubeconfig {endpoint.kubeconfig}\n    ttl 1\n  }}\n}}\n"
        )
        self._machine.start_component("coredns", first_node, [str(program_paths["coredns"]), "-conf", str(corefile_path)])
        for node in plan.nodes:
            kubelet_configuration = components.make_kubelet_configuration(
                node.folder, containerd_socket=node.socket, dns_address=plan.api_address, cgroup_root=node.cgroup,
                lease_seconds=LEASE_SECONDS,
            )
            (node.folder / "kubelet.json").write_text(kubelet_configuration)
            self._start_kubelet(kube_program, node)
            kube_proxy_command = components.make_kube_proxy_command(kube_program, endpoint.kubeconfig, node_name=node.name, cluster_cidr=plan.cluster_cidr)
            self._machine.start_component(f"kube-proxy-{node.name}", node, kube_proxy_command)

    def _start_kubelet(self, kube_program: Path, node: Node) -> None:
        argv = components.make_kubelet_command(kube_program, node.folder, node_name=node.name, node_address=node.address)
        self._machine.start_component(f"kubelet-{node.name}", node, argv)

    def _wait_until(self, description: str, condition: processes.Condition) -> None:
        def is_ready() -> bool:
            self._machine.check_components()
            return condition()

        processes.wait_until(description, is_ready, servers=[], timeout=60)

    def down(self) -> None:
        """Stop the cluster. The nodes' images are kept for the next cluster."""
        with lock_state_folder(self.state_dir):
            self._machine.end()
            self._clean_state_folder()

    def purge(self) -> None:
        """Stop the cluster, and remove its state folder and the nodes' images."""
        self.down()
        with take_lock(self.state_dir):
            shutil.rmtree(get_image_root_folder(), ignore_errors=True)
        shutil.rmtree(self.state_dir, ignore_errors=True)

    def _clean_state_folder(self) -> None:
        for path in self.state_dir.iterdir():
            if path.name != "lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def __enter__(self) -> NodeCluster:
        return self.up()

    def __exit__(self, *raised: object) -> None:
        if self._was_started_here:
            self.down()

    @property
    def plan(self) -> Plan:
        """Names, folders and addresses of the running cluster. Errors: NotRunning."""
        try:
            return Plan.load((self.state_dir / PLAN_FILE).read_text())
        except FileNotFoundError:
            raise make_not_running_error(self.state_dir) from None

    @property
    def network_namespace_pid(self) -> int:
        """Pid of a process in the network namespace of the first node, for `nsenter --net`. All pods can reach servers in this namespace."""
        return self._machine.find_pid()

    @property
    def endpoint(self) -> Endpoint:
        """The API server. Errors: NotRunning."""
        endpoint = read_endpoint(self.state_dir, MODE)
        if endpoint is None:
            raise make_not_running_error(self.state_dir)
        return endpoint

    @property
    def kubeconfig(self) -> Path:
        """Path of a kubeconfig with administrator rights in the cluster, for programs on this machine."""
        return self.endpoint.kubeconfig

    @property
    def s3(self) -> S3Endpoint:
        """The S3 server in the cluster. Errors: NotRunning."""
        plan = self.plan
        state = json.loads((self.state_dir / STATE_FILE).read_text())
        return make_s3_endpoint(plan, state["access_key"], state["secret_key"])

    def containerd(self, node: Node) -> ContainerdImageStore:
        """Return a client for a node's containerd."""
        return ContainerdImageStore(f"/proc/{self._machine.find_pid(node.name)}/root{node.socket}", node.image_folder)

    def load_image(self, image: Path | str, *, nodes: Sequence[str] | None = None) -> str:
        """Load an image into `nodes`, by default into all nodes. Returns the image's name. Errors: ImageNotFound.

        `image` is a folder with an OCI layout, or the tag of an image from `localcluster images build`.
        """
        layout_folder = image if isinstance(image, Path) else find_layout(image)
        name, _ = find_index_entry(layout_folder)
        for node in self.plan.nodes:
            if nodes is None or node.name in nodes:
                with self._step(f"load {name} into {node.name}"):
                    self.containerd(node).load(layout_folder, name)
        return name

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        """Run kubectl on this cluster. Returns its standard output. Errors: CalledProcessError with the standard error output."""
        command = [str(build.ensure_built(build.KUBE_PROGRAM)), "kubectl", "--kubeconfig", str(self.kubeconfig), *arguments]
        return subprocess.run(command, check=check, capture_output=True, text=True, input=stdin).stdout

    def stop_kubelet(self, name: str) -> None:
        """Kill a node's kubelet. The node becomes NotReady, and its containers keep running."""
        self._kill_component(f"kubelet-{self._find_node(name).name}")

    def power_off(self, name: str) -> None:
        """Kill the kubelet, containerd and all containers of a node, as a power cut would."""
        self.stop_kubelet(name)
        self._kill_component(f"containerd-{name}")
        self._machine.kill_shims(name)
        cgroups.kill_node(name)

    def _kill_component(self, name: str) -> None:
        self._machine.request("kill", name=name, signal_number=int(signal.SIGKILL))
        processes.wait_until(f"the end of {name}", lambda: self._has_ended(name), servers=[], timeout=10)

    def start_node(self, name: str) -> None:
        """Start the components that `stop_kubelet` or `power_off` killed, and wait until the node is Ready."""
        node = self._find_node(name)
        started_at = datetime.now(UTC)
        if self._has_ended(f"containerd-{name}"):
            argv = ["containerd", "-c", str(node.folder / "containerd.toml")]
            self._machine.start_component(f"containerd-{name}", node, argv)
            # The kubelet exits if containerd is not running.
            processes.wait_until(f"containerd of {name}", self.containerd(node).is_responding, servers=[], timeout=30)
        if self._has_ended(f"kubelet-{name}"):
            self._start_kubelet(build.ensure_built(build.KUBE_PROGRAM), node)
        self._wait_until(f"node {name}", lambda: name in list_ready_nodes(self.endpoint, heartbeat_after=started_at))
        self._set_gpus()

    def _find_node(self, name: str) -> Node:
        try:
            return self.plan.node(name)
        except KeyError:
            joined_names = ", ".join(node.name for node in self.plan.nodes)
            raise NotRunning(f"there is no node {name}: the nodes are {joined_names}") from None

    def _set_gpus(self) -> None:
        """Set the nodes' GPU capacity. The kubelet keeps this value, because no device plugin manages the resource."""
        if self.options.gpus:
            for node in self.plan.nodes:
                json_pointer = f"/status/capacity/{GPU_RESOURCE.replace('/', '~1')}"
                patch = [{"op": "add", "path": json_pointer, "value": str(self.options.gpus)}]
                status_path = f"/api/v1/nodes/{node.name}/status"
                self.endpoint.request("PATCH", status_path, patch, content_type="application/json-patch+json")


def make_s3_endpoint(plan: Plan, access_key: str, secret_key: str) -> S3Endpoint:
    """Return the addresses and keys of a cluster's S3 server."""
    return S3Endpoint(f"http://{plan.api_address}:{S3_NODE_PORT}", s3_pod.CLUSTER_URL, access_key, secret_key)


def list_ready_nodes(endpoint: Endpoint, *, heartbeat_after: datetime | None = None) -> list[str]:
    """List the names of the Ready nodes. If `heartbeat_after` is given, list only nodes whose kubelet has sent a heartbeat after this time."""
    try:
        nodes = endpoint.get("/api/v1/nodes")["items"]
        leases = endpoint.get("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases")["items"]
    except ApiError:
        return []
    names_with_heartbeat = {
        lease["metadata"]["name"]
        for lease in leases
        if heartbeat_after is None or datetime.fromisoformat(lease["spec"]["renewTime"]) > heartbeat_after
    }
    return [
        node["metadata"]["name"]
        for node in nodes
        if node["metadata"]["name"] in names_with_heartbeat
        and any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
    ]


def find_layout(tag: str) -> Path:
    """Return the OCI layout of an image from `localcluster images build`. Errors: ImageNotFound."""
    for index_file in sorted((paths.cache_folder() / "images").glob("*/index.json")):
        with contextlib.suppress(ImageNotFound):
            find_index_entry(index_file.parent, tag)
            return index_file.parent
    raise ImageNotFound(f"image {tag} is not in the cache of this machine: run `localcluster images build`")
