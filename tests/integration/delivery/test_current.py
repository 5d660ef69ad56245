"""`CLUSTER=current`: the only cluster of the demo that belongs to somebody else."""

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

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import demo  # noqa: E402 -- a script, importable only now
import demo_clusters  # noqa: E402 -- a script, importable only now

pytestmark = pytest.mark.integration


@pytest.fixture
def somebodys(tmp_path: Path) -> Any:
    """An API server of its own: what is claimed here belongs to the whole cluster."""
    with ControlPlane(tmp_path / "state") as endpoint:
        yield endpoint


@pytest.fixture
def current(
    somebodys: Endpoint, s3_server: S3Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> demo_clusters.DemoCluster:
    """The demo's view of it, with kubectl on the PATH."""
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(f'#!/bin/sh\nexec {build.ensure(build.KUBE)} kubectl "$@"\n')
    kubectl.chmod(0o755)
    for name, value in {
        "PATH": f"{kubectl.parent}{os.pathsep}{os.environ['PATH']}", "KUBECONFIG": str(somebodys.kubeconfig),
        "OPERATOR_IMAGE": "r/o:1", "TRAINER_IMAGE": "r/t:1", "S3_ENDPOINT": s3_server.host_url,
        "AWS_ACCESS_KEY_ID": s3_server.access_key, "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return demo_clusters.choose("current", keep=False)


def namespaces(endpoint: Endpoint) -> set[str]:
    return {one["metadata"]["name"] for one in KubeApi(endpoint).list("namespaces", None)}


def test_it_brings_its_namespaces_and_takes_them_away(
    current: demo_clusters.DemoCluster, somebodys: Endpoint
) -> None:
    before = namespaces(somebodys)
    current.up()
    current.up()  # what KEEP=1 left up is its own
    install_crd(KubeApi(somebodys))
    assert namespaces(somebodys) == before | {demo.RELEASE, demo.NAMESPACE}
    demo.leave(current)
    assert namespaces(somebodys) == before
    assert current.kubectl("get", "crd", "-o", "name") == ""
    assert not current.is_guest()


@pytest.mark.parametrize("there", ["namespace finetune-operator", "definition"])
def test_what_it_did_not_bring_it_neither_replaces_nor_removes(
    current: demo_clusters.DemoCluster, somebodys: Endpoint, there: str
) -> None:
    api = KubeApi(somebodys)
    if there == "definition":
        install_crd(api)
    else:
        current.kubectl("create", "namespace", there.partition(" ")[2])
    before = namespaces(somebodys)
    with pytest.raises(demo_clusters.NoCluster, match=f"has .*{there}.*, which the demo did not bring"):
        current.up()
    assert not current.is_guest()
    assert namespaces(somebodys) == before
    assert json.loads(current.kubectl("get", "crd", "-o", "json"))["items"] != [] or there != "definition"
