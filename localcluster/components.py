"""Compute the command lines and configuration files of the Kubernetes components from addresses and folders.

A value differs from its upstream default only if a cluster on one machine needs another value.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

ADMIN_GROUP = "system:masters"
SERVICE_CIDR = "10.96.0.0/16"
DNS_DOMAIN = "cluster.local"
AUDIT_POLICY_FILE = "audit-policy.json"
AUDIT_LOG_FILE = "logs/audit.log"
"""Path of the API server's audit log in the state folder. The log records each created pod, each write to a FineTuneJob and its user, and all requests of
ServiceAccounts, as one JSON object per line."""
WRITING_VERBS = ["create", "update", "patch", "delete", "deletecollection"]


@dataclass(frozen=True)
class ControlPlaneAddresses:
    """Addresses of the control plane. The API server listens on `bind_address`; pods connect to `advertise_address`."""

    bind_address: str
    advertise_address: str
    port: int
    etcd_port: int
    etcd_peer_port: int

    @property
    def server(self) -> str:
        return f"https://{self.advertise_address}:{self.port}"


@dataclass(frozen=True)
class User:
    """One user in the API server's token file."""

    token: str
    name: str
    user_group: str

    @property
    def token_file_line(self) -> str:
        return f"{self.token},{self.name},{self.name},{self.user_group}\n"


def make_etcd_command(kube_program: Path, folder: Path, addresses: ControlPlaneAddresses) -> list[str]:
    """Return the command line of etcd. fsync is off, because etcd's data are removed when the cluster ends."""
    client_url, peer_url = f"http://127.0.0.1:{addresses.etcd_port}", f"http://127.0.0.1:{addresses.etcd_peer_port}"
    return [
        str(kube_program), "etcd", "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
        "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
        "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url, "--initial-cluster", f"default={peer_url}",
    ]


def make_api_server_command(kube_program: Path, folder: Path, addresses: ControlPlaneAddresses) -> list[str]:
    """Return the command line of the API server, with a token file and a self-signed serving certificate.

    If the advertised address is a loopback address, the endpoint reconciler is off, because pods could not connect to this address.
    """
    is_loopback = addresses.advertise_address.startswith("127.")
    return [
        str(kube_program), "kube-apiserver", "--etcd-servers", f"http://127.0.0.1:{addresses.etcd_port}",
        "--secure-port", str(addresses.port), "--bind-address", addresses.bind_address, "--advertise-address", addresses.advertise_address,
        "--endpoint-reconciler-type", "none" if is_loopback else "lease",
        "--cert-dir", str(folder / "certs"), "--token-auth-file", str(folder / "tokens.csv"),
        "--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction",
        "--service-account-issuer", f"https://kubernetes.default.svc.{DNS_DOMAIN}",
        "--service-account-key-file", str(folder / "sa.key"),
        "--service-account-signing-key-file", str(folder / "sa.key"),
        "--service-cluster-ip-range", SERVICE_CIDR, "--allow-privileged=true",
        "--kubelet-preferred-address-types", "InternalIP",
        "--shutdown-delay-duration", "0s",
        "--audit-policy-file", str(folder / AUDIT_POLICY_FILE), "--audit-log-path", str(folder / AUDIT_LOG_FILE),
    ]


def make_audit_policy(api_group: str) -> str:
    """Return an audit policy that records created pods, writes to objects of one API group, and all requests of ServiceAccounts.

    The log contains the whole manifest of each created pod. Tests compare the requests of each ServiceAccount with its permissions. The audit log stays
    small, because the cluster's own components do not use ServiceAccounts.
    """
    rules = [
        {"level": "Request", "verbs": ["create"], "resources": [{"group": "", "resources": ["pods"]}]},
        {"level": "Metadata", "verbs": WRITING_VERBS, "resources": [{"group": api_group}]},
        {"level": "None", "nonResourceURLs": ["*"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "None"},
    ]
    return json.dumps({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"], "rules": rules})


def make_controller_manager_command(kube_program: Path, folder: Path, *, node_grace_seconds: int) -> list[str]:
    """Return the command line of the controller manager. A node without heartbeat for `node_grace_seconds` becomes NotReady."""
    return [
        str(kube_program), "kube-controller-manager", "--kubeconfig", str(folder / "kubeconfig"),
        "--service-account-private-key-file", str(folder / "sa.key"), "--root-ca-file", str(folder / "ca.crt"),
        "--use-service-account-credentials=false", "--leader-elect=false", "--secure-port", "0",
        "--node-monitor-period", "2s", "--node-monitor-grace-period", f"{node_grace_seconds}s",
    ]


def make_scheduler_command(kube_program: Path, folder: Path) -> list[str]:
    """Return the command line of the scheduler."""
    return [
        str(kube_program), "kube-scheduler", "--kubeconfig", str(folder / "kubeconfig"), "--leader-elect=false",
        "--secure-port", "0",
    ]


def make_kubelet_command(kube_program: Path, folder: Path, *, node_name: str, node_address: str) -> list[str]:
    """Return the command line of one node's kubelet. `folder` is the node's folder, which holds the kubelet's files."""
    return [
        str(kube_program), "kubelet", "--config", str(folder / "kubelet.json"), "--kubeconfig", str(folder / "kubeconfig"),
        "--root-dir", str(folder / "kubelet"), "--cert-dir", str(folder / "kubelet-certs"),
        "--hostname-override", node_name, "--node-ip", node_address, "--v", "1",
    ]


def make_kubelet_configuration(folder: Path, *, containerd_socket: str, dns_address: str, cgroup_root: str, lease_seconds: int) -> str:
    """Return the kubelet's configuration file. Eviction thresholds are low, because the disk may be nearly full. Image garbage collection is off."""
    return json.dumps(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "failCgroupV1": False,
            "failSwapOn": False,
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": cgroup_root,
            "containerRuntimeEndpoint": f"unix://{containerd_socket}",
            "podLogsDir": str(folder / "podlogs"),
            "staticPodPath": "",
            "resolvConf": "",
            "clusterDNS": [dns_address],
            "clusterDomain": DNS_DOMAIN,
            # Anonymous access to the kubelet is safe, because the kubelet can be reached only from this cluster's network namespace.
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "serializeImagePulls": False,
            "nodeStatusUpdateFrequency": "2s",
            "nodeLeaseDurationSeconds": lease_seconds,
            "healthzPort": 0,
            "shutdownGracePeriod": "0s",
        },
        indent=1,
    )


def make_kube_proxy_command(kube_program: Path, kubeconfig: Path, *, node_name: str, cluster_cidr: str) -> list[str]:
    """Return the command line of kube-proxy in iptables mode. kube-proxy does not set the conntrack sysctls, because they affect the whole machine."""
    return [
        str(kube_program), "kube-proxy", "--kubeconfig", str(kubeconfig), "--proxy-mode", "iptables",
        "--hostname-override", node_name, "--cluster-cidr", cluster_cidr, "--conntrack-max-per-core", "0",
        "--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0",
        "--healthz-bind-address", "127.0.0.1:10256", "--metrics-bind-address", "127.0.0.1:10249",
    ]


def make_kubeconfig(server: str, token: str, ca: bytes | None) -> str:
    """Return a kubeconfig as JSON, which is valid YAML.

    Clients with this kubeconfig verify the server only if `ca` is not None; the cluster's own components do not verify it.
    """
    cluster: dict[str, str | bool] = {"server": server}
    if ca is None:
        cluster["insecure-skip-tls-verify"] = True
    else:
        cluster["certificate-authority-data"] = base64.b64encode(ca).decode()
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "local", "cluster": cluster}],
            "users": [{"name": "local", "user": {"token": token}}],
            "contexts": [{"name": "local", "context": {"cluster": "local", "user": "local", "namespace": "default"}}],
            "current-context": "local",
        },
        indent=1,
    )
