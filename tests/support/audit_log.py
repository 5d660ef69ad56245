"""Reads the API server's audit log of a local cluster: which requests a ServiceAccount has sent, and which of them its roles do not permit."""

from __future__ import annotations

import json
from dataclasses import dataclass

from localcluster import Endpoint
from localcluster.components import AUDIT_LOG

AUTHORIZATION = "authorization.k8s.io/decision"
"""Annotation of an audit event. A request that RBAC permits and admission refuses, as in a terminating namespace, has `allow` and status 403."""


@dataclass(frozen=True, order=True)
class AuditedRequest:
    """One request. `resource` includes the subresource, for example `pods/log`."""

    resource: str
    verb: str
    is_permitted: bool

    @property
    def permission(self) -> tuple[str, str]:
        """Resource and verb, as a role grants them."""
        return self.resource, self.verb


def read_requests(endpoint: Endpoint, namespace: str, account: str) -> set[AuditedRequest]:
    """Return the different requests of a ServiceAccount so far."""
    lines = (endpoint.kubeconfig.parent / AUDIT_LOG).read_text("utf-8").splitlines()
    user = f"system:serviceaccount:{namespace}:{account}"
    events = [event for event in map(json.loads, lines) if event["user"]["username"] == user]
    return {_parse_request(event) for event in events}


def _parse_request(event: dict[str, object]) -> AuditedRequest:
    target, annotations = event["objectRef"], event.get("annotations") or {}
    assert isinstance(target, dict) and isinstance(annotations, dict)
    resource = "/".join(filter(None, (target["resource"], target.get("subresource"))))
    return AuditedRequest(resource, str(event["verb"]), annotations.get(AUTHORIZATION) != "forbid")
