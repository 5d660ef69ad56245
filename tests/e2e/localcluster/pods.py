"""Create pods that run testbox, and read their status."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from localcluster import NodeCluster

TESTBOX_IMAGE = "localhost/testbox:dev"
Object = dict[str, Any]


def make_pod(name: str, *arguments: str, container: Object | None = None, **spec: Any) -> Object:
    """Return the manifest of a pod whose only container runs testbox. `container` and `spec` add fields to the container and to the pod's spec."""
    testbox_container = {"name": "box", "image": TESTBOX_IMAGE, "imagePullPolicy": "IfNotPresent", "args": list(arguments)}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "containers": [{**testbox_container, **(container or {})}],
            **spec,
        },
    }


def read_phase(obj: Object) -> str:
    """Return the phase of a pod."""
    return str(obj["status"].get("phase"))


def read_terminated_state(obj: Object) -> Object:
    """Return the terminated state of the pod's container, or an empty dict while the container has not ended."""
    states = obj["status"].get("containerStatuses") or [{}]
    terminated_state: Object = states[0].get("state", {}).get("terminated", {})
    return terminated_state


def read_waiting_reason(obj: Object) -> str | None:
    """Return the reason why the pod's container waits, or None if the container does not wait."""
    states = obj["status"].get("containerStatuses") or [{}]
    reason: str | None = states[0].get("state", {}).get("waiting", {}).get("reason")
    return reason


def has_true_condition(obj: Object, condition: str) -> bool:
    """Whether the object has this condition with the status True."""
    return any(c["type"] == condition and c["status"] == "True" for c in obj["status"].get("conditions", []))


@dataclass(frozen=True)
class NamespaceApi:
    """API calls in one namespace of a cluster."""

    cluster: NodeCluster
    namespace: str

    def create(self, manifest: Object) -> Object:
        """Create an object."""
        created: Object = self.cluster.endpoint.request("POST", self._path(manifest["kind"].lower()), manifest)
        return created

    def get(self, kind: str, name: str) -> Object:
        """Read an object."""
        obj: Object = self.cluster.endpoint.get(f"{self._path(kind)}/{name}")
        return obj

    def delete(self, kind: str, name: str) -> None:
        """Delete an object with the grace period from its spec."""
        self.cluster.endpoint.request("DELETE", f"{self._path(kind)}/{name}")

    def wait(self, kind: str, name: str, until: Callable[[Object], object], seconds: float = 40) -> Object:
        """Wait until `until(object)` is true, and return the object. After `seconds`, raise AssertionError with the object's status."""
        deadline = time.monotonic() + seconds
        while not until(obj := self.get(kind, name)):
            assert time.monotonic() < deadline, f"{kind} {name} after {seconds} s: {obj['status']}"
            time.sleep(0.1)
        return obj

    def run(self, manifest: Object, seconds: float = 40) -> Object:
        """Create a pod and wait until its container has ended. Returns the pod."""
        self.create(manifest)
        return self.wait("pod", manifest["metadata"]["name"], read_terminated_state, seconds)

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl in this namespace and return its output without the last line break."""
        return self.cluster.kubectl("-n", self.namespace, *arguments).rstrip("\n")

    def _path(self, kind: str) -> str:
        if kind == "node":
            return "/api/v1/nodes"
        if kind in ("clusterrolebinding",):
            return f"/apis/rbac.authorization.k8s.io/v1/{kind}s"
        api_path = {"job": "apis/batch/v1"}.get(kind, "api/v1")
        return f"/{api_path}/namespaces/{self.namespace}/{kind}s"
