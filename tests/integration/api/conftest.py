"""Fixtures and helpers that install the CRD on a real API server and send requests to the server."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from finetune_api import names
from ruamel.yaml import YAML

from localcluster.api import Endpoint

ROOT = Path(__file__).parents[3]
CRD_PATH = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
JOBS_PATH = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"
MINIMAL_SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def _encode(body: Any) -> bytes | None:
    if body is None:
        return None
    return (body if isinstance(body, str) else json.dumps(body)).encode()


@dataclass(frozen=True)
class Response:
    status: int
    body: Any
    headers: Message

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


def call(
    api: Endpoint, method: str, path: str, body: Any = None, *, content_type: str = "application/json", **query: str
) -> Response:
    """Send one request. `body` is text, or a value that is sent as JSON. The returned response includes the HTTP headers, because the server's warnings are
    in them.
    """
    url = api.server + path + (f"?{urlencode(query)}" if query else "")
    request = urllib.request.Request(url, method=method, data=_encode(body))
    request.add_header("Authorization", f"Bearer {api.token}")
    request.add_header("Content-Type", content_type)
    context = ssl.create_default_context(cafile=str(api.ca))
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as response:
            return Response(response.status, json.loads(response.read()), response.headers)
    except urllib.error.HTTPError as error:
        return Response(error.code, json.loads(error.read()), error.headers)


@pytest.fixture(scope="module")
def api(control_plane: Endpoint, crd_installed: Response) -> Endpoint:
    return control_plane


@pytest.fixture(scope="module")
def crd_installed(control_plane: Endpoint) -> Response:
    crd = YAML(typ="safe").load((ROOT / "crds" / "finetunejobs.yaml").read_text())
    path = f"{CRD_PATH}/{crd['metadata']['name']}"
    response = call(
        control_plane, "PATCH", path, crd, content_type="application/apply-patch+yaml", fieldManager="test", force="true"
    )
    assert response.status in (200, 201), response.message
    watch = {"fieldSelector": f"metadata.name={crd['metadata']['name']}", "watch": "true", "timeoutSeconds": "30"}
    request = urllib.request.Request(f"{control_plane.server}{CRD_PATH}?{urlencode(watch)}")
    request.add_header("Authorization", f"Bearer {control_plane.token}")
    context = ssl.create_default_context(cafile=str(control_plane.ca))
    with urllib.request.urlopen(request, context=context, timeout=40) as events:
        for event in events:
            conditions = json.loads(event)["object"].get("status", {}).get("conditions") or []
            if {c["type"]: c["status"] for c in conditions}.get("Established") == "True":
                break
        else:
            pytest.fail("the CRD was not established within 30 s")
    return response


def manifest(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": spec}


def dry_run(api: Endpoint, spec: dict[str, Any], name: str = "job") -> Response:
    return call(api, "POST", JOBS_PATH, manifest(name, spec), dryRun="All", fieldValidation="Strict")
