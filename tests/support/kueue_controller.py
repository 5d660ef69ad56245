"""Runs the real Kueue controller, built from its Go module, for tests against a control plane with or without nodes.

CRDs and webhooks come from the chart in the Go module. The controller runs on this machine, where the API server calls its webhooks. The controller handles
only Jobs and Kueue's own resources; its support for Pods, Deployments and resources of other projects is turned off.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from localcluster import Endpoint
from localcluster.build import KUEUE_PROGRAM, download_module_sources, ensure_built
from localcluster.ports import find_free_ports
from localcluster.processes import Lifetime, spawn, wait_until

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from tools import HELM, build_go_tools  # noqa: E402 - the path comes first

Object = dict[str, Any]
API = "/apis/kueue.x-k8s.io/v1beta2"
START_SECONDS = 120
HANDLED_RESOURCES = {"jobs", "clusterqueues", "localqueues", "resourceflavors", "cohorts", "workloads", "workloads/status"}
NAMESPACE = "kueue-system"
PATHS = {
    "Secret": f"/api/v1/namespaces/{NAMESPACE}/secrets",
    "Service": f"/api/v1/namespaces/{NAMESPACE}/services",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
    "MutatingWebhookConfiguration": "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
    "ValidatingWebhookConfiguration": "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
}


@dataclass(frozen=True)
class NodeNetwork:
    """The network of a node cluster, in which the API server also runs. `pid` is a process in this network. This machine reaches the network at `address`."""

    pid: int
    address: str


def _render_chart_objects() -> list[Object]:
    """Return the CRDs, the webhook configurations and the empty Secret from Kueue's chart."""
    build_go_tools(HELM)
    chart = download_module_sources(KUEUE_PROGRAM) / "charts/kueue"
    command = [HELM.path, "template", "kueue", chart, "--namespace", NAMESPACE]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [body for body in yaml.load_all(text, yaml.CSafeLoader) if body and _is_needed(body)]


def _is_needed(body: Object) -> bool:
    return body["kind"] in PATHS and body["kind"] != "Service"


def _adapt_webhooks(body: Object, port: int) -> Object:
    """Let the object's webhooks call the controller's port, and remove the webhooks for resources that the tests do not use."""
    if "webhooks" in body:
        body["webhooks"] = [webhook for webhook in body["webhooks"] if set(webhook["rules"][0]["resources"]) <= HANDLED_RESOURCES]
    conversion = body.get("spec", {}).get("conversion") or {}
    for webhook in [*body.get("webhooks", []), *([conversion["webhook"]] if "webhook" in conversion else [])]:
        webhook["clientConfig"]["service"]["port"] = port
    return body


def _install(endpoint: Endpoint, webhook_port: int) -> None:
    """Apply Kueue's objects. The webhooks' Service has the external name `localhost`, so the API server reaches the controller without a node."""
    endpoint.apply(f"/api/v1/namespaces/{NAMESPACE}", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "kueue-webhook-service", "namespace": NAMESPACE},
        "spec": {"type": "ExternalName", "externalName": "localhost"},
    }  # fmt: skip
    for body in [service, *_render_chart_objects()]:
        endpoint.apply(f"{PATHS[body['kind']]}/{body['metadata']['name']}", _adapt_webhooks(body, webhook_port))


def _make_configuration(folder: Path, webhook_port: int, health_address: str) -> Object:
    return {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2", "kind": "Configuration", "namespace": NAMESPACE,
        "health": {"healthProbeBindAddress": health_address}, "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": webhook_port, "certDir": str(folder)},
        "leaderElection": {"leaderElect": False}, "internalCertManagement": {"enable": True},
        "integrations": {"frameworks": ["batch/job"]},
        # The visibility server is off, because it would need a separate port and an APIService.
        "featureGates": {"VisibilityOnDemand": False},
    }  # fmt: skip


@contextlib.contextmanager
def running_kueue(endpoint: Endpoint, folder: Path, network: NodeNetwork | None = None) -> Iterator[Path]:
    """Install Kueue's CRDs and webhooks, and run its controller during the `with` block. Yields the path of its log. Errors: StartFailed, BuildFailed.

    The API server calls the webhooks at its own loopback address, so the controller must run in the network of the API server. This is `network`, or the
    network of this machine if `network` is None.
    """
    certificates = folder / "certificates"
    certificates.mkdir(parents=True)
    program = ensure_built(KUEUE_PROGRAM)
    webhook_port, health_port = find_free_ports(2)
    _install(endpoint, webhook_port)
    config_path, log_path = folder / "config.yaml", folder / "log"
    health_address = f"{network.address if network else '127.0.0.1'}:{health_port}"
    config_path.write_text(json.dumps(_make_configuration(certificates, webhook_port, health_address)))
    enter_network = ["nsenter", "--net", "--target", str(network.pid)] if network else []
    server = spawn(
        "Kueue", [*enter_network, program, "--config", config_path, "--zap-log-level", "2"], owner=folder, log=log_path, lifetime=Lifetime.UNTIL_PARENT_ENDS,
        env={**os.environ, "KUBECONFIG": str(endpoint.kubeconfig)},
    )  # fmt: skip
    try:
        wait_until("Kueue's certificate", lambda: _write_certificates(endpoint, certificates), servers=[server], timeout=START_SECONDS)
        wait_until("Kueue", lambda: _is_ready(health_address), servers=[server], timeout=START_SECONDS)
        yield log_path
    finally:
        _remove_webhooks(endpoint)
        server.process.kill()
        server.process.wait()


def _remove_webhooks(endpoint: Endpoint) -> None:
    """Remove the webhooks, because the API server would refuse every Job while webhooks exist but the controller has stopped."""
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        for item in endpoint.get(PATHS[kind])["items"]:
            endpoint.request("DELETE", f"{PATHS[kind]}/{item['metadata']['name']}")


def _write_certificates(endpoint: Endpoint, folder: Path) -> bool:
    """Write the certificates from the controller's Secret to `folder`, with the file names that a kubelet would use for a mounted Secret. Returns whether the
    Secret has certificates.
    """
    data = endpoint.get(f"{PATHS['Secret']}/kueue-webhook-server-cert").get("data") or {}
    for name, text in data.items():
        (folder / name).write_bytes(base64.b64decode(text))
    return bool(data)


def _is_ready(address: str) -> bool:
    """Whether the controller serves its webhooks."""
    try:
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


class QueueObjects:
    """The Kueue objects for the namespace of one test: a ResourceFlavor, a ClusterQueue, and the LocalQueue `team-a`."""

    def __init__(self, endpoint: Endpoint, namespace: str) -> None:
        self._endpoint, self._namespace, self.name = endpoint, namespace, namespace

    def create(self, quotas: dict[str, str], *, node_labels: dict[str, str] | None = None) -> None:
        """Create the objects. `quotas` is the quantity of each resource; `node_labels` select the nodes of the ResourceFlavor."""
        self._apply("resourceflavors", self.name, "ResourceFlavor", {"nodeLabels": node_labels or {}})
        self.set_quotas(quotas)
        self._apply(f"namespaces/{self._namespace}/localqueues", "team-a", "LocalQueue", {"clusterQueue": self.name}, namespace=self._namespace)

    def set_quotas(self, quotas: dict[str, str], *, stop_policy: str = "None") -> None:
        """Write the ClusterQueue. With the stop policy `HoldAndDrain`, Kueue evicts the queue's workloads and admits no others."""
        resources = [{"name": name, "nominalQuota": quantity} for name, quantity in quotas.items()]
        self._apply("clusterqueues", self.name, "ClusterQueue", {
            "namespaceSelector": {}, "stopPolicy": stop_policy, "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [{"coveredResources": list(quotas), "flavors": [{"name": self.name, "resources": resources}]}],
        })  # fmt: skip

    def create_workload_priority(self, name: str, value: int) -> None:
        """Create a WorkloadPriorityClass."""
        body = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value}
        self._endpoint.apply(f"{API}/workloadpriorityclasses/{name}", body)

    def workloads_by_job(self) -> dict[str, Object]:
        """Return the Workloads of the namespace by the name of their Job."""
        items = self._endpoint.get(f"{API}/namespaces/{self._namespace}/workloads")["items"]
        return {item["metadata"]["ownerReferences"][0]["name"]: item for item in items if item["metadata"].get("ownerReferences")}

    def read_usage(self, resource: str) -> str:
        """Return the quantity of a resource that the admitted workloads use, from the status of the ClusterQueue."""
        status = self._endpoint.get(f"{API}/clusterqueues/{self.name}").get("status", {})
        usages = [usage for flavour in status.get("flavorsUsage", []) for usage in flavour["resources"]]
        return next((str(usage["total"]) for usage in usages if usage["name"] == resource), "0")

    def _apply(self, path: str, name: str, kind: str, spec: Object, namespace: str | None = None) -> None:
        metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
        self._endpoint.apply(f"{API}/{path}/{name}", {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": metadata, "spec": spec})
