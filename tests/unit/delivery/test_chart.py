"""The chart renders a configuration that the operator accepts, and Helm refuses values that the operator would refuse."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_operator.settings import LogFormat, OperatorConfig, parse_config

Objects = list[dict[str, Any]]
Render = Callable[..., Objects]

NODE_POOL = {
    "name": "h100", "default": True, "nodeSelector": {"gpu": "h100"}, "gpusPerNode": 8, "gpuMemory": "80Gi",
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def template(helm: Path, root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [helm, "template", "rel", root / "helm/finetune-operator", "-n", "ops", "-f", "-"]
        return subprocess.run(command, input=json.dumps(values), capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def render(template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    def run(**values: Any) -> Objects:
        done = template(values)
        assert done.returncode == 0, done.stderr
        return [item for item in yaml.safe_load_all(done.stdout) if item]

    return run


def only_object(objects: Objects, kind: str) -> dict[str, Any]:
    (matching,) = [item for item in objects if item["kind"] == kind]
    return matching


def config(objects: Objects) -> OperatorConfig:
    return parse_config(yaml.safe_load(only_object(objects, "ConfigMap")["data"]["config.yaml"]), "chart")


def test_default_values_render_the_expected_objects(render: Render) -> None:
    kinds = sorted(item["kind"] for item in render())
    assert kinds == sorted(
        ["ConfigMap", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Deployment"]
        + ["ClusterRole", "ClusterRole"]  # aggregated into the cluster roles `view` and `edit`
        + ["Role", "RoleBinding", "ServiceAccount"]
    )


def test_default_values_are_the_operators_defaults(render: Render) -> None:
    settings = config(render())
    assert settings.trainer == OperatorConfig().trainer
    assert settings.resources == OperatorConfig().resources
    assert settings.storage == OperatorConfig().storage
    assert (settings.leader_election.enabled, settings.leader_election.lease_name) == (True, "rel-finetune-operator")


def test_every_value_reaches_the_configuration(render: Render) -> None:
    settings = config(
        render(
            trainer={
                "image": {"repository": "r/t", "digest": "sha256:" + "0" * 64, "pullPolicy": "Always"},
                "imagePullSecrets": ["pull"], "serviceAccountName": "who", "priorityClassName": "low",
                "env": {"A": "b"}, "labels": {"team": "x"}, "annotations": {"note": "y"},
                "resources": {"cpu": 2, "memory": "8Gi", "ephemeralStorage": "1Gi", "sharedMemory": "2Gi"},
            },
            storage={"uri": "s3://bucket/p", "endpoint": "http://s3:8333", "credentialsSecretRef": {"name": "keys"}},
            nodePools=[NODE_POOL], watchNamespaces=["a", "b"], log={"format": "json", "level": "debug"},
            settings={"workers": 3, "resyncSeconds": 60, "scrape": {"intervalSeconds": 2}},
        )
    )  # fmt: skip
    trainer = settings.trainer
    assert (trainer.image, trainer.image_pull_policy) == ("r/t@sha256:" + "0" * 64, "Always")
    assert (trainer.image_pull_secrets, trainer.service_account_name) == (("pull",), "who")
    assert (trainer.priority_class_name, trainer.env) == ("low", {"A": "b"})
    assert (trainer.labels, trainer.annotations) == ({"team": "x"}, {"note": "y"})
    assert settings.resources.to_wire() == {"cpu": 2, "memory": "8Gi", "ephemeralStorage": "1Gi", "sharedMemory": "2Gi"}
    assert settings.storage.uri == "s3://bucket/p"
    assert settings.storage.endpoint == "http://s3:8333"
    assert settings.storage.credentials_secret_ref is not None
    assert settings.storage.credentials_secret_ref.name == "keys"
    assert settings.find_pool("h100") is not None
    assert settings.find_pool("h100") == OperatorConfig.model_validate({"nodePools": [NODE_POOL]}).find_pool("h100")
    assert settings.namespaces == ("a", "b")
    assert settings.log.format is LogFormat.JSON
    assert (settings.workers, settings.resync_seconds, settings.scrape.interval_seconds) == (3, 60, 2)


def test_chart_installs_the_generated_crd(render: Render, root: Path) -> None:
    crd = only_object(render(), "CustomResourceDefinition")
    source = yaml.safe_load((root / "crds/finetunejobs.yaml").read_text("utf-8"))
    assert crd["spec"] == source["spec"]
    assert crd["metadata"]["name"] == source["metadata"]["name"]
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize(
    ("crds", "has_annotations"), [({"enabled": True, "keep": False}, False), ({"enabled": False, "keep": True}, None)]
)
def test_crd_values_install_and_annotate_the_crd(render: Render, crds: dict[str, bool], has_annotations: bool | None) -> None:
    found = [item for item in render(crds=crds) if item["kind"] == "CustomResourceDefinition"]
    assert [("annotations" in item["metadata"]) for item in found] == ([] if has_annotations is None else [has_annotations])


def verbs_by_resource(rules: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Verbs by group/resource."""
    return {
        f"{group or 'core'}/{resource}": sorted(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_operator_has_exactly_the_expected_permissions(render: Render) -> None:
    """The operator has no wildcard permission, and it cannot read Secrets or change a spec or a Job."""
    objects = render(rbac={"aggregate": False})
    assert verbs_by_resource(only_object(objects, "ClusterRole")["rules"]) == {
        "finetune-operator.io/finetunejobs": ["get", "list", "watch"],
        "finetune-operator.io/finetunejobs/status": ["update"],
        "finetune-operator.io/finetunejobs/finalizers": ["update"],
        "batch/jobs": ["create", "delete", "get", "list", "watch"],
        "core/pods": ["delete", "list", "watch"],
        "core/services": ["create", "get"],
        "core/events": ["list"],
        "events.k8s.io/events": ["create", "get", "patch"],
    }
    create, renew = only_object(objects, "Role")["rules"]
    assert verbs_by_resource([create]) == {"coordination.k8s.io/leases": ["create"]}
    assert verbs_by_resource([renew]) == {"coordination.k8s.io/leases": ["get", "update"]}
    assert renew["resourceNames"] == ["rel-finetune-operator"]


def test_roles_view_and_edit_get_only_finetunejobs(render: Render) -> None:
    roles = {item["metadata"]["name"]: item for item in render() if item["kind"] == "ClusterRole"}
    view, edit = roles["rel-finetune-operator-view"], roles["rel-finetune-operator-edit"]
    assert verbs_by_resource(view["rules"]) == {
        "finetune-operator.io/finetunejobs": ["get", "list", "watch"],
        "finetune-operator.io/finetunejobs/status": ["get", "list", "watch"],
    }
    assert verbs_by_resource(edit["rules"]) == {
        "finetune-operator.io/finetunejobs": ["create", "delete", "deletecollection", "patch", "update"],
    }


def test_watch_namespaces_need_no_cluster_role(render: Render) -> None:
    objects = render(watchNamespaces=["a", "b"], leaderElection={"enabled": False})
    assert not [item for item in objects if item["kind"].startswith("ClusterRole")]
    roles = {(item["kind"], item["metadata"]["namespace"]) for item in objects if item["kind"].startswith("Role")}
    assert roles == {("Role", "a"), ("RoleBinding", "a"), ("Role", "b"), ("RoleBinding", "b")}


def test_operator_pod_meets_pod_security_restricted(render: Render) -> None:
    pod = only_object(render(), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_changed_configuration_restarts_the_operator(render: Render) -> None:
    def checksum(**values: Any) -> str:
        template = only_object(render(**values), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum()
    assert checksum() != checksum(settings={"workers": 2})


@pytest.mark.parametrize(
    ("values", "message"),
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
def test_wrong_value_is_refused_by_helm_with_its_key(template: Any, values: dict[str, Any], message: str) -> None:
    done = template(values)
    assert done.returncode != 0
    assert message in done.stderr


WRONG_PLATFORM_VALUES = {
    "trainer": {
        "resources": {"memory": "4GB", "cpu": -1, "sharedMemory": 0.5},
        "labels": {"team!": "x", "team": "a b", "finetune-operator.io/uid": "x"}, "annotations": {"a b": ""},
        "env": {"1ST": "x", "FINETUNE_UID": "x", "DEBUG": 1},
        "serviceAccountName": "Who", "priorityClassName": "a b", "imagePullSecrets": ["A"],
    },
    "watchNamespaces": ["a.b"],
    "nodePools": [
        {"name": "a", "resources": {"cpu": "two"}, "gpuMemory": "80GB", "nodeSelector": {"gpu": "h 100"}},
        {"name": "b", "tolerations": [
            {"key": "gpu", "operator": "Exists", "value": "yes"}, {"effect": "NoSchedule"},
            {"key": "gpu", "tolerationSeconds": 3, "operator": "Exists"}, {"key": "gpu", "value": "a b"},
        ]},
    ],
    "resources": {"limits": {"memory": "512MB"}}, "podLabels": {"team": "a b"}, "nodeSelector": {"a b": "c"},
    "tolerations": [{"operator": "Equal"}],
}  # fmt: skip


def test_wrong_platform_values_are_refused_by_helm_with_their_keys(template: Any) -> None:
    """The chart's schema contains Kubernetes' rules for these values. tests/unit/operator/test_settings.py tests the operator's rules."""
    done = template(WRONG_PLATFORM_VALUES)
    assert done.returncode != 0
    for error in [
        "'/trainer/resources/memory': '4GB'", "'/trainer/resources/cpu': minimum", "'/trainer/resources/sharedMemory': got number",
        "'/trainer/labels': additional properties 'team!'", "'/trainer/labels/team': 'a b'",
        "'/trainer/labels/finetune-operator.io~1uid'", "'/trainer/annotations': additional properties 'a b'",
        "'/trainer/env': additional properties '1ST'", "'/trainer/env/FINETUNE_UID'", "'/trainer/env/DEBUG': got number",
        "'/trainer/serviceAccountName': 'Who'", "'/trainer/priorityClassName': 'a b'", "'/trainer/imagePullSecrets/0': 'A'",
        "'/watchNamespaces/0': 'a.b'", "'/nodePools/0/resources/cpu': 'two'", "'/nodePools/0/gpuMemory': '80GB'",
        "'/nodePools/0/nodeSelector/gpu': 'h 100'", "'/nodePools/1/tolerations/0/value'", "'/nodePools/1/tolerations/1'",
        "'/nodePools/1/tolerations/2': missing property 'effect'", "'/nodePools/1/tolerations/3/value': 'a b'",
        "'/resources/limits/memory': '512MB'", "'/podLabels/team': 'a b'", "'/nodeSelector': additional properties 'a b'",
        "'/tolerations/0'",
    ]:  # fmt: skip
        assert error in done.stderr


def test_correct_platform_values_are_accepted(render: Render) -> None:
    """Corrected values of the previous test."""
    tolerations = [
        {"operator": "Exists"},
        {"key": "gpu", "value": ""},
        {"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0},
    ]
    resources = {"cpu": 0, "memory": "1.5Gi", "ephemeralStorage": "1e9", "sharedMemory": "512M"}
    settings = config(
        render(
            trainer={
                "labels": {"example.com/team": "", "k" * 63: "v" * 63}, "annotations": {"example.com/note": "any text"},
                "env": {"_DEBUG1": ""}, "serviceAccountName": "a.b-c", "resources": resources,
            },
            nodePools=[{"name": "h100", "nodeSelector": {"gpu": "h100"}, "tolerations": tolerations, "gpuMemory": "80Gi"}],
            resources={"requests": {"cpu": "100m"}, "limits": {"memory": "512Mi", "nvidia.com/gpu": 1}},
        )
    )  # fmt: skip
    assert [toleration.to_wire() for toleration in settings.node_pools[0].tolerations] == tolerations
    assert settings.resources.to_wire() == resources
