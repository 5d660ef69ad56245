"""Pods with a model cache in a namespace with Pod Security `restricted`: a cache on a claim is allowed, and a cache in a folder of the node is not."""

from __future__ import annotations

import json
import ssl
import urllib.request
from typing import Any

import pytest
from finetune_operator.objects import Object

from localcluster import Endpoint
from tests.unit.operator.samples import spec
from tests.unit.operator.test_model_cache import build_job_body

NAMESPACE = "restricted-models"
LABELS = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}


def post(endpoint: Endpoint, path: str, body: Object) -> tuple[int, list[str]]:
    """Create an object. Return the status code and the API server's warnings."""
    request = urllib.request.Request(endpoint.server + path, method="POST", data=json.dumps(body).encode())
    request.add_header("Authorization", f"Bearer {endpoint.token}")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, context=ssl.create_default_context(cafile=str(endpoint.ca)), timeout=20) as answer:
        return answer.status, answer.headers.get_all("Warning") or []


@pytest.fixture(scope="module")
def restricted_namespace(control_plane: Endpoint) -> str:
    status, _ = post(control_plane, "/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": LABELS}})
    assert status == 201
    return NAMESPACE


@pytest.mark.parametrize(
    ("cache", "violations"),
    [("none", []), ("pvc://models/hub", []), ("node", ['restricted volume types (volume "model-cache" uses restricted volume type "hostPath")'])],
)
def test_pod_security_warns_only_about_a_cache_on_the_node(control_plane: Endpoint, restricted_namespace: str, cache: str, violations: list[Any]) -> None:
    body = build_job_body(spec(model={"cache": cache}))[1]
    body["metadata"] |= {"namespace": restricted_namespace, "ownerReferences": []}
    status, warnings = post(control_plane, f"/apis/batch/v1/namespaces/{restricted_namespace}/jobs?dryRun=All&fieldValidation=Strict", body)
    assert status == 201 and len(warnings) == len(violations)
    for warning, violation in zip(warnings, violations, strict=True):
        assert violation in warning.replace("\\", "")
