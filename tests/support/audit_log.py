"""Reads the audit log of a local cluster's API server: the created pods, and the requests of a ServiceAccount, each with RBAC's decision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from localcluster import Endpoint
from localcluster.components import AUDIT_LOG_FILE

AUTHORIZATION = "authorization.k8s.io/decision"
"""Annotation with RBAC's decision. If RBAC permits a request but admission refuses the request, the annotation's value is `allow` and the response's status
is 403.
"""


@dataclass(frozen=True, order=True)
class AuditedRequest:
    """One request and whether RBAC permitted it. `resource` includes the subresource, for example `pods/log`."""

    resource: str
    verb: str
    is_permitted: bool

    @property
    def permission(self) -> tuple[str, str]:
        """The resource and verb that a role must grant for this request."""
        return self.resource, self.verb


def read_requests(endpoint: Endpoint, namespace: str, account: str) -> set[AuditedRequest]:
    """Return the requests that a ServiceAccount has sent so far, without duplicates."""
    user = f"system:serviceaccount:{namespace}:{account}"
    return {_parse_request(event) for event in _read_events(endpoint) if event["user"]["username"] == user}


def read_created_pods(endpoint: Endpoint, namespace: str) -> list[dict[str, Any]]:
    """Return the manifests in all requests so far that create a pod in `namespace`, including pods that no longer exist."""
    return [
        event["requestObject"] for event in _read_events(endpoint)
        if (event["objectRef"]["resource"], event["verb"], event["objectRef"].get("namespace")) == ("pods", "create", namespace)
        and "requestObject" in event
    ]  # fmt: skip


def _read_events(endpoint: Endpoint) -> Iterator[dict[str, Any]]:
    """Yield all events of the audit log, including the events in rotated files."""
    log_path = endpoint.kubeconfig.parent / AUDIT_LOG_FILE
    for file in sorted(log_path.parent.glob(f"{log_path.stem}*{log_path.suffix}")):
        yield from map(json.loads, file.read_text("utf-8").splitlines())


def _parse_request(event: dict[str, object]) -> AuditedRequest:
    target, annotations = event["objectRef"], event.get("annotations") or {}
    assert isinstance(target, dict) and isinstance(annotations, dict)
    resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
    return AuditedRequest(resource, str(event["verb"]), annotations.get(AUTHORIZATION) != "forbid")
