"""The demo on the user's cluster (`CLUSTER=current`) changes and removes only objects that it has created."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from localcluster import ControlPlane, Endpoint, S3Endpoint, build
from tests.support.kubeapi import KubeApi
from tests.support.rig import install_crd
from tests.support.slices import quick_slice

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import demo  # noqa: E402 -- importable only after the change of sys.path
import demo_clusters  # noqa: E402 -- importable only after the change of sys.path

pytestmark = pytest.mark.integration


@pytest.fixture
def users_cluster(tmp_path: Path) -> Any:
    """The user's cluster. Each test has its own API server for it, because the demo creates cluster-scoped objects."""
    with ControlPlane(tmp_path / "state") as endpoint:
        yield endpoint


@pytest.fixture
def current_cluster(
    users_cluster: Endpoint, s3_server: S3Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> demo_clusters.DemoCluster:
    """The demo's access to the cluster to which the user's kubeconfig points. A kubectl program is on the PATH."""
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(f'#!/bin/sh\nexec {build.ensure_built(build.KUBE_PROGRAM)} kubectl "$@"\n')
    kubectl.chmod(0o755)
    for name, value in {
        "PATH": f"{kubectl.parent}{os.pathsep}{os.environ['PATH']}", "KUBECONFIG": str(users_cluster.kubeconfig),
        "OPERATOR_IMAGE": "r/o:1", "TRAINER_IMAGE": "r/t:1", "S3_ENDPOINT": s3_server.host_url,
        "AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return demo_clusters.choose_cluster("current", keep_running=False)


def list_namespace_names(endpoint: Endpoint) -> set[str]:
    return {item["metadata"]["name"] for item in KubeApi(endpoint).list("namespaces", None)}


@pytest.mark.slow  # `make test` runs the demo in tests/e2e/jobs/test_demo.py, and the other test of this file
def test_demo_creates_and_removes_its_namespaces(
    current_cluster: demo_clusters.DemoCluster, users_cluster: Endpoint
) -> None:
    namespaces_before = list_namespace_names(users_cluster)
    current_cluster.up()
    current_cluster.up()  # the demo calls up() again if the previous run had KEEP=1
    install_crd(KubeApi(users_cluster))
    assert list_namespace_names(users_cluster) == namespaces_before | {demo.RELEASE_NAME, demo.NAMESPACE}
    demo.uninstall_objects(current_cluster)
    assert list_namespace_names(users_cluster) == namespaces_before
    assert current_cluster.kubectl("get", "crd", "-o", "name") == ""
    assert not current_cluster.has_demo_objects()


@pytest.mark.parametrize("existing_object", quick_slice(("namespace finetune-operator", "CustomResourceDefinition"), ("CustomResourceDefinition",)))
def test_demo_neither_replaces_nor_removes_existing_objects(
    current_cluster: demo_clusters.DemoCluster, users_cluster: Endpoint, existing_object: str
) -> None:
    api = KubeApi(users_cluster)
    if existing_object == "CustomResourceDefinition":
        install_crd(api)
    else:
        current_cluster.kubectl("create", "namespace", existing_object.partition(" ")[2])
    namespaces_before = list_namespace_names(users_cluster)
    with pytest.raises(demo_clusters.NoCluster, match=f"already has .*{existing_object}"):
        current_cluster.up()
    assert not current_cluster.has_demo_objects()
    assert list_namespace_names(users_cluster) == namespaces_before
    assert json.loads(current_cluster.kubectl("get", "crd", "-o", "json"))["items"] != [] or existing_object != "CustomResourceDefinition"
