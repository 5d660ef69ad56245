"""Kubernetes objects as parsed JSON, and the kinds that the operator uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from finetune_api import names

Object = dict[str, Any]
"""A Kubernetes object as parsed JSON."""


@dataclass(frozen=True)
class Kind:
    """A kind of Kubernetes object, with its names in the API."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        """Return the URL path of one object or, without `name`, of the collection.

        Without `namespace`, the path is that of the collection in the whole cluster.
        """
        root_path = "/api/v1" if self.api_version == "v1" else f"/apis/{self.api_version}"
        parts = [root_path]
        if namespace:
            parts += ["namespaces", quote(namespace, safe="")]
        parts.append(self.plural)
        parts += [quote(part, safe="") for part in (name, subresource) if part]
        return "/".join(parts)


FINETUNEJOB = Kind(names.API_VERSION, names.KIND, names.PLURAL)
JOB = Kind("batch/v1", "Job", "jobs")
POD = Kind("v1", "Pod", "pods")
SERVICE = Kind("v1", "Service", "services")
SECRET = Kind("v1", "Secret", "secrets")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
CORE_EVENT = Kind("v1", "Event", "events")
EVENT = Kind("events.k8s.io/v1", "Event", "events")
DEFAULT_CONTAINER_ANNOTATION = "kubectl.kubernetes.io/default-container"
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")

MANAGED_BY_SELECTOR = f"{names.Label.MANAGED_BY}={names.MANAGER_NAME}"
"""Selects the Jobs and pods that the operator creates. With this selector, the operator need not watch all pods of the cluster."""
