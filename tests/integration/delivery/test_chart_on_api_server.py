"""The Helm chart on a real API server, with Helm 3 and Helm 4: dry runs of the rendered objects, releases that exclude each other, and upgrades while
a job runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.names import Phase

from localcluster import ControlPlane
from localcluster.processes import wait_until
from tests.support.kubeapi import KubeApi, Object, condition_is_true
from tests.support.kubelet import FakeKubelet, success_exit
from tests.support.rig import CRD, Cluster, Rig, is_served

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

import tools  # noqa: E402 -- importable only after the change of sys.path

pytestmark = [pytest.mark.integration, pytest.mark.slow]
CHART = ROOT / "helm/finetune-operator"
PROMETHEUS_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.91.0"
MONITORING_KINDS = ("servicemonitors", "podmonitors", "prometheusrules")
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
PATHS = {
    "apps/v1": "/apis/apps/v1", "v1": "/api/v1", "policy/v1": "/apis/policy/v1", "networking.k8s.io/v1": "/apis/networking.k8s.io/v1",
    "rbac.authorization.k8s.io/v1": "/apis/rbac.authorization.k8s.io/v1", "apiextensions.k8s.io/v1": "/apis/apiextensions.k8s.io/v1",
    "monitoring.coreos.com/v1": "/apis/monitoring.coreos.com/v1",
}  # fmt: skip
CLUSTER_KINDS = ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")
POOL = {"name": "h100", "default": True, "gpusPerNode": 8, "gpuMemory": "80Gi", "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]}
MONITORING = {"prometheusRule": {"enabled": True}, "grafanaDashboard": {"enabled": True}}
POD_VALUES = {
    "nodeSelector": {"a": "b"}, "tolerations": [{"key": "a", "operator": "Exists"}], "priorityClassName": "system-cluster-critical",
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "podAffinityTerm": {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"a": "b"}}}}]}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://p"}], "extraVolumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "extraVolumeMounts": [{"name": "ca", "mountPath": "/ca"}], "podLabels": {"a": "b"}, "podAnnotations": {"a": "b"}, "imagePullSecrets": ["pull"],
}  # fmt: skip
VALUES: dict[str, Object] = {
    "defaults": {},
    "namespaces": {"watchNamespaces": ["team-a", "team-b"], "leaderElection": {"enabled": False}},
    "replicas": {"replicas": 3, "podDisruptionBudget": {"enabled": True, "minAvailable": "50%"}},
    "network": {"networkPolicy": {"enabled": True}, "podDisruptionBudget": {"enabled": True}},
    "closed network": {"networkPolicy": {"enabled": True, "apiServerCidrs": ["10.0.0.1/32"], "metricsFrom": [{"podSelector": {}}],
                                         "extraEgress": [{"ports": [{"port": 3128}]}]}, "watchNamespaces": ["team-a"]},
    "service monitor": {"metrics": {"serviceMonitor": {"enabled": True, "interval": "30s", "scrapeTimeout": "10s"}, **MONITORING}},
    "pod monitor": {"metrics": {"podMonitor": {"enabled": True, "relabelings": [{"action": "labeldrop", "regex": "pod"}]}, "service": {"enabled": False}}},
    "pods": POD_VALUES,
    "openshift": {"openshift": True},
    "pools": {"nodePools": [POOL], "storage": {"uri": "s3://bucket/p", "credentialsSecretRef": {"name": "s3"}}},
    "extra": {"extraObjects": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-x"}}], "commonLabels": {"a": "b"}},
    "nothing": {"rbac": {"create": False}, "serviceAccount": {"create": False, "name": "own"}, "crds": {"enabled": False}, "tests": {"enabled": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def control_plane_with_monitoring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApi]:
    """A separate API server with the CRDs of the Prometheus operator. Tests of other files do not use this API server, because releases of the chart install
    cluster-scoped objects.
    """
    with ControlPlane(tmp_path_factory.mktemp("chart") / "state") as endpoint:
        api = KubeApi(endpoint)
        for crd in read_monitoring_crds(tmp_path_factory.mktemp("go")):
            name = crd["metadata"]["name"]
            api.patch("customresourcedefinitions", None, name, crd, patch_type="apply")
            api.wait("customresourcedefinitions", None, name, lambda body: condition_is_true(body, "Established"))
        for name in ("ops", "ops-2", "ops-3", "team-a", "team-b"):
            api.patch("namespaces", None, name, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": RESTRICTED}}, patch_type="apply")
        yield api


def read_monitoring_crds(folder: Path) -> Iterator[Object]:
    """Yield the CRDs of the monitoring objects, which are read from the Go module of the Prometheus operator."""
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    command = ["go", "mod", "download", "-json", PROMETHEUS_OPERATOR]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)
    crd_folder = Path(json.loads(answer.stdout)["Dir"]) / "example/prometheus-operator-crd"
    for kind in MONITORING_KINDS:
        yield yaml.load((crd_folder / f"monitoring.coreos.com_{kind}.yaml").read_text(), yaml.CSafeLoader)


@pytest.fixture(scope="module", params=["helm 4", "helm 3"])
def helm_program(request: pytest.FixtureRequest) -> Path:
    """Path of Helm 4, then of Helm 3."""
    tool = {"helm 4": tools.HELM, "helm 3": tools.HELM_3}[request.param]
    tools.build_go_tools(tool)
    return Path(tool.path)


Helm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def helm(helm_program: Path, control_plane_with_monitoring: KubeApi) -> Iterator[Helm]:
    """A function that runs Helm on the API server, as in `helm("install", "rel", "ops", {...})`. All releases and the CRD are removed after the test."""

    def run(action: str, release: str, namespace: str, values: Object | None = None, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [helm_program, action, release, "--namespace", namespace, "--kubeconfig", control_plane_with_monitoring.endpoint.kubeconfig, *arguments]
        if values is not None:
            command += [CHART, "-f", "-"]
        return subprocess.run(command, input=json.dumps({"imageRegistry": "r.example.com"} | (values or {})), capture_output=True, text=True)

    yield run
    for namespace in ("ops", "ops-2", "ops-3"):
        for release in run("list", "--short", namespace).stdout.split():
            run("uninstall", release, namespace)
    control_plane_with_monitoring.delete("customresourcedefinitions", None, CRD)
    control_plane_with_monitoring.wait_gone("customresourcedefinitions", None, CRD)


def render(program: Path, values: Object) -> list[Object]:
    command = [program, "template", "rel", CHART, "-n", "ops", "-f", "-"]
    completed_process = subprocess.run(command, input=json.dumps({"imageRegistry": "r.example.com"} | values), capture_output=True, text=True)
    assert completed_process.returncode == 0, completed_process.stderr
    return [item for item in yaml.load_all(completed_process.stdout, yaml.CSafeLoader) if item]


@pytest.mark.parametrize("case", VALUES)
def test_api_server_accepts_every_rendered_object(helm_program: Path, control_plane_with_monitoring: KubeApi, case: str) -> None:
    """In a dry run, the API server checks field values, unknown fields and the Pod Security level `restricted`, and returns no warning."""
    api = control_plane_with_monitoring
    objects = render(helm_program, VALUES[case])
    assert objects
    for item in objects:
        api_path, kind = PATHS[item["apiVersion"]], item["kind"]
        namespace = "" if kind in CLUSTER_KINDS else f"/namespaces/{item['metadata'].get('namespace', 'ops')}"
        plural = "networkpolicies" if kind == "NetworkPolicy" else f"{kind.lower()}s"
        if kind == "Pod":  # the API server refuses a pod whose ServiceAccount does not exist
            item["spec"]["serviceAccountName"] = "default"
        answer = api.request("POST", f"{api_path}{namespace}/{plural}", item, dryRun="All", fieldValidation="Strict")
        assert answer.code == 201, (kind, answer)
        assert answer.warnings == (), (kind, answer.warnings)
        if kind == "Deployment":
            pod = {"metadata": {"name": "operator"}, "spec": item["spec"]["template"]["spec"] | {"serviceAccountName": "default"}}
            assert api.request("POST", "/api/v1/namespaces/ops/pods", pod, dryRun="All").warnings == ()


def test_pod_security_refuses_a_privileged_operator(helm_program: Path, control_plane_with_monitoring: KubeApi) -> None:
    """This test proves that a violation of Pod Security would make `test_api_server_accepts_every_rendered_object` fail."""
    objects = render(helm_program, {"securityContext": {"allowPrivilegeEscalation": True}})
    deployment = next(item for item in objects if item["kind"] == "Deployment")
    answer = control_plane_with_monitoring.request("POST", "/apis/apps/v1/namespaces/ops/deployments", deployment, dryRun="All")
    assert "allowPrivilegeEscalation != false" in answer.warnings[0]


def test_helm_3_and_helm_4_render_the_same_objects_and_their_linters_find_no_mistake() -> None:
    tools.build_go_tools(tools.HELM, tools.HELM_3)
    for case, values in VALUES.items():
        assert render(tools.HELM.path, values) == render(tools.HELM_3.path, values), case
    for tool in (tools.HELM, tools.HELM_3):
        completed_process = subprocess.run([tool.path, "lint", "--strict", "--set", "imageRegistry=r", CHART], capture_output=True, text=True)
        assert completed_process.returncode == 0, completed_process.stdout


def test_helm_3_and_helm_4_name_the_keys_of_wrong_values(helm_program: Path) -> None:
    values = {"imageRegistry": "r", "replica": 2, "resources": {"limits": {"memory": "512MB"}}, "metrics": {"service": {"port": "http"}}}
    completed_process = subprocess.run([helm_program, "template", "rel", CHART, "-f", "-"], input=json.dumps(values), capture_output=True, text=True)
    assert completed_process.returncode != 0
    for message in ("replica", "/resources/limits/memory", "/metrics/service/port"):
        assert message in completed_process.stderr


def test_releases_that_would_manage_the_same_namespaces_are_refused(helm: Helm) -> None:
    def read_refusal(release: str, namespace: str, **values: Any) -> str:
        completed_process = helm("install", release, namespace, {"crds": {"enabled": False}, **values})
        assert completed_process.returncode != 0
        return completed_process.stderr

    def run_helm(action: str, release: str, namespace: str, **values: Any) -> None:
        completed_process = helm(action, release, namespace, {"crds": {"enabled": False}, **values})
        assert completed_process.returncode == 0, completed_process.stderr

    run_helm("install", "first", "ops", crds={"enabled": True})
    first_has_all = "release first in namespace ops already manages the FineTuneJobs of all namespaces, and two operators would both create Jobs"
    assert first_has_all in read_refusal("second", "ops-2")
    assert first_has_all in read_refusal("second", "ops-2", watchNamespaces=["team-b"])
    assert first_has_all in read_refusal("first", "ops-2")
    run_helm("upgrade", "first", "ops", crds={"enabled": True}, replicas=2)
    run_helm("upgrade", "first", "ops", crds={"enabled": True}, watchNamespaces=["team-a"])
    first_has_team_a = "release first in namespace ops already manages the FineTuneJobs of namespace team-a"
    assert first_has_team_a in read_refusal("second", "ops-2")
    assert first_has_team_a in read_refusal("second", "ops-2", watchNamespaces=["team-b", "team-a"])
    run_helm("install", "second", "ops-2", watchNamespaces=["team-b"])
    run_helm("install", "third", "ops-3", watchNamespaces=["team-b"], checkOtherReleases=False, fullnameOverride="third")


@pytest.fixture
def rig(control_plane_with_monitoring: KubeApi, tmp_path: Path) -> Iterator[Rig]:
    """A namespace with a fake kubelet. The operator of the installed release runs as a local process."""
    api = control_plane_with_monitoring
    namespace = f"jobs-{tmp_path.name.rpartition('-')[2][-20:]}".replace("_", "-").lower().strip("-")
    with FakeKubelet(api.endpoint) as kubelet:
        api.create("namespaces", None, {"metadata": {"name": namespace}})
        rig = Rig(Cluster(api.endpoint, api, kubelet), namespace, tmp_path)
        try:
            yield rig
        finally:
            errors = rig.close()
    assert not errors, errors


def start_operator(rig: Rig, release: str) -> Any:
    """Start an operator process with the configuration and the permissions of the installed release."""
    config_map = rig.api.get("configmaps", "ops", f"{release}-finetune-operator")
    config = yaml.safe_load(config_map["data"]["config.yaml"]) | {"namespaces": [rig.namespace]}
    config["leaderElection"] |= {"leaseNamespace": "ops"}
    path = f"/api/v1/namespaces/ops/serviceaccounts/{release}-finetune-operator/token"
    token = str(rig.api.request("POST", path, {"spec": {"expirationSeconds": 3600}}).body["status"]["token"])
    operator = rig.start_operator(proxy=rig.start_proxy(), token=token, config=config)
    wait_until("the operator to be the leader", lambda: operator.read_metrics().get("finetune_operator_leader") == 1, servers=[], timeout=60)
    return operator


def run_helm_test_script(program: Path, operator: Any) -> subprocess.CompletedProcess[str]:
    """Run the script of the chart's test pod against the operator's port."""
    pod = next(item for item in render(program, {}) if item["kind"] == "Pod")
    (container,) = pod["spec"]["containers"]
    _, *arguments, url = container["command"]
    assert url == "http://rel-finetune-operator.ops.svc:8080"
    return subprocess.run([sys.executable, *arguments, f"http://127.0.0.1:{operator.port}"], capture_output=True, text=True)


def test_running_job_survives_upgrade_rollback_uninstall_and_a_new_installation(helm: Helm, helm_program: Path, rig: Rig) -> None:
    def run(action: str, values: Object | None = None, *arguments: str) -> None:
        completed_process = helm(action, "rel", "ops", values, *arguments)
        assert completed_process.returncode == 0, completed_process.stderr

    run("install", {})
    wait_until("the CRD to be served", lambda: is_served(rig.api), servers=[], timeout=30)
    operator = start_operator(rig, "rel")
    helm_test = run_helm_test_script(helm_program, operator)
    assert (helm_test.returncode, helm_test.stdout.count(": ok\n")) == (0, 2), helm_test.stderr
    rig.submit()
    (pod,) = rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)

    def list_children() -> list[tuple[str, str, str]]:
        items = [*rig.api.list("jobs", rig.namespace), *rig.api.list("pods", rig.namespace), *rig.api.list("finetunejobs", rig.namespace)]
        return sorted((item["metadata"]["name"], item["metadata"]["uid"], str(item["metadata"].get("generation"))) for item in items)

    children_before = list_children()
    assert len(children_before) == 3
    assert_attempt_is_isolated(rig, pod)
    for action, values, arguments in (
        ("upgrade", {"settings": {"workers": 3}, "trainer": {"resources": {"memory": "8Gi"}}, "replicas": 2}, ()), ("rollback", None, ("1",)),
    ):  # fmt: skip
        run(action, values, *arguments)
        operator.stop()
        operator = start_operator(rig, "rel")
        assert list_children() == children_before, action
    operator.stop()
    run("uninstall")
    assert list_children() == children_before
    assert rig.api.find("serviceaccounts", "ops", "rel-finetune-operator") is None
    assert not [role for role in rig.api.list("clusterroles") if role["metadata"]["name"].startswith("rel-")]
    run("install", {})
    operator = start_operator(rig, "rel")
    assert list_children() == children_before
    rig.kubelet.end_pod(pod, success_exit())
    assert rig.wait_finished()["status"]["phase"] == Phase.SUCCEEDED


def assert_attempt_is_isolated(rig: Rig, pod: Any) -> None:
    """Check that the attempt's Secret and NetworkPolicy exist, that the pod mounts the Secret, and that the namespace `ops` has no Secret except the
    operator's key.
    """
    (job,), (secret,) = rig.api.list("jobs", rig.namespace), rig.api.list("secrets", rig.namespace)
    (policy,) = rig.api.list("networkpolicies", rig.namespace)
    owners = {item["metadata"]["ownerReferences"][0]["uid"] for item in (secret, policy)}
    assert owners == {job["metadata"]["uid"]}
    assert (sorted(secret["data"]), secret["immutable"]) == (["attempt-secret", "checkpoint-key"], True)
    assert (policy["metadata"]["name"], policy["spec"]["podSelector"]["matchLabels"]) == ("job-1", {"batch.kubernetes.io/job-name": "job-1"})
    (volume,) = [volume for volume in pod.body["spec"]["volumes"] if volume["name"] == "run"]
    assert volume["projected"]["sources"][1]["secret"]["name"] == secret["metadata"]["name"]
    keys = [item["metadata"]["name"] for item in rig.api.list("secrets", "ops") if not item["metadata"]["name"].startswith("sh.helm.")]
    assert keys == ["rel-finetune-operator-attempt-key"]


def test_helm_test_fails_if_no_replica_is_ready(helm_program: Path) -> None:
    class StoppedOperator:
        port = 1

    completed_process = run_helm_test_script(helm_program, StoppedOperator())
    assert completed_process.returncode != 0
    assert "Connection refused" in completed_process.stderr
