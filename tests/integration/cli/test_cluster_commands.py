"""The commands `pools`, `doctor`, `top` and `delete` against a real API server. The tests set the pods' status in place of a kubelet."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.names import Label
from finetune_cli import cluster as cluster_module
from finetune_cli import main

from localcluster.ports import find_free_ports
from tests.integration.cli.conftest import Result, condition
from tests.support.kubeapi import KubeApi

Finetune = Callable[..., Result]
Job = Callable[..., dict[str, Any]]
CHART_LABELS = {"app.kubernetes.io/part-of": "finetune-operator", "app.kubernetes.io/version": "0.2.0"}
RUNNING_STATUS = {
    "phase": "Running", "conditions": [condition("Reconciling")],
    "progress": {"step": 120, "totalSteps": 500, "display": "120/500 (24%)", "eta": "1h12m", "tokensPerSecond": 2730.7},
}  # fmt: skip
NOT_READY_TAINT = "node.kubernetes.io/not-ready"
SUCCEEDED_STATUS = {"phase": "Succeeded", "conditions": [condition("Finished"), condition("Succeeded")]}


@pytest.fixture
def node(api: KubeApi) -> Iterator[Callable[..., None]]:
    """Return a function that creates a node. The nodes are deleted after the test."""
    node_names: list[str] = []

    def create_node(name: str, labels: dict[str, str], gpus: int, *, is_ready: bool = True, **spec: Any) -> None:
        api.create("nodes", None, {"metadata": {"name": name, "labels": labels}, "spec": spec})
        node_names.append(name)
        ready_condition = {"type": "Ready", "status": "True" if is_ready else "False", "reason": "t", "message": "t"}
        node_resources = {"cpu": "64", "memory": "512Gi", "pods": "110", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
        api.patch("nodes/status", None, name, {"status": {"conditions": [ready_condition], "allocatable": node_resources, "capacity": node_resources}})
        if is_ready:  # the API server taints a new node as not ready, and the node controller removes the taint
            api.wait("nodes", None, name, lambda one: NOT_READY_TAINT not in [taint["key"] for taint in one["spec"].get("taints") or []])

    yield create_node
    for name in node_names:
        api.delete("nodes", None, name)


@pytest.fixture
def operator(api: KubeApi, namespace: str) -> Callable[..., None]:
    """Return a function that creates the objects that the chart would install in the test's namespace."""

    def install(*, is_ready: bool = True, version: str = "0.2.0", **config: Any) -> None:
        labels = {**CHART_LABELS, "app.kubernetes.io/version": version}
        config_values = {"trainer": {"image": "registry.example.com/finetune-trainer:0.2.0"}, "namespaces": [namespace], **config}
        api.create("configmaps", namespace, {"metadata": {"name": "operator", "labels": labels}, "data": {"config.yaml": json.dumps(config_values)}})
        template = {"metadata": {"labels": {"app": "operator"}}, "spec": {"containers": [{"name": "operator", "image": "x"}]}}
        spec = {"replicas": 1, "selector": {"matchLabels": {"app": "operator"}}, "template": template}
        api.create("deployments", namespace, {"metadata": {"name": "operator", "labels": labels}, "spec": spec})
        if is_ready:  # the Deployment controller computes the Deployment's status from the pod's status
            (pod,) = api.wait_list("pods", namespace, bool, labels="app=operator")
            status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
            api.patch("pods/status", namespace, pod["metadata"]["name"], {"status": status})
            api.wait("deployments", namespace, "operator", lambda one: (one.get("status") or {}).get("readyReplicas") == 1)

    return install


# --- pools ----------------------------------------------------------------------------------------------------------


def test_pools_shows_defaults_and_free_gpus(
    finetune: Finetune, operator: Callable[..., None], node: Callable[..., None], api: KubeApi, namespace: str
) -> None:
    pools = [
        {"name": "h100", "description": "8 x H100", "default": True, "nodeSelector": {"gpu": namespace}, "gpusPerNode": 8, "gpuMemory": "80Gi",
         "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]},
        {"name": "cpu", "nodeSelector": {"cpu": namespace}, "resources": {"memory": "64Gi"}},
    ]  # fmt: skip
    operator(nodePools=pools, resources={"perGpu": {"cpu": "10"}})
    taints = [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]
    node(f"{namespace}-a", {"gpu": namespace}, 8, taints=taints)
    node(f"{namespace}-b", {"gpu": namespace}, 8, taints=taints)
    node(f"{namespace}-c", {"gpu": namespace}, 8, unschedulable=True)
    limits = {"limits": {"nvidia.com/gpu": "3"}}
    api.create("pods", namespace, {
        "metadata": {"name": "user"}, "spec": {"nodeName": f"{namespace}-a", "containers": [{"name": "c", "image": "x", "resources": limits}]},
    })  # fmt: skip
    result = finetune("pools", "--operator-namespace", namespace)
    header, h100, cpu = [line.split("   ") for line in result.out.splitlines()]
    assert [cell.strip() for cell in h100 if cell.strip()] == [
        "h100", "yes", "8", "80Gi", "2 of 3", "13 of 16", "cpu 80000m, memory 320Gi, disk 20Gi, shm 16Gi", "8 x H100",
    ]  # fmt: skip
    assert [cell.strip() for cell in cpu if cell.strip()] == ["cpu", "-", "0", "-", "0", "-", "cpu 1, memory 64Gi, disk 20Gi, shm 1Gi", "-"]
    first_pool, _ = json.loads(finetune("pools", "--operator-namespace", namespace, "-o", "json").out)
    assert first_pool["usage"] == {"nodes": 3, "usableNodes": 2, "freeNodes": 1, "gpus": 16, "freeGpus": 13}
    assert first_pool["podDefaults"] == {"cpu": "80000m", "memory": "320Gi", "ephemeralStorage": "20Gi", "sharedMemory": "16Gi"}


def test_pools_without_an_operator_says_what_to_do(finetune: Finetune, namespace: str) -> None:
    result = finetune("pools", "--operator-namespace", namespace)
    cure = "install the chart, or name its namespace with --operator-namespace"
    assert result == Result(1, "", f"error: there is no operator for namespace {namespace} in namespace {namespace}; {cure}\n")


# --- doctor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def kubelet(api: KubeApi, namespace: str) -> Callable[[dict[str, Any]], threading.Thread]:
    """Return a function that starts a thread. The thread waits for the next pod of `doctor`, and sets the state of this pod's container."""

    def play(state: dict[str, Any]) -> threading.Thread:
        def set_state() -> None:
            (pod,) = api.wait_list("pods", namespace, bool, labels="app.kubernetes.io/name=finetune-doctor")
            container_status = {"name": names.TRAINER_CONTAINER, "image": "x", "imageID": "", "ready": False, "restartCount": 0, "state": state}
            api.patch("pods/status", namespace, pod["metadata"]["name"], {"status": {"containerStatuses": [container_status]}})

        thread = threading.Thread(target=set_state)
        thread.start()
        return thread

    return play


def terminated_state(code: int, message: str) -> dict[str, Any]:
    return {"terminated": {"exitCode": code, "message": message, "reason": "Completed"}}


STORAGE = {"uri": "s3://bucket/root", "endpoint": "https://s3.example.com", "credentialsSecretRef": {"name": "s3"}}


def read_checks(result: Result) -> dict[str, dict[str, Any]]:
    return {check["check"]: check for check in json.loads(result.out)["checks"]}


def test_doctor_finds_no_problem_and_leaves_no_objects(
    finetune: Finetune, operator: Callable[..., None], kubelet: Callable[..., Any], api: KubeApi, namespace: str
) -> None:
    operator(storage=STORAGE)
    api.create("configmaps", namespace, {"metadata": {"name": "other"}})
    kubelet(terminated_state(0, '{"ok":true,"code":"","message":"old checkpoints cannot be deleted","hint":""}'))
    result = finetune("doctor", "--operator-namespace", namespace)
    lines = result.out.splitlines()
    assert (result.code, result.err, [line.split()[0] for line in lines]) == (0, "", ["✓"] * 7)
    assert lines[0].startswith("✓ cluster   Kubernetes v1.")
    assert lines[1:4] == [
        "✓ crd       finetunejobs.finetune-operator.io has all fields of 0.2.0", f"✓ operator  {namespace}/operator, release 0.2.0, 1 of 1 pods ready",
        f"✓ rights    all rights of this program in namespace {namespace}",
    ]  # fmt: skip
    assert lines[5:] == [
        "✓ image     registry.example.com/finetune-trainer:0.2.0",
        "✓ storage   a pod can write, read and list in s3://bucket/root (old checkpoints cannot be deleted)",
    ]
    api.wait_list("pods", namespace, lambda pods: not [pod for pod in pods if pod["metadata"]["name"].startswith("finetune-doctor")])
    assert api.list("jobs", namespace) == []


@pytest.mark.parametrize(
    ("state", "image_state", "storage_state", "expected_text"),
    [
        ({"waiting": {"reason": "ErrImagePull", "message": "unauthorized"}}, "failed", "unknown", "ErrImagePull: unauthorized"),
        ({"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}}, "ok", "failed", 'secret "s3" not found'),
        (terminated_state(77, 'noise\n{"ok":false,"code":"CredentialsRejected","message":"the key is unknown","hint":"correct the Secret"}'), "ok", "failed",
         "CredentialsRejected: the key is unknown"),
        (terminated_state(64, "finetune-trainer: unknown command 'check-storage'"), "failed", "unknown",
         "cannot run the check: finetune-trainer: unknown command"),
    ],
    ids=["image", "secret", "keys", "old image"],
)  # fmt: skip
def test_doctor_explains_why_its_pod_failed(
    state: dict[str, Any], image_state: str, storage_state: str, expected_text: str, finetune: Finetune, operator: Callable[..., None],
    kubelet: Callable[..., Any], api: KubeApi, namespace: str,
) -> None:  # fmt: skip
    operator(storage=STORAGE)
    kubelet(state)
    result = finetune("doctor", "--operator-namespace", namespace, "-o", "json", *(word for name in ("crd", "rights", "pools") for word in ("--skip", name)))
    checks = read_checks(result)
    assert (result.code, checks["image"]["state"], checks["storage"]["state"]) == (2, image_state, storage_state)
    failed_check = checks["image" if image_state == "failed" else "storage"]
    assert (expected_text in failed_check["message"], bool(failed_check["cure"])) == (True, True), failed_check
    assert api.list("jobs", namespace) == []


def test_doctor_names_an_operator_and_pools_that_are_not_ready(
    finetune: Finetune, operator: Callable[..., None], node: Callable[..., None], namespace: str
) -> None:
    node(f"{namespace}-a", {"gpu": namespace}, 1)
    pools = [{"name": "a100", "nodeSelector": {"gpu": namespace}, "gpusPerNode": 8}, {"name": "t4", "nodeSelector": {"no": namespace}, "gpusPerNode": 1}]
    operator(is_ready=False, nodePools=pools)
    result = finetune("doctor", "--operator-namespace", namespace, "--skip", "image", "--skip", "storage")
    assert result.code == 2
    lines = {line.split()[1]: line for line in result.out.splitlines()}
    assert lines["operator"] == (
        f"✗ operator  {namespace}/operator, release 0.2.0: none of 1 pods is ready; read `kubectl -n {namespace} logs deployment/operator`"
    )
    a100_problem, t4_problem = "pool a100: its nodes have at most 1 nvidia.com/gpu, but gpusPerNode is 8", f"pool t4: no node has the labels no={namespace}"
    assert lines["pools"].startswith(f"✗ pools     {a100_problem}; {t4_problem}; correct nodePools")
    assert "image" not in lines


def test_doctor_reports_an_operator_of_another_release(finetune: Finetune, operator: Callable[..., None], namespace: str) -> None:
    operator(version="0.1.0")
    words = [word for name in ("crd", "rights", "pools", "image", "storage") for word in ("--skip", name)]
    result = finetune("doctor", "--operator-namespace", namespace, *words)
    assert (result.code, "has release 0.1.0, this program has 0.2.0; upgrade" in result.out) == (2, True)


def test_doctor_lists_the_rights_that_a_user_lacks(finetune: Finetune, kubeconfig_without_roles: str) -> None:
    result = finetune("doctor", "-o", "json", "--kubeconfig", kubeconfig_without_roles)
    checks = read_checks(result)
    states = {name: check["state"] for name, check in checks.items()}
    assert states == {
        "cluster": "ok", "crd": "ok", "operator": "unknown", "rights": "failed", "pools": "unknown", "image": "unknown", "storage": "unknown",
    }  # fmt: skip
    assert "you may not: get finetunejobs.finetune-operator.io, list" in checks["rights"]["message"]
    assert result.code == 2


@pytest.fixture
def kubeconfig_without_roles(control_plane: Any, api: KubeApi, namespace: str, tmp_path: Path) -> str:
    """Return the kubeconfig of a ServiceAccount without any role."""
    api.create("serviceaccounts", namespace, {"metadata": {"name": "nobody"}})
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = api.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/nobody/token", body).body["status"]["token"]
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": control_plane.server, "certificate-authority": str(control_plane.ca)}}],
        "users": [{"name": "u", "user": {"token": token}}],
    }  # fmt: skip
    path = tmp_path / "nobody"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def test_doctor_prints_one_line_for_an_unreachable_cluster(finetune: Finetune, tmp_path: Path) -> None:
    config = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c", "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}], "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    path = tmp_path / "k"
    path.write_text(json.dumps(config), encoding="utf-8")
    result = finetune("doctor", "--kubeconfig", str(path))
    assert (result.code, len(result.out.splitlines())) == (2, 1)
    assert result.out.startswith("✗ cluster   the API server at https://127.0.0.1:1 cannot be reached: ")
    missing_file_result = finetune("doctor", "--kubeconfig", str(tmp_path / "none"))
    assert (missing_file_result.code, missing_file_result.out.startswith("✗ cluster   no cluster: --kubeconfig")) == (2, True)


def test_doctor_refuses_wrong_arguments(finetune: Finetune, tmp_path: Path) -> None:
    assert "--skip gpu: unknown check; write one of cluster, crd" in finetune("doctor", "--skip", "gpu").err
    assert "--timeout soon: this is not a duration" in finetune("doctor", "--timeout", "soon").err
    (tmp_path / "j.yaml").write_text("kind: FineTuneJob\napiVersion: finetune-operator.io/v1alpha1\nmetadata: {name: a}\nspec: {model: {}}\n")
    assert finetune("doctor", "-f", str(tmp_path / "j.yaml")).code == 1


# --- top ------------------------------------------------------------------------------------------------------------


def find_own_address() -> str:
    """Return an address of this machine outside the loopback interface. The API server forwards no requests to loopback addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # no packet is sent
        return str(probe.getsockname()[0])


@pytest.fixture
def pod_server() -> Iterator[tuple[str, int]]:
    """Serve `/usage` like a trainer pod. Return the address and the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            gpus = [{"index": 0, "utilizationPercent": 90.0, "memoryUsedBytes": 60 << 30, "memoryTotalBytes": 80 << 30},
                    {"index": 1, "utilizationPercent": 97.0, "memoryUsedBytes": 64 << 30, "memoryTotalBytes": 80 << 30}]  # fmt: skip
            body = json.dumps({"memoryUsedBytes": 12 << 30, "memoryTotalBytes": 64 << 30, "gpus": gpus}).encode() if self.path == "/usage" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer((find_own_address(), 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield str(server.server_address[0]), server.server_port
    server.shutdown()
    server.server_close()


def create_pod(api: KubeApi, namespace: str, job: dict[str, Any], attempt: int, ip: str) -> None:
    """Create a pod of a job's attempt, and set its status to running."""
    name = f"{job['metadata']['name']}-{attempt}-0"
    labels = {Label.MANAGED_BY: names.MANAGER_NAME, Label.JOB_NAME: job["metadata"]["name"], Label.JOB_UID: job["metadata"]["uid"], Label.ATTEMPT: str(attempt)}
    spec = {"nodeName": "gpu-1", "containers": [{"name": names.TRAINER_CONTAINER, "image": "x"}]}
    api.create("pods", namespace, {"metadata": {"name": name, "labels": labels}, "spec": spec})
    api.patch("pods/status", namespace, name, {"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}]}})


def test_top_shows_usage_of_running_pods(
    finetune: Finetune, job: Job, api: KubeApi, namespace: str, pod_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "PROGRESS_PORT", pod_server[1])
    created_job = job(status=RUNNING_STATUS)
    finished_job = job("done", status=SUCCEEDED_STATUS)
    create_pod(api, namespace, created_job, 1, pod_server[0])
    create_pod(api, namespace, created_job, 2, pod_server[0])
    create_pod(api, namespace, finished_job, 1, pod_server[0])
    result = finetune("top")
    assert (result.code, result.err) == (0, "")
    header, row = [[cell.strip() for cell in line.split("   ") if cell.strip()] for line in result.out.splitlines()]
    assert dict(zip(header, row, strict=True)) == {
        "NAME": "bot", "PHASE": "Running", "PROGRESS": "120/500 (24%)", "TOKENS/S": "2,731", "ETA": "1h12m", "POD": "bot-2-0", "NODE": "gpu-1", "GPUS": "2",
        "GPU%": "94", "GPU MEMORY": "64.0 GiB of 80.0 GiB", "MEMORY": "12.0 GiB of 64.0 GiB",
    }  # fmt: skip
    (pod_usage,) = json.loads(finetune("top", "bot", "-o", "json").out)
    assert (pod_usage["pod"], pod_usage["usage"]["gpus"][0]["utilizationPercent"], pod_usage["progress"]["tokensPerSecond"]) == ("bot-2-0", 90.0, 2730.7)
    assert "bot-2-0" in finetune("top", "-A", default_namespace=False).out
    assert finetune("top", "done") == Result(0, "", "note: done has no running pods\n")


def test_top_names_pods_that_do_not_report_usage(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    created_job = job(status=RUNNING_STATUS)
    create_pod(api, namespace, created_job, 1, "127.0.0.1")
    result = finetune("top")
    assert (result.code, "note: bot-1-0: " in result.err, "2,731" in result.out) == (0, True, True)
    assert finetune("top", "bot", "-A", default_namespace=False).code == 1


def test_top_names_the_network_policy_setting_if_the_api_server_cannot_reach_a_pod(
    finetune: Finetune, job: Job, api: KubeApi, namespace: str, pod_server: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "PROGRESS_PORT", find_free_ports(1)[0])  # no server listens on this port
    create_pod(api, namespace, job(status=RUNNING_STATUS), 1, pod_server[0])
    result = finetune("top")
    assert (result.code, result.err.startswith("note: bot-1-0: error trying to reach service: ")) == (0, True), result.err
    assert result.err.endswith("add the addresses of the API server to isolation.metricsFrom in the chart's values\n")


# --- delete ---------------------------------------------------------------------------------------------------------


def test_delete_lists_what_stays_in_storage(finetune: Finetune, job: Job, api: KubeApi, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = {"uri": "s3://models/root", "endpoint": "https://s3.example.com"}
    checkpoints = [{"step": 100, "uri": "s3://models/x", "bytes": 2048}, {"step": 200, "uri": "s3://models/y", "bytes": 1024}]
    output = {"uri": "s3://models/z", "kind": "adapter", "hubUri": "https://hub/x"}
    created_job = job(storage=storage, status={**SUCCEEDED_STATUS, "checkpoints": checkpoints, "output": output})
    uid = created_job["metadata"]["uid"]
    result = finetune("delete", "bot")
    purge = f"finetune purge bot -n {namespace} --uid {uid} --storage s3://models/root --endpoint https://s3.example.com"
    assert result == Result(
        0, "bot: deleted\n",
        f"note: still stored in s3://models/root/{namespace}/bot/{uid}: 2 checkpoints (3.0 KiB) and the adapter; to remove them, run `{purge}`\n"
        "note: copies stay in https://hub/x\n",
    )  # fmt: skip
    assert api.find(names.PLURAL, namespace, "bot") is None


def test_delete_asks_before_it_deletes_a_running_job(finetune: Finetune, job: Job, api: KubeApi, namespace: str) -> None:
    job(status=RUNNING_STATUS)
    job("other", status=SUCCEEDED_STATUS)
    refused_result = finetune("delete", "bot", "other")
    assert refused_result == Result(1, "", "error: bot has not finished, and cannot be resumed after the deletion: confirm with --yes\n")
    assert finetune("delete", "bot", "none", "--yes").code == 1
    assert api.find(names.PLURAL, namespace, "bot") is not None
    result = finetune("delete", "finetunejob/bot", "other", "--yes")
    assert (result.code, result.out) == (0, "bot: deleted\nother: deleted\n")
    assert "stay in the operator's default storage; to remove them, run `finetune purge bot -n" in result.err
    assert main.COMMANDS["delete"].__doc__
