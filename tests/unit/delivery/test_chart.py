"""The chart renders what the operator understands, and refuses what it would not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_operator.settings import LogFormat, OperatorConfig, parse

Objects = list[dict[str, Any]]
Render = Callable[..., Objects]

POOL = {
    "name": "h100", "default": True, "nodeSelector": {"gpu": "h100"}, "gpusPerNode": 8, "gpuMemory": "80Gi",
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def template(helm: Path, root: Path) -> Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]:
    def run(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [helm, "template", "rel", root / "helm/finetune-operator", "-n", "ops", "-f", "-"]
        return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def render(template: Callable[[dict[str, Any]], subprocess.CompletedProcess[str]]) -> Render:
    def run(**values: Any) -> Objects:
        done = template(values)
        assert done.returncode == 0, done.stderr
        return [item for item in yaml.safe_load_all(done.stdout) if item]

    return run


def one(objects: Objects, kind: str) -> dict[str, Any]:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def config(objects: Objects) -> OperatorConfig:
    return parse(yaml.safe_load(one(objects, "ConfigMap")["data"]["config.yaml"]), "chart")


def test_defaults_install_one_of_each(render: Render) -> None:
    kinds = sorted(item["kind"] for item in render())
    assert kinds == sorted(
        ["ConfigMap", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Deployment"]
        + ["ClusterRole", "ClusterRole"]  # what people who may view and edit get
        + ["Role", "RoleBinding", "ServiceAccount"]
    )


def test_default_configuration_is_the_operators_own(render: Render) -> None:
    found = config(render())
    assert found.trainer == OperatorConfig().trainer
    assert found.resources == OperatorConfig().resources
    assert found.storage == OperatorConfig().storage
    assert (found.leader_election.enabled, found.leader_election.lease_name) == (True, "rel-finetune-operator")


def test_every_value_reaches_the_configuration(render: Render) -> None:
    found = config(
        render(
            trainer={
                "image": {"repository": "r/t", "digest": "sha256:" + "0" * 64, "pullPolicy": "Always"},
                "imagePullSecrets": ["pull"], "serviceAccountName": "who", "priorityClassName": "low",
                "env": {"A": "b"}, "labels": {"team": "x"}, "annotations": {"note": "y"},
                "resources": {"cpu": 2, "memory": "8Gi", "ephemeralStorage": "1Gi", "sharedMemory": "2Gi"},
            },
            storage={"uri": "s3://bucket/p", "endpoint": "http://s3:8333", "credentialsSecretRef": {"name": "keys"}},
            nodePools=[POOL], watchNamespaces=["a", "b"], log={"format": "json", "level": "debug"},
            settings={"workers": 3, "resyncSeconds": 60, "scrape": {"intervalSeconds": 2}},
        )
    )  # fmt: skip
    trainer = found.trainer
    assert (trainer.image, trainer.image_pull_policy) == ("r/t@sha256:" + "0" * 64, "Always")
    assert (trainer.image_pull_secrets, trainer.service_account_name) == (("pull",), "who")
    assert (trainer.priority_class_name, trainer.env) == ("low", {"A": "b"})
    assert (trainer.labels, trainer.annotations) == ({"team": "x"}, {"note": "y"})
    assert found.resources.to_wire() == {"cpu": 2, "memory": "8Gi", "ephemeralStorage": "1Gi", "sharedMemory": "2Gi"}
    assert found.storage.uri == "s3://bucket/p"
    assert found.storage.endpoint == "http://s3:8333"
    assert found.storage.credentials_secret_ref is not None
    assert found.storage.credentials_secret_ref.name == "keys"
    assert found.pool("h100") is not None
    assert found.pool("h100") == OperatorConfig.model_validate({"nodePools": [POOL]}).pool("h100")
    assert found.namespaces == ("a", "b")
    assert found.log.format is LogFormat.JSON
    assert (found.workers, found.resync_seconds, found.scrape.interval_seconds) == (3, 60, 2)


def test_crd_is_the_generated_one(render: Render, root: Path) -> None:
    crd = one(render(), "CustomResourceDefinition")
    source = yaml.safe_load((root / "crds/finetunejobs.yaml").read_text("utf-8"))
    assert crd["spec"] == source["spec"]
    assert crd["metadata"]["name"] == source["metadata"]["name"]
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize(
    ("crds", "annotated"), [({"enabled": True, "keep": False}, False), ({"enabled": False, "keep": True}, None)]
)
def test_crd_switches(render: Render, crds: dict[str, bool], annotated: bool | None) -> None:
    found = [item for item in render(crds=crds) if item["kind"] == "CustomResourceDefinition"]
    assert [("annotations" in item["metadata"]) for item in found] == ([] if annotated is None else [annotated])


def permissions(rules: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Verbs by group/resource."""
    return {
        f"{group or 'core'}/{resource}": sorted(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_the_operator_may_do_what_it_does_and_no_more(render: Render) -> None:
    """No wildcard, no Secret, no write to a spec or to a Job."""
    objects = render(rbac={"aggregate": False})
    assert permissions(one(objects, "ClusterRole")["rules"]) == {
        "finetune-operator.io/finetunejobs": ["get", "list", "watch"],
        "finetune-operator.io/finetunejobs/status": ["update"],
        "finetune-operator.io/finetunejobs/finalizers": ["update"],
        "batch/jobs": ["create", "delete", "get", "list", "watch"],
        "core/pods": ["delete", "list", "watch"],
        "core/services": ["create", "get"],
        "core/events": ["list"],
        "events.k8s.io/events": ["create", "get", "patch"],
    }
    create, renew = one(objects, "Role")["rules"]
    assert permissions([create]) == {"coordination.k8s.io/leases": ["create"]}
    assert permissions([renew]) == {"coordination.k8s.io/leases": ["get", "update"]}
    assert renew["resourceNames"] == ["rel-finetune-operator"]


def test_people_who_view_and_edit_get_finetunejobs_and_nothing_else(render: Render) -> None:
    roles = {item["metadata"]["name"]: item for item in render() if item["kind"] == "ClusterRole"}
    view, edit = roles["rel-finetune-operator-view"], roles["rel-finetune-operator-edit"]
    assert permissions(view["rules"]) == {
        "finetune-operator.io/finetunejobs": ["get", "list", "watch"],
        "finetune-operator.io/finetunejobs/status": ["get", "list", "watch"],
    }
    assert permissions(edit["rules"]) == {
        "finetune-operator.io/finetunejobs": ["create", "delete", "deletecollection", "patch", "update"],
    }


def test_named_namespaces_need_no_cluster_role(render: Render) -> None:
    objects = render(watchNamespaces=["a", "b"], leaderElection={"enabled": False})
    assert not [item for item in objects if item["kind"].startswith("ClusterRole")]
    roles = {(item["kind"], item["metadata"]["namespace"]) for item in objects if item["kind"].startswith("Role")}
    assert roles == {("Role", "a"), ("RoleBinding", "a"), ("Role", "b"), ("RoleBinding", "b")}


def test_operator_pod_is_restricted(render: Render) -> None:
    pod = one(render(), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_a_changed_configuration_restarts_the_operator(render: Render) -> None:
    def checksum(**values: Any) -> str:
        template = one(render(**values), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum()
    assert checksum() != checksum(settings={"workers": 2})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replica": 2}, "additional properties 'replica' not allowed"),
        ({"storage": {"uril": "s3://b"}}, "'/storage': additional properties 'uril' not allowed"),
        ({"settings": {"workers": 0}}, "'/settings/workers': minimum: got 0, want 1"),
        ({"nodePools": [{"gpusPerNode": 8}]}, "'/nodePools/0': missing property 'name'"),
        ({"trainer": {"resources": {"cpus": 1}}}, "'/trainer/resources': additional properties 'cpus' not allowed"),
        ({"image": {"repository": "r", "pullPolicy": "Sometimes"}}, "'/image/pullPolicy': value must be one of"),
        ({"replicas": 2, "leaderElection": {"enabled": False}}, "leaderElection.enabled is false"),
    ],
)
def test_what_would_not_work_is_refused_by_name(template: Any, values: dict[str, Any], named: str) -> None:
    done = template(values)
    assert done.returncode != 0
    assert named in done.stderr
