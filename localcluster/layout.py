"""Define the names, addresses and folders of a cluster with nodes. The same names, addresses and folders are valid outside and inside the
cluster's namespaces.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from localcluster import paths
from localcluster.errors import MissingRequirement

HOST_LINK = "ftlc0"
"""Name of the veth device on this machine. The peer of this device is attached to the cluster's bridge."""
PARENT_CGROUP = "finetune-localcluster"
"""Parent cgroup of all containers. The name is the same for all clusters, so only one cluster with nodes can run per machine."""
API_PORT = 6443
S3_NODE_PORT = 30333
ADDRESS_BLOCKS = [f"10.{n}" for n in range(201, 240)] + [f"172.{n}" for n in range(20, 32)] + ["198.18", "198.19"]
"""Possible /16 blocks for nodes and pods, in order of preference: private blocks, then the blocks reserved for network tests (RFC 2544)."""
MAX_DEFAULT_PREFIX_LENGTH = 4
"""A route counts as a default route if its prefix has at most this many bits. For example, VPNs set 0.0.0.0/1 and 128.0.0.0/1 as default routes."""


@dataclass(frozen=True)
class Node:
    """One node. `folder` contains the kubelet's files. `image_folder` contains the images, which are kept for the next cluster on this machine."""

    name: str
    number: int
    address_block: str
    folder: Path
    image_folder: Path

    @property
    def address(self) -> str:
        return f"{self.address_block}.0.{self.number}"

    @property
    def pod_cidr(self) -> str:
        return f"{self.address_block}.{self.number}.0/24"

    @property
    def socket(self) -> str:
        """Path of containerd's socket. Each node has its own /run."""
        return "/run/finetune/containerd.sock"

    @property
    def cgroup(self) -> str:
        return f"/{PARENT_CGROUP}/{self.name}"


@dataclass(frozen=True)
class Plan:
    """Names, folders and addresses of a cluster with `node_count` nodes. All addresses are in the /16 `address_block` (such as `10.201`).
    `folder` contains the state of the local cluster.
    """

    folder: Path
    address_block: str
    node_count: int

    @property
    def nodes(self) -> list[Node]:
        return [
            Node(f"n{i}", i, self.address_block, self.folder / f"n{i}", get_image_root_folder() / f"n{i}")
            for i in range(1, self.node_count + 1)
        ]

    def node(self, name: str) -> Node:
        """Return the node with this name. Errors: KeyError."""
        return {node.name: node for node in self.nodes}[name]

    @property
    def api_address(self) -> str:
        return self.nodes[0].address

    @property
    def host_address(self) -> str:
        """This machine's address on the cluster's network."""
        return f"{self.address_block}.0.254"

    @property
    def cluster_cidr(self) -> str:
        return f"{self.address_block}.0.0/16"

    def dump(self) -> str:
        return json.dumps({"folder": str(self.folder), "block": self.address_block, "count": self.node_count})

    @staticmethod
    def load(text: str) -> Plan:
        plan_fields = json.loads(text)
        return Plan(Path(plan_fields["folder"]), plan_fields["block"], plan_fields["count"])


def get_image_root_folder() -> Path:
    """Return the folder of the nodes' images. All clusters use the same folder, but only one cluster can run at a time."""
    return paths.cache_folder() / "nodes"


def find_free_address_block() -> str:
    """Return the first two numbers of a /16 block: the first of ADDRESS_BLOCKS to which this machine has no route. Default routes are ignored."""
    command = ["ip", "-j", "-4", "route", "show", "table", "all"]
    completed_process = subprocess.run(command, capture_output=True, text=True, check=True)
    routed_networks = [
        ipaddress.ip_network(route["dst"], strict=False)
        for route in json.loads(completed_process.stdout or "[]")
        if route.get("dst", "default") != "default"
    ]
    for address_block in ADDRESS_BLOCKS:
        block_network = ipaddress.ip_network(f"{address_block}.0.0/16")
        if not any(block_network.overlaps(routed_network) for routed_network in routed_networks if routed_network.prefixlen > MAX_DEFAULT_PREFIX_LENGTH):
            return address_block
    raise MissingRequirement(f"no free address range: {', '.join(ADDRESS_BLOCKS)} (/16 each) all have routes on this machine")
