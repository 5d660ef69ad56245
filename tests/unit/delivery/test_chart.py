"""The chart renders a configuration that the operator accepts, and Helm refuses values that the operator would refuse."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from finetune_api import names
from finetune_cli.main import app
from finetune_cli.openai_server.config import load_config
from finetune_cli.openai_server.job_requests import check_models
from finetune_operator.settings import LogFormat, OperatorConfig, parse_config

Objects = list[dict[str, Any]]
Render = Callable[..., Objects]

NODE_POOL = {
    "name": "h100", "default": True, "nodeSelector": {"gpu": "h100"}, "gpusPerNode": 8, "gpuMemory": "80Gi",
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}  # fmt: skip

OPENAI_SERVER = {
    "enabled": True, "models": {"gpt-4o-mini": {"spec": {"model": {"source": "org/small"}}}}, "storage": {"uri": "s3://models/jobs"},
    "keysSecret": "api-keys", "credentialsSecret": "s3-keys",
    "accounts": [{"namespace": "team-a", "serviceAccounts": ["alice", "bob"]}, {"namespace": "team-b", "serviceAccounts": ["carol"]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def template(helm: Path, root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(values: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [helm, "template", "rel", root / "helm/finetune-operator", "-n", "ops", "-f", "-"]
        return subprocess.run(command, input=json.dumps({"imageRegistry": "example.org"} | values), capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def render(template: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    def run(**values: Any) -> Objects:
        completed_process = template(values)
        assert completed_process.returncode == 0, completed_process.stderr
        return [item for item in yaml.load_all(completed_process.stdout, yaml.CSafeLoader) if item]

    return run


def select_only_object(objects: Objects, kind: str) -> dict[str, Any]:
    (matching_object,) = [item for item in objects if item["kind"] == kind]
    return matching_object


def read_config(objects: Objects) -> OperatorConfig:
    return parse_config(yaml.safe_load(select_only_object(objects, "ConfigMap")["data"]["config.yaml"]), "chart")


def test_default_values_render_the_expected_objects(render: Render) -> None:
    kinds = sorted(item["kind"] for item in render())
    assert kinds == sorted(
        ["ConfigMap", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "Deployment"]
        + ["ClusterRole", "ClusterRole"]  # aggregated into the cluster roles `view` and `edit`
        + ["Role", "RoleBinding"] * 2  # for the Lease, and for the key from which the Secrets of attempts are derived
        + ["ServiceAccount", "Service"]
        + ["Pod"]  # the pod of `helm test`
    )


def test_default_values_are_the_operators_defaults(render: Render) -> None:
    settings = read_config(render())
    assert settings.trainer == OperatorConfig().trainer.model_copy(update={"image": "example.org/finetune-trainer:0.2.0"})
    assert settings.resources == OperatorConfig().resources
    assert settings.storage == OperatorConfig().storage
    assert settings.policy.rules_for("any") == OperatorConfig().policy.rules_for("any")
    assert (settings.leader_election.enabled, settings.leader_election.lease_name) == (True, "rel-finetune-operator")


def test_every_value_reaches_the_configuration(render: Render) -> None:
    settings = read_config(
        render(
            trainer={
                "image": {"repository": "r/t", "digest": "sha256:" + "0" * 64, "pullPolicy": "Always"},
                "imagePullSecrets": ["pull"], "serviceAccountName": "who", "priorityClassName": "low",
                "env": {"A": "b"}, "labels": {"team": "x"}, "annotations": {"note": "y"},
                "resources": {"cpu": 2, "memory": "8Gi", "ephemeralStorage": "1Gi", "sharedMemory": "2Gi", "perGpu": {"cpu": 4}},
            },
            storage={"uri": "s3://bucket/p", "endpoint": "http://s3:8333", "credentialsSecretRef": {"name": "keys"}},
            policy={"images": ["r/*"], "maxNodes": 3, "namespaces": [{"names": ["a"], "allowUserCode": False}]},
            nodePools=[NODE_POOL], watchNamespaces=["a", "b"], log={"format": "json", "level": "debug"},
            settings={"workers": 3, "resyncSeconds": 60, "scrape": {"intervalSeconds": 2}},
        )
    )  # fmt: skip
    trainer = settings.trainer
    assert (trainer.image, trainer.image_pull_policy) == ("r/t@sha256:" + "0" * 64, "Always")
    assert (trainer.image_pull_secrets, trainer.service_account_name) == (("pull",), "who")
    assert (trainer.priority_class_name, trainer.env) == ("low", {"A": "b"})
    assert (trainer.labels, trainer.annotations) == ({"team": "x"}, {"note": "y"})
    assert settings.resources.to_wire() == {
        "cpu": 2, "memory": "8Gi", "ephemeralStorage": "1Gi", "sharedMemory": "2Gi", "perGpu": {"cpu": 4},
    }  # fmt: skip
    assert settings.storage.uri == "s3://bucket/p"
    assert settings.storage.endpoint == "http://s3:8333"
    assert settings.storage.credentials_secret_ref is not None
    assert settings.storage.credentials_secret_ref.name == "keys"
    assert settings.find_pool("h100") is not None
    assert settings.find_pool("h100") == OperatorConfig.model_validate({"nodePools": [NODE_POOL]}).find_pool("h100")
    rules = settings.policy.rules_for("a")
    assert (rules.images, rules.max_nodes, rules.allow_user_code, rules.service_accounts) == (("r/*",), 3, False, ("default",))
    assert settings.namespaces == ("a", "b")
    assert settings.log.format is LogFormat.JSON
    assert (settings.workers, settings.resync_seconds, settings.scrape.interval_seconds) == (3, 60, 2)


def test_chart_installs_the_generated_crd(render: Render, root: Path) -> None:
    crd = select_only_object(render(), "CustomResourceDefinition")
    source = yaml.safe_load((root / "crds/finetunejobs.yaml").read_text("utf-8"))
    assert crd["spec"] == source["spec"]
    assert crd["metadata"]["name"] == source["metadata"]["name"]
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize(
    ("crds", "has_annotations"), [({"enabled": True, "keep": False}, False), ({"enabled": False, "keep": True}, None)]
)
def test_crd_values_install_and_annotate_the_crd(render: Render, crds: dict[str, bool], has_annotations: bool | None) -> None:
    crd_objects = [item for item in render(crds=crds) if item["kind"] == "CustomResourceDefinition"]
    assert [("annotations" in item["metadata"]) for item in crd_objects] == ([] if has_annotations is None else [has_annotations])


def collect_verbs_by_resource(rules: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the verbs that the rules allow, by `group/resource`."""
    return {
        f"{group or 'core'}/{resource}": sorted(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_operator_has_exactly_the_expected_permissions(render: Render) -> None:
    """The operator has no wildcard permission. Its own key is the only Secret that it can read, and it can change neither a spec nor a Job."""
    objects = render(rbac={"aggregate": False})
    assert collect_verbs_by_resource(select_only_object(objects, "ClusterRole")["rules"]) == {
        "finetune-operator.io/finetunejobs": ["get", "list", "watch"],
        "finetune-operator.io/finetunejobs/status": ["update"],
        "finetune-operator.io/finetunejobs/finalizers": ["update"],
        "batch/jobs": ["create", "delete", "get", "list", "watch"],
        "core/pods": ["delete", "list", "watch"],
        "core/services": ["create", "get"],
        "core/events": ["list"],
        "events.k8s.io/events": ["create", "get", "patch"],
        "core/secrets": ["create"],
        "networking.k8s.io/networkpolicies": ["create", "get"],
    }
    roles = {item["metadata"]["name"]: item["rules"] for item in objects if item["kind"] == "Role"}
    create_key_rule, read_key_rule = roles.pop("rel-finetune-operator-attempt-key")
    assert collect_verbs_by_resource([create_key_rule]) == {"core/secrets": ["create"]}
    assert collect_verbs_by_resource([read_key_rule]) == {"core/secrets": ["get"]}
    assert read_key_rule["resourceNames"] == ["rel-finetune-operator-attempt-key"] == [read_config(objects).isolation.key_secret_name]
    ((create_rule, renew_rule),) = roles.values()
    assert collect_verbs_by_resource([create_rule]) == {"coordination.k8s.io/leases": ["create"]}
    assert collect_verbs_by_resource([renew_rule]) == {"coordination.k8s.io/leases": ["get", "update"]}
    assert renew_rule["resourceNames"] == ["rel-finetune-operator"]


def test_the_cache_of_models_reaches_the_operator(render: Render, template: Any) -> None:
    node = {"path": "/var/lib/finetune-models", "sizeLimit": "1Ti", "namespaces": ["ml-*"]}
    cache = read_config(render(modelCache={"default": "node", "node": node})).model_cache
    assert (cache.default, cache.node.path, cache.node.size_limit_bytes, cache.node.namespaces) == ("node", node["path"], 2**40, ("ml-*",))
    default_cache = read_config(render()).model_cache
    assert (default_cache.default, default_cache.node.path, default_cache.node.namespaces) == (None, None, ())
    for values, error in (
        ({"default": "node"}, "modelCache.default is node, but modelCache.node.path or modelCache.node.namespaces is empty"),
        ({"node": {"path": "/var/lib/x"}}, "modelCache.node.path and modelCache.node.namespaces only have an effect together"),
        ({"node": {"path": "/"}}, "'/modelCache/node/path': '/' does not match pattern"),
        ({"default": "s3://bucket/x"}, "'/modelCache/default': 's3://bucket/x' does not match pattern"),
    ):
        assert error in template({"modelCache": values}).stderr


def test_isolation_values_reach_the_configuration_and_the_permissions(render: Render, template: Any) -> None:
    own_pods = {"app.kubernetes.io/name": "finetune-operator", "app.kubernetes.io/instance": "rel"}
    default_isolation = read_config(render()).isolation
    assert (default_isolation.secret, default_isolation.network_policy) == (True, True)
    assert (default_isolation.all_blocked_cidrs, default_isolation.metrics_from) == ((), ())
    assert (default_isolation.operator_namespace, default_isolation.operator_labels) == ("ops", own_pods)
    labels = select_only_object(render(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert own_pods.items() <= labels.items()

    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    changed_isolation = read_config(render(isolation={"metricsFrom": [monitoring], "blockMetadata": True, "blockedCidrs": ["10.1.0.0/16"]})).isolation
    assert (changed_isolation.metrics_from, changed_isolation.blocked_cidrs, changed_isolation.block_metadata) == ((monitoring,), ("10.1.0.0/16",), True)

    objects = render(rbac={"aggregate": False}, isolation={"secret": False, "networkPolicy": False})
    disabled_isolation = read_config(objects).isolation
    assert (disabled_isolation.secret, disabled_isolation.network_policy) == (False, False)
    assert {"core/secrets", "networking.k8s.io/networkpolicies"} & set(collect_verbs_by_resource(select_only_object(objects, "ClusterRole")["rules"])) == set()
    roles = {item["metadata"]["name"]: collect_verbs_by_resource(item["rules"]) for item in objects if item["kind"] == "Role"}
    # Pods of attempts that started while isolation.secret was true still require a token. So the operator still needs the permission to read its key.
    assert (set(roles), roles["rel-finetune-operator-attempt-key"]) == (
        {"rel-finetune-operator-lease", "rel-finetune-operator-attempt-key"}, {"core/secrets": ["get"]},
    )  # fmt: skip

    refused_process = template({"isolation": {"networkPolicy": False, "blockMetadata": True}})
    assert "isolation.networkPolicy is false, so isolation.blockMetadata" in refused_process.stderr
    wrong_process = template({"isolation": {"secret": "yes", "blockedCidrs": ["10.0.0.1"], "keySecretName": "own"}})
    for error in [
        "'/isolation/secret': got string", "'/isolation/blockedCidrs/0': '10.0.0.1' does not match",
        "'/isolation': additional properties 'keySecretName'",
    ]:  # fmt: skip
        assert error in wrong_process.stderr


def test_roles_view_and_edit_get_only_finetunejobs(render: Render) -> None:
    roles = {item["metadata"]["name"]: item for item in render() if item["kind"] == "ClusterRole"}
    view, edit = roles["rel-finetune-operator-view"], roles["rel-finetune-operator-edit"]
    assert collect_verbs_by_resource(view["rules"]) == {
        "finetune-operator.io/finetunejobs": ["get", "list", "watch"],
        "finetune-operator.io/finetunejobs/status": ["get", "list", "watch"],
    }
    assert collect_verbs_by_resource(edit["rules"]) == {
        "finetune-operator.io/finetunejobs": ["create", "delete", "deletecollection", "patch", "update"],
    }


def test_watch_namespaces_need_no_cluster_role(render: Render) -> None:
    objects = render(watchNamespaces=["a", "b"], leaderElection={"enabled": False}, isolation={"secret": False})
    assert not [item for item in objects if item["kind"].startswith("ClusterRole")]
    roles = {(item["kind"], item["metadata"]["namespace"]) for item in objects if item["kind"].startswith("Role")}
    assert roles == {("Role", "a"), ("RoleBinding", "a"), ("Role", "b"), ("RoleBinding", "b"), ("Role", "ops"), ("RoleBinding", "ops")}


def test_operator_pod_meets_pod_security_restricted(render: Render) -> None:
    pod_spec = select_only_object(render(), "Deployment")["spec"]["template"]["spec"]
    (container,) = pod_spec["containers"]
    assert pod_spec["securityContext"]["runAsNonRoot"] is True
    assert pod_spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip


def test_changed_configuration_restarts_the_operator(render: Render) -> None:
    def get_checksum(**values: Any) -> str:
        template = select_only_object(render(**values), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert get_checksum() == get_checksum()
    assert get_checksum() != get_checksum(settings={"workers": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "additional properties 'replica' not allowed"),
        ({"storage": {"uril": "s3://b"}}, "'/storage': additional properties 'uril' not allowed"),
        ({"settings": {"workers": 0}}, "'/settings/workers': minimum: got 0, want 1"),
        ({"nodePools": [{"gpusPerNode": 8}]}, "'/nodePools/0': missing property 'name'"),
        ({"trainer": {"resources": {"cpus": 1}}}, "'/trainer/resources': additional properties 'cpus' not allowed"),
        ({"image": {"repository": "r", "pullPolicy": "Sometimes"}}, "'/image/pullPolicy': value must be one of"),
        ({"policy": {"image": ["*"]}}, "'/policy': additional properties 'image' not allowed"),
        ({"policy": {"images": ["a b"]}}, "'/policy/images/0': 'a b' does not match pattern"),
        ({"policy": {"secrets": ["{storage}"]}}, "'/policy/secrets/0': '{storage}' does not match pattern"),
        ({"policy": {"maxGpus": "8"}}, "'/policy/maxGpus': got string, want integer"),
        ({"policy": {"namespaces": [{"images": []}]}}, "'/policy/namespaces/0': missing property 'names'"),
        ({"policy": {"validatingAdmissionPolicy": True, "images": None}}, "policy.images is null: write a list of patterns"),
    ],
)
def test_wrong_value_is_refused_by_helm_with_its_key(template: Any, values: dict[str, Any], message: str) -> None:
    completed_process = template(values)
    assert completed_process.returncode != 0
    assert message in completed_process.stderr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"imageRegistry": ""}, "imageRegistry is empty and image.repository (finetune-operator) names no registry, "
         "so nodes cannot pull the image: push the images to a registry, and write imageRegistry, for example registry.example.com/ml"),
        ({"replicas": 2, "leaderElection": {"enabled": False}},
         "two active operators would interfere with each other: set leaderElection.enabled to true, or replicas to 1"),
        ({"leaderElection": {"renewDeadlineSeconds": 20}},
         "leaseDurationSeconds 15, renewDeadlineSeconds 20 and retryPeriodSeconds 2: leaseDurationSeconds must exceed"),
        ({"serviceAccount": {"create": False}}, "with it every pod of the namespace: write serviceAccount.name"),
        ({"nodePools": [{"name": "a"}, {"name": "a"}]}, "nodePools contains a more than once: use different names"),
        ({"nodePools": [{"name": "a", "default": True}, {"name": "b", "default": True}]}, "nodePools marks a and b as default: mark only one pool"),
        ({"extraEnv": [{"name": "POD_NAME", "value": "x"}]}, "extraEnv contains POD_NAME, which the chart sets: remove it"),
        ({"extraVolumes": [{"name": "tmp", "emptyDir": {}}]}, "extraVolumes contains the name tmp, which the chart uses: write another name"),
        ({"openshift": True, "podSecurityContext": {"fsGroup": 5}}, "podSecurityContext.fsGroup is 5 and openshift is true: OpenShift assigns the ids itself"),
        ({"podDisruptionBudget": {"minAvailable": 1, "maxUnavailable": 1}}, "accepts only one of them: remove one"),
        ({"podDisruptionBudget": {"enabled": True, "minAvailable": 1}},
         "minAvailable is 1 and replicas is 1, so no node with an operator pod could be drained"),
        ({"podDisruptionBudget": {"enabled": True, "minAvailable": "100%"}, "replicas": 3}, "minAvailable is 100% and replicas is 3, so no node"),
        ({"metrics": {"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}}, "Prometheus would count everything twice: enable only one"),
        ({"metrics": {"serviceMonitor": {"enabled": True}, "service": {"enabled": False}}}, "enable the Service, or use metrics.podMonitor"),
        ({"openaiServer": {"enabled": True}}, "neither openaiServer.storage.uri nor storage.uri is an S3 address"),
        ({"openaiServer": {"enabled": True, "storage": {"uri": "s3://b1b"}}}, "openaiServer.models is empty: write the name of each model and its spec"),
        ({"openaiServer": {"enabled": True, "storage": {"uri": "s3://b1b"}, "models": {"m": {"spec": {}}}}}, "openaiServer.keysSecret is empty"),
        ({"openaiServer": {"enabled": True, "storage": {"uri": "s3://b1b"}, "models": {"m": {"spec": {}}}, "keysSecret": "k"}},
         "openaiServer.accounts is empty, so the server could act as no ServiceAccount"),
        ({"openaiServer": OPENAI_SERVER | {"storage": {"uri": "s3://b1b", "encryption": {"type": "s3"}}}},
         "openaiServer.storage.encryption is set, but the OpenAI server cannot use this field when it writes the files of clients: set the default encryption"),
        ({"openaiServer": OPENAI_SERVER | {"storage": {}}, "storage": {"uri": "s3://b1b", "caBundleRef": {"name": "ca", "key": "ca.crt"}}},
         "storage.caBundleRef is set, but the OpenAI server cannot use this field when it writes the files of clients: write an endpoint whose certificate"),
        ({"openaiServer": OPENAI_SERVER | {"accounts": [{"namespace": "a", "serviceAccounts": ["x"]}] * 2}},
         "accounts contains the namespace a more than once"),
        ({"metrics": {"prometheusRule": {"disabledAlerts": ["Nope"]}}},
         "disabledAlerts contains Nope, but the chart has no such alert: write one of FineTuneOperatorAbsent,"),
    ],
)  # fmt: skip
def test_contradictory_values_are_refused_with_the_value_to_write(template: Any, values: dict[str, Any], message: str) -> None:
    completed_process = template(values)
    assert completed_process.returncode != 0
    assert message in completed_process.stderr


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
    """The chart's schema repeats the rules of Kubernetes for these values. tests/unit/operator/test_settings.py tests that the operator applies these rules
    too.
    """
    completed_process = template(WRONG_PLATFORM_VALUES)
    assert completed_process.returncode != 0
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
        assert error in completed_process.stderr


WRONG_CHART_VALUES = {
    "imageRegistry": "https://r.example.com", "image": {"repository": "r:1.0"}, "watchNamespaces": ["a", "a"], "openshift": "yes",
    "extraEnv": [{"name": "A B"}], "extraVolumes": {"a": "b"}, "extraVolumeMounts": [{"name": "a"}],
    "topologySpreadConstraints": [{"topologyKey": "zone"}], "runtimeClassName": "A", "podDisruptionBudget": {"minAvailable": "half"},
    "networkPolicy": {"apiServerPorts": [0], "apiServerCidrs": ["10.0.0.1"]},
    "metrics": {"serviceMonitor": {"interval": "30"}, "prometheusRules": {}},
    "trainer": {"resources": {"perGpu": {"memory": "8GB"}}, "fixedUser": False},
}  # fmt: skip


def test_wrong_chart_values_are_refused_by_helm_with_their_keys(template: Any) -> None:
    completed_process = template(WRONG_CHART_VALUES)
    assert completed_process.returncode != 0
    for error in [
        "'/imageRegistry': 'https://r.example.com' does not match", "'/image/repository': 'r:1.0' does not match",
        "'/watchNamespaces': items at 0 and 1 are equal", "'/openshift': got string, want boolean",
        "'/extraEnv/0/name': 'A B' does not match", "'/extraVolumes': got object, want array",
        "'/extraVolumeMounts/0': missing property 'mountPath'", "'/topologySpreadConstraints/0': missing property 'whenUnsatisfiable'",
        "'/runtimeClassName': 'A' does not match", "'/podDisruptionBudget/minAvailable': 'half' does not match",
        "'/networkPolicy/apiServerPorts/0': minimum: got 0, want 1", "'/networkPolicy/apiServerCidrs/0': '10.0.0.1' does not match",
        "'/metrics/serviceMonitor/interval': '30' does not match", "'/metrics': additional properties 'prometheusRules' not allowed",
        "'/trainer/resources/perGpu/memory': '8GB'", "'/trainer': additional properties 'fixedUser' not allowed",
    ]:  # fmt: skip
        assert error in completed_process.stderr


def test_correct_platform_values_are_accepted(render: Render) -> None:
    """Helm accepts the fields that have wrong values in WRONG_PLATFORM_VALUES, if they have correct values."""
    tolerations = [
        {"operator": "Exists"},
        {"key": "gpu", "value": ""},
        {"key": "gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0},
    ]
    resources = {"cpu": 0, "memory": "1.5Gi", "ephemeralStorage": "1e9", "sharedMemory": "512M"}
    settings = read_config(
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
    assert settings.resources.to_wire() == resources | {"perGpu": {}}


@pytest.mark.parametrize(
    ("values", "operator", "trainer"),
    [
        ({}, "example.org/finetune-operator:0.2.0", "example.org/finetune-trainer:0.2.0"),
        ({"imageRegistry": "r:5000/ml/", "image": {"tag": "x"}}, "r:5000/ml/finetune-operator:x", "r:5000/ml/finetune-trainer:0.2.0"),
        ({"image": {"repository": "r/o"}, "trainer": {"image": {"repository": "r/t", "tag": "1"}}}, "r/o:0.2.0", "r/t:1"),
        ({"image": {"digest": "sha256:" + "a" * 64}}, "example.org/finetune-operator@sha256:" + "a" * 64, "example.org/finetune-trainer:0.2.0"),
    ],
)  # fmt: skip
def test_images_have_the_app_version_unless_the_values_name_another_tag(render: Render, values: dict[str, Any], operator: str, trainer: str) -> None:
    objects = render(**values)
    assert get_pod_spec(objects)["containers"][0]["image"] == operator
    assert select_only_object(objects, "Pod")["spec"]["containers"][0]["image"] == operator
    assert read_config(objects).trainer.image == trainer


def test_chart_metadata_has_the_version_of_the_package_and_the_quickstart(root: Path) -> None:
    chart = yaml.safe_load((root / "helm/finetune-operator/Chart.yaml").read_text("utf-8"))
    version = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert (chart["version"], chart["appVersion"]) == (version, version)
    assert OperatorConfig().trainer.image == f"finetune-trainer:{version}"
    quickstart = yaml.safe_load((root / "examples/quickstart.yaml").read_text("utf-8"))
    assert yaml.safe_load(chart["annotations"]["artifacthub.io/crdsExamples"]) == [quickstart]
    (crd,) = yaml.safe_load(chart["annotations"]["artifacthub.io/crds"])
    assert (crd["kind"], crd["name"]) == ("FineTuneJob", "finetunejobs.finetune-operator.io")
    assert {change["kind"] for change in yaml.safe_load(chart["annotations"]["artifacthub.io/changes"])} <= {"added", "changed", "fixed", "removed"}


def test_every_value_is_documented(root: Path) -> None:
    """Each key of values.yaml that the schema defines has a comment. helm-docs writes the README from these comments."""
    import chart_schema

    text = chart_schema.VALUES_FILE.read_text("utf-8")
    comments = chart_schema.read_value_comments(text)

    def iterate_keys(values: dict[str, Any], schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for name, value in values.items():
            yield (*path, name)
            child = schema["properties"][name]
            if isinstance(value, dict) and name != "resources" and "properties" in child:
                yield from iterate_keys(value, child, (*path, name))

    documented_paths = set(iterate_keys(yaml.safe_load(text), chart_schema.make_values_schema()))
    assert len(documented_paths) > 90
    assert documented_paths == set(comments)
    readme = (root / "helm/finetune-operator/README.md").read_text("utf-8")
    assert [path for path in documented_paths if f"| {'.'.join(path)} |" not in readme] == []


def get_pod_spec(objects: Objects) -> dict[str, Any]:
    return dict(select_only_object(objects, "Deployment")["spec"]["template"]["spec"])


def test_every_pod_value_reaches_the_operators_pods(render: Render) -> None:
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": []}]}}}
    placement = {
        "nodeSelector": {"a": "b"}, "tolerations": [{"operator": "Exists"}], "affinity": affinity,
        "priorityClassName": "high", "runtimeClassName": "gvisor",
    }  # fmt: skip
    volume = {"name": "ca", "configMap": {"name": "ca"}}
    spread = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    own_spread = spread | {"labelSelector": {"matchLabels": {"x": "y"}}}
    objects = render(
        **placement, imagePullSecrets=["pull"], extraEnv=[{"name": "HTTPS_PROXY", "value": "http://p"}], extraVolumes=[volume],
        extraVolumeMounts=[{"name": "ca", "mountPath": "/ca"}], topologySpreadConstraints=[spread, own_spread],
        podLabels={"team": "x"}, podAnnotations={"note": "y"}, commonLabels={"owner": "z"},
    )  # fmt: skip
    operator_pod_spec = get_pod_spec(objects)
    for pod_spec in (operator_pod_spec, select_only_object(objects, "Pod")["spec"]):
        assert {key: pod_spec[key] for key in placement} == placement
        assert pod_spec["imagePullSecrets"] == [{"name": "pull"}]
    (container,) = operator_pod_spec["containers"]
    assert container["env"][-1] == {"name": "HTTPS_PROXY", "value": "http://p"}
    assert container["volumeMounts"][-1] == {"name": "ca", "mountPath": "/ca"}
    assert operator_pod_spec["volumes"][-1] == volume
    own_pods = {"app.kubernetes.io/name": "finetune-operator", "app.kubernetes.io/instance": "rel"}
    first_constraint, second_constraint = operator_pod_spec["topologySpreadConstraints"]
    assert (first_constraint, second_constraint) == (spread | {"labelSelector": {"matchLabels": own_pods}}, own_spread)
    metadata = select_only_object(objects, "Deployment")["spec"]["template"]["metadata"]
    assert metadata["labels"] == own_pods | {"team": "x"}
    assert metadata["annotations"]["note"] == "y"
    assert all(item["metadata"]["labels"]["owner"] == "z" for item in objects if item["kind"] != "Pod")


def test_openshift_leaves_the_user_to_the_platform(render: Render) -> None:
    objects = render(openshift=True)
    for pod_spec in (get_pod_spec(objects), select_only_object(objects, "Pod")["spec"]):
        assert pod_spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert read_config(objects).trainer.fixed_user is False
    assert read_config(render()).trainer.fixed_user is True


def test_security_contexts_can_be_changed(render: Render) -> None:
    objects = render(podSecurityContext={"runAsUser": 2000, "fsGroup": None}, securityContext={"privileged": False})
    pod_spec = get_pod_spec(objects)
    assert (pod_spec["securityContext"]["runAsUser"], "fsGroup" in pod_spec["securityContext"]) == (2000, False)
    assert pod_spec["containers"][0]["securityContext"]["privileged"] is False


@pytest.mark.parametrize(
    ("values", "budget"),
    [
        ({"enabled": True}, {"maxUnavailable": 1}), ({"enabled": True, "maxUnavailable": "50%"}, {"maxUnavailable": "50%"}),
        ({"enabled": True, "minAvailable": 0}, {"minAvailable": 0}), ({"enabled": True, "minAvailable": "50%"}, {"minAvailable": "50%"}),
        ({"enabled": True, "maxUnavailable": 0}, {"maxUnavailable": 0}), ({}, None),
    ],
)  # fmt: skip
def test_disruption_budget_has_the_values_of_the_chart(render: Render, values: dict[str, Any], budget: dict[str, Any] | None) -> None:
    budget_specs = [item["spec"] for item in render(podDisruptionBudget=values, replicas=2) if item["kind"] == "PodDisruptionBudget"]
    own_pods = {"app.kubernetes.io/name": "finetune-operator", "app.kubernetes.io/instance": "rel"}
    expected = {"selector": {"matchLabels": own_pods}, "unhealthyPodEvictionPolicy": "AlwaysAllow"}
    assert budget_specs == ([] if budget is None else [expected | budget])


def test_network_policy_allows_the_api_server_dns_progress_and_metrics(render: Render) -> None:
    def render_policy(watched_namespaces: list[str] | None = None, **values: Any) -> dict[str, Any]:
        return dict(select_only_object(render(watchNamespaces=watched_namespaces or [], networkPolicy={"enabled": True, **values}), "NetworkPolicy")["spec"])

    spec = render_policy()
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [{"ports": [{"protocol": "TCP", "port": "http"}]}]
    api_server, dns, progress = spec["egress"]
    assert api_server == {"ports": [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]}
    assert dns == {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
    trainer_pods = {"matchLabels": {names.Label.MANAGED_BY.value: names.MANAGER_NAME}}
    assert progress == {
        "ports": [{"protocol": "TCP", "port": names.PROGRESS_PORT}], "to": [{"podSelector": trainer_pods, "namespaceSelector": {}}],
    }  # fmt: skip

    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    rule = {"ports": [{"port": 3128}]}
    spec = render_policy(
        ["a", "b"], metricsFrom=[monitoring], apiServerCidrs=["10.0.0.0/8"], apiServerPorts=[443], extraEgress=[rule], extraIngress=[rule]
    )
    test_pod = {"app.kubernetes.io/name": "finetune-operator-test", "app.kubernetes.io/instance": "rel"}
    assert spec["ingress"][0]["from"] == [{"podSelector": {"matchLabels": test_pod}}, monitoring]
    assert spec["egress"][0] == {"ports": [{"protocol": "TCP", "port": 443}], "to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}
    (selector,) = spec["egress"][2]["to"][0]["namespaceSelector"]["matchExpressions"]
    assert selector == {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["a", "b"]}
    assert (spec["egress"][3], spec["ingress"][1]) == (rule, rule)


def test_service_selects_the_operator_but_not_the_test_pod(render: Render) -> None:
    objects = render(metrics={"service": {"port": 9090, "labels": {"a": "b"}, "annotations": {"c": "d"}}})
    service = select_only_object(objects, "Service")
    labels = select_only_object(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    test_pod = select_only_object(objects, "Pod")
    assert service["spec"]["selector"].items() <= labels.items()
    assert not service["spec"]["selector"].items() <= test_pod["metadata"]["labels"].items()
    assert service["spec"]["ports"] == [{"name": "http", "port": 9090, "targetPort": "http", "protocol": "TCP"}]
    assert (service["metadata"]["labels"]["a"], service["metadata"]["annotations"]) == ("b", {"c": "d"})
    assert test_pod["spec"]["containers"][0]["command"][-1] == "http://rel-finetune-operator.ops.svc:9090"
    assert not [item for item in render(tests={"enabled": False}) if item["kind"] == "Pod"]
    assert not [item for item in render(metrics={"service": {"enabled": False}}) if item["kind"] in ("Pod", "Service")]


@pytest.mark.parametrize(("kind", "key", "endpoints"), [("ServiceMonitor", "serviceMonitor", "endpoints"), ("PodMonitor", "podMonitor", "podMetricsEndpoints")])
def test_monitor_selects_the_release(render: Render, kind: str, key: str, endpoints: str) -> None:
    relabeling = {"action": "labeldrop", "regex": "pod"}
    values = {
        "enabled": True, "namespace": "monitoring", "labels": {"release": "prom"}, "interval": "1m30s", "scrapeTimeout": "10s",
        "relabelings": [relabeling], "metricRelabelings": [relabeling],
    }  # fmt: skip
    objects = render(metrics={key: values})
    monitor = select_only_object(objects, kind)
    assert (monitor["metadata"]["namespace"], monitor["metadata"]["labels"]["release"]) == ("monitoring", "prom")
    assert monitor["spec"]["namespaceSelector"] == {"matchNames": ["ops"]}
    selected_object = select_only_object(objects, "Service") if kind == "ServiceMonitor" else select_only_object(objects, "Deployment")["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= selected_object["metadata"]["labels"].items()
    assert monitor["spec"][endpoints] == [{
        "port": "http", "path": "/metrics", "interval": "1m30s", "scrapeTimeout": "10s",
        "relabelings": [relabeling], "metricRelabelings": [relabeling],
    }]  # fmt: skip


def test_extra_objects_may_be_objects_or_templates(render: Render) -> None:
    template = "apiVersion: v1\nkind: Secret\nmetadata:\n  name: {{ .Release.Name }}-two\n"
    objects = render(extraObjects=[{"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "{{ .Release.Name }}-one"}}, template])
    assert select_only_object(objects, "LimitRange")["metadata"]["name"] == "rel-one"
    assert select_only_object(objects, "Secret")["metadata"]["name"] == "rel-two"


# --- the OpenAI server ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openai_objects(render: Render) -> Objects:
    """The chart's objects that belong to the OpenAI server."""
    values: dict[str, Any] = OPENAI_SERVER | {"networkPolicy": {"enabled": True, "clients": [{"podSelector": {}}], "storagePorts": [8333]}}
    return [item for item in render(openaiServer=values) if item["metadata"]["name"] == "rel-finetune-operator-openai"]


def test_openai_server_is_off_by_default(render: Render) -> None:
    assert not [item for item in render() if "openai" in item["metadata"]["name"]]


def test_openai_server_may_only_impersonate_the_listed_service_accounts(openai_objects: Objects) -> None:
    roles = {item["metadata"]["namespace"]: item["rules"] for item in openai_objects if item["kind"] in ("Role", "ClusterRole")}

    def make_rule(*names: str) -> list[dict[str, Any]]:
        return [{"apiGroups": [""], "resources": ["serviceaccounts"], "resourceNames": list(names), "verbs": ["impersonate"]}]

    assert roles == {"team-a": make_rule("alice", "bob"), "team-b": make_rule("carol")}
    bindings = [item for item in openai_objects if item["kind"] == "RoleBinding"]
    assert [item["metadata"]["namespace"] for item in bindings] == ["team-a", "team-b"]
    assert all(item["subjects"] == [{"kind": "ServiceAccount", "name": "rel-finetune-operator-openai", "namespace": "ops"}] for item in bindings)


def test_openai_server_reads_its_configuration_and_secrets(openai_objects: Objects, tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(select_only_object(openai_objects, "ConfigMap")["data"]["server.yaml"], "utf-8")
    loaded_config = load_config(file)
    assert (loaded_config.storage.uri, loaded_config.max_file_bytes, list(loaded_config.models)) == ("s3://models/jobs", 512 << 20, ["gpt-4o-mini"])
    assert check_models(loaded_config) == []
    pod_spec = get_pod_spec(openai_objects)
    (container,) = pod_spec["containers"]
    root_command: Any = typer.main.get_command(app)
    context = root_command.commands["serve-openai"].make_context("serve-openai", container["args"][1:], obj=[])
    assert (context.params["host"], context.params["port"], str(context.params["keys"])) == ("0.0.0.0", 8080, "/etc/openai/keys/keys.yaml")
    assert container["image"] == "example.org/finetune-cli:0.2.0"
    assert container["envFrom"] == [{"secretRef": {"name": "s3-keys"}}]
    assert [volume.get("secret") for volume in pod_spec["volumes"]] == [None, {"secretName": "api-keys"}, None]
    assert pod_spec["serviceAccountName"] == "rel-finetune-operator-openai"
    assert (container["securityContext"]["readOnlyRootFilesystem"], pod_spec["securityContext"]["runAsNonRoot"]) == (True, True)


def test_openai_server_has_services_and_policies_of_its_own(openai_objects: Objects, render: Render) -> None:
    labels = select_only_object(openai_objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    service = select_only_object(openai_objects, "Service")
    operator_service = select_only_object(render(), "Service")
    assert service["spec"]["selector"].items() <= labels.items()
    assert not operator_service["spec"]["selector"].items() <= labels.items()
    assert "app.kubernetes.io/part-of" not in select_only_object(openai_objects, "ConfigMap")["metadata"]["labels"]
    policy = select_only_object(openai_objects, "NetworkPolicy")["spec"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": "http"}], "from": [{"podSelector": {}}]}]
    assert [sorted(port["port"] for port in rule["ports"]) for rule in policy["egress"]] == [[443, 6443], [53, 53], [8333]]


def test_openai_server_uses_the_storage_of_the_chart(render: Render) -> None:
    values = {key: value for key, value in OPENAI_SERVER.items() if key != "storage"}
    objects = render(openaiServer=values, storage={"uri": "s3://shared/jobs", "region": "eu-1"})
    (config_map,) = [item for item in objects if item["kind"] == "ConfigMap" and "server.yaml" in item["data"]]
    assert yaml.safe_load(config_map["data"]["server.yaml"])["storage"] == {"uri": "s3://shared/jobs", "region": "eu-1"}
