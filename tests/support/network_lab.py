"""A small network of network namespaces that enforces NetworkPolicies with nftables. Runs as a separate program.

The test machine has no network plugin that enforces NetworkPolicies. This program takes the place of a network plugin: it creates a network namespace for
each pod, translates the policies into nftables rules for these namespaces, and tries connections. The program needs the rights of root and the programs `ip`
and `nft`.

The program runs in its own network and mount namespace. The pods' network namespaces exist only within these two, so they disappear when the program ends,
and no other program sees them. This program resets a forbidden connection at once, whereas a real network plugin drops the packets of the connection. Only
the NetworkPolicy fields that the operator uses are translated; any other field is an error.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Object = dict[str, Any]
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"
CLONE_NEWNET = 0x40000000
CONNECT_SECONDS = 20
"""Timeout of a connection. If this program works, no connection takes this long, because every address exists and forbidden connections are reset at once.
"""


@dataclass(frozen=True)
class LabPod:
    """A pod that listens on all `ports`. If `namespace` is empty, the object stands for a host outside the cluster."""

    name: str
    namespace: str
    labels: dict[str, str]
    addresses: tuple[str, ...]
    """IP addresses with a prefix length, such as `10.0.0.1/8`."""
    ports: tuple[int, ...] = ()

    @property
    def ips(self) -> list[str]:
        """The IP addresses without the prefix length."""
        return [str(ipaddress.ip_interface(address).ip) for address in self.addresses]


@dataclass(frozen=True)
class Lab:
    """The pods and policies of a network, and the connections to try. Each attempt is (name of the connecting pod, target address, target port)."""

    pods: tuple[LabPod, ...]
    policies: tuple[Object, ...] = ()
    attempts: tuple[tuple[str, str, int], ...] = field(default=())


def find_missing_requirement() -> str | None:
    """Return a message that names what this machine lacks to run a lab, or None if a lab can run."""
    missing_programs = [program for program in ("ip", "nft", "unshare", "mount") if shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") is None]
    if missing_programs:
        return f"missing programs: {', '.join(missing_programs)} (Debian packages nftables, iproute2)"
    completed_process = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    return completed_process.stderr.strip() or None


def run_lab(lab: Lab) -> list[bool]:
    """Build the network in a new process, and return whether each attempt connected."""
    repository = Path(__file__).parents[2]
    completed_process = subprocess.run(
        ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, "-m", "tests.support.network_lab"],
        input=json.dumps(asdict(lab)), capture_output=True, text=True, cwd=repository, timeout=300,
    )  # fmt: skip
    assert completed_process.returncode == 0, completed_process.stderr
    return [bool(value) for value in json.loads(completed_process.stdout)]


# ---- from NetworkPolicies to nftables ----


def make_nft_rules(pod: LabPod, lab: Lab) -> str:
    """Return the nftables rules for a pod's namespace. The pod is isolated in a direction if at least one policy of this direction selects it."""
    lines = ["table inet network_policy {"]
    for direction, chain, hook in (("Ingress", "incoming", "input"), ("Egress", "outgoing", "output")):
        policies = [policy for policy in lab.policies if _selects(policy["spec"]["podSelector"], pod.labels)]
        policies = [policy for policy in policies if policy["metadata"]["namespace"] == pod.namespace and direction in policy["spec"]["policyTypes"]]
        if not policies:
            continue
        lines += [f"chain {chain} {{", f"type filter hook {hook} priority 0; policy accept;", "ct state established,related accept"]
        lines += [f"{'iif' if direction == 'Ingress' else 'oif'} lo accept", "meta l4proto ipv6-icmp accept"]
        for policy in policies:
            for rule in policy["spec"].get(direction.lower(), []):
                lines += _make_accept_rules(rule, direction, policy, lab)
        lines += ["meta l4proto tcp reject with tcp reset", "drop", "}"]
    return "\n".join([*lines, "}"])


def _make_accept_rules(rule: Object, direction: str, policy: Object, lab: Lab) -> list[str]:
    """Return the nftables rules for one entry of `ingress` or `egress`: one rule for every pair of peer and port."""
    peers = rule.get("from" if direction == "Ingress" else "to")
    assert set(rule) <= {"from", "to", "ports"}
    side = "saddr" if direction == "Ingress" else "daddr"
    addresses = [""] if not peers else [line for peer in peers for line in _make_peer_matches(peer, side, policy, lab)]
    ports = [f"{port['protocol'].lower()} dport {port['port']} " for port in rule.get("ports", [])] or [""]
    return [f"{address}{port}accept" for address in addresses for port in ports]


def _make_peer_matches(peer: Object, side: str, policy: Object, lab: Lab) -> list[str]:
    if "ipBlock" in peer:
        assert set(peer) == {"ipBlock"}
        block = peer["ipBlock"]
        family = _find_address_family(block["cidr"])
        exceptions = block.get("except", [])
        exception_match = f"{family} {side} != {{ {', '.join(exceptions)} }} " if exceptions else ""
        return [f"{family} {side} {block['cidr']} {exception_match}"]
    assert set(peer) <= {"podSelector", "namespaceSelector"}
    selected_pods = [pod for pod in lab.pods if pod.namespace and _selects_peer(peer, pod, policy["metadata"]["namespace"])]
    return [f"{_find_address_family(ip)} {side} {ip} " for pod in selected_pods for ip in pod.ips]


def _selects_peer(peer: Object, pod: LabPod, own_namespace: str) -> bool:
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {NAMESPACE_NAME_LABEL: pod.namespace}):
            return False
    elif pod.namespace != own_namespace:
        return False
    return _selects(peer.get("podSelector", {}), pod.labels)


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def _find_address_family(address: str) -> str:
    return "ip6" if ":" in address else "ip"


# ---- the network, in a separate process ----


def run(*command: str, text: str | None = None) -> None:
    """Run a command. If the command fails, exit this program with the command's error message."""
    completed_process = subprocess.run(command, input=text, capture_output=True, text=True)
    if completed_process.returncode != 0:
        sys.exit(f"{' '.join(command)}: {completed_process.stderr}{text or ''}")


def call_in_namespace(name: str, function: Callable[[], T]) -> T:
    """Call a function in a thread inside a network namespace. A socket that the function creates stays in this namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    results: list[T] = []

    def enter_and_call() -> None:
        with Path("/run/netns", name).open() as handle:
            if libc.setns(handle.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {name}")
        results.append(function())

    thread = threading.Thread(target=enter_and_call)
    thread.start()
    thread.join()
    return results[0]


def build_network(lab: Lab) -> list[socket.socket]:
    """Connect all pods to one bridge, load their nftables rules, and return their listening sockets."""
    run("mount", "-t", "tmpfs", "tmpfs", "/run")  # a separate /run for this program, because `ip netns` stores the names of its namespaces there
    links = ["link add bridge0 type bridge", "link set bridge0 up"]
    for number, pod in enumerate(lab.pods):
        links += [f"netns add {pod.name}", f"link add pod{number} type veth peer name eth0 netns {pod.name}", f"link set pod{number} master bridge0 up"]
    run("ip", "-batch", "-", text="\n".join(links))
    listeners = []
    for pod in lab.pods:
        addresses = [f"addr add {address} dev eth0{' nodad' if ':' in address else ''}" for address in pod.addresses]
        run("ip", "-n", pod.name, "-batch", "-", text="\n".join(["link set lo up", "link set eth0 up", *addresses, "route add default dev eth0"]))
        run("ip", "-n", pod.name, "-6", "route", "add", "default", "dev", "eth0")
        rules = make_nft_rules(pod, lab)
        if "chain" in rules:
            run("ip", "netns", "exec", pod.name, "nft", "-f", "-", text=rules)
        for port in pod.ports:
            listeners.append(call_in_namespace(pod.name, lambda port=port: socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)))
    return listeners


def can_connect(address: str, port: int) -> bool:
    """Whether the target accepts a connection. Returns False if the connection is reset. Errors: OSError if the connection fails in any other way."""
    try:
        socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
    except ConnectionRefusedError:
        return False
    return True


def main() -> None:
    """Read a Lab as JSON from standard input, and print the result of each attempt as a JSON list of booleans."""
    lab_fields = json.load(sys.stdin)
    pods = tuple(LabPod(**{**pod, "addresses": tuple(pod["addresses"]), "ports": tuple(pod["ports"])}) for pod in lab_fields["pods"])
    lab = Lab(pods, tuple(lab_fields["policies"]))
    listeners = build_network(lab)
    results = [call_in_namespace(pod, lambda address=address, port=port: can_connect(address, port)) for pod, address, port in lab_fields["attempts"]]
    print(json.dumps(results))
    for listener in listeners:
        listener.close()


if __name__ == "__main__":
    main()
