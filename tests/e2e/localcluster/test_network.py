"""DNS and network across two nodes: pods of an Indexed Job reach each other, Services, the API server and S3."""

from __future__ import annotations

from typing import Any

import pytest

from localcluster.s3 import is_ready
from tests.e2e.localcluster.pods import NamespaceApi, has_true_condition, make_pod, read_phase, read_terminated_state

pytestmark = pytest.mark.e2e
NODE_SELECTOR_N2 = {"nodeSelector": {"kubernetes.io/hostname": "n2"}}


def _make_two_pod_job(*arguments: str) -> dict[str, Any]:
    """Return the manifest of an Indexed Job with two pods, which run on different nodes."""
    anti_affinity = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"job": "pair"}}}
    template = {
        **make_pod("x", *arguments)["spec"],
        "subdomain": "pair",
        "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [anti_affinity]}},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "pair"},
        "spec": {
            "completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0,
            "template": {"metadata": {"labels": {"job": "pair"}}, "spec": template},
        },
    }


def _make_headless_service() -> dict[str, Any]:
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job": "pair"}}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "pair"}, "spec": spec}


def test_pods_of_an_indexed_job_resolve_each_other_across_nodes(api: NamespaceApi) -> None:
    api.create(_make_headless_service())
    full_name = f"pair-0.pair.{api.namespace}.svc.cluster.local"
    api.create(_make_two_pod_job("lookup", "pair-0.pair", "20", "--", "lookup", "pair-1.pair", "20", "--", "lookup", full_name, "20"))
    api.wait("job", "pair", lambda job: has_true_condition(job, "Complete"), seconds=60)
    pods = api.cluster.endpoint.get(f"/api/v1/namespaces/{api.namespace}/pods")["items"]
    assert sorted(p["spec"]["nodeName"] for p in pods) == ["n1", "n2"]
    pods_by_index = {p["metadata"]["annotations"]["batch.kubernetes.io/job-completion-index"]: p for p in pods}
    addresses = [pods_by_index[index]["status"]["podIP"] for index in ("0", "1")]
    for job_pod in pods:
        assert api.kubectl("logs", job_pod["metadata"]["name"]).split("\n") == [*addresses, addresses[0]]


def test_a_service_is_reachable_from_the_other_node(api: NamespaceApi) -> None:
    server = make_pod("server", "serve", "8000", **{"nodeSelector": {"kubernetes.io/hostname": "n1"}})
    server["metadata"]["labels"] = {"app": "server"}
    api.create(server)
    spec = {"selector": {"app": "server"}, "ports": [{"port": 80, "targetPort": 8000}]}
    api.create({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": spec})
    api.wait("pod", "server", lambda p: read_phase(p) == "Running")
    assert read_terminated_state(api.run(make_pod("client", "get", "http://web", "20", **NODE_SELECTOR_N2)))["exitCode"] == 0
    assert api.kubectl("logs", "client") == "server"


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_a_pod_reaches_the_api_server_with_its_service_account(api: NamespaceApi, node: str) -> None:
    selector = {"kubernetes.io/hostname": node}
    manifest = make_pod("p", "api", "/api", "20", automountServiceAccountToken=True, nodeSelector=selector)
    assert read_terminated_state(api.run(manifest))["exitCode"] == 0
    assert api.kubectl("logs", "p") == "200 OK"


def test_requests_of_a_service_account_without_permissions_are_forbidden(api: NamespaceApi) -> None:
    api.run(make_pod("p", "api", "/api/v1/nodes", "20", automountServiceAccountToken=True))
    assert api.kubectl("logs", "p") == "403 Forbidden"


def test_s3_is_reachable_from_this_machine_and_from_pods(api: NamespaceApi) -> None:
    assert is_ready(api.cluster.s3)
    status = f"{api.cluster.s3.cluster_url}/status"
    assert read_terminated_state(api.run(make_pod("p", "get", status, "20", **NODE_SELECTOR_N2)))["exitCode"] == 0
