"""The NetworkPolicies of attempts allow exactly the intended connections.

The operator's code builds the policies from the configuration in the rendered chart. In place of a network plugin, `tests/support/network_lab.py` enforces
the policies with nftables rules in network namespaces.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.names import PROGRESS_PORT, RENDEZVOUS_PORT
from finetune_operator.builders.isolation import build_network_policy
from finetune_operator.settings import IsolationSettings, parse_config

from tests.support.network_lab import Lab, LabPod, find_missing_requirement, run_lab
from tests.unit.operator.samples import job

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))
import tools  # noqa: E402 -- importable only after the change of sys.path

pytestmark = pytest.mark.skipif(find_missing_requirement() is not None, reason=str(find_missing_requirement()))
Object = dict[str, Any]
RANDOM_PORT = 40123
"""An example of the ports that Gloo and NCCL choose at random."""
PORTS = (PROGRESS_PORT, RENDEZVOUS_PORT, RANDOM_PORT)
JOB_LABEL = "batch.kubernetes.io/job-name"
MONITORING = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
METADATA, METADATA_V6, STORE = "169.254.169.254", "fd00:ec2::254", "203.0.113.9"


def make_lab_pod(number: int, name: str, namespace: str, labels: Object, ports: tuple[int, ...] = PORTS) -> LabPod:
    return LabPod(name, namespace, labels, (f"10.77.0.{number}/24", f"fd77::{number}/64"), ports)


@pytest.fixture(scope="module")
def helm_program() -> Path:
    tools.build_go_tools(tools.HELM)
    return Path(tools.HELM.path)


@pytest.fixture(scope="module")
def operator_labels(chart: list[Object]) -> Object:
    """Return the labels of the operator's pods in the rendered chart."""
    deployment = next(item for item in chart if item["kind"] == "Deployment")
    return dict(deployment["spec"]["template"]["metadata"]["labels"])


@pytest.fixture(scope="module")
def chart(helm_program: Path) -> list[Object]:
    return render(helm_program, {})


def render(helm_program: Path, isolation: Object) -> list[Object]:
    """Render the chart for the namespace `ops` with these `isolation` values."""
    chart = ROOT / "helm/finetune-operator"
    values_text = json.dumps({"imageRegistry": "r.example.com", "isolation": isolation})
    command = [str(helm_program), "template", "rel", str(chart), "-n", "ops", "-f", "-"]
    text = subprocess.run(command, input=values_text, capture_output=True, text=True, check=True).stdout
    return [item for item in yaml.safe_load_all(text) if item]


def read_isolation(chart: list[Object]) -> IsolationSettings:
    config_map = next(item for item in chart if item["kind"] == "ConfigMap")
    return parse_config(yaml.safe_load(config_map["data"]["config.yaml"]), "chart").isolation


def build_policies(isolation: IsolationSettings) -> tuple[Object, ...]:
    """Return the policies of the lab's two running attempts."""
    if not isolation.network_policy:
        return ()
    attempts = [job(1, name=name, uid=name, network_policy_name=name) for name in ("run-1", "other-1")]
    return tuple(build_network_policy(attempt, isolation) for attempt in attempts)


def make_lab_pods(operator_labels: Object) -> tuple[LabPod, ...]:
    cloud = LabPod("cloud", "", {}, ("10.77.0.99/24", f"{METADATA}/16", f"{STORE}/32", f"{METADATA_V6}/128", "fd77::99/64"), (80,))
    return (
        make_lab_pod(1, "run-0", "team", {JOB_LABEL: "run-1"}),
        make_lab_pod(2, "run-1", "team", {JOB_LABEL: "run-1"}),
        make_lab_pod(3, "other-attempt", "team", {JOB_LABEL: "other-1"}),
        make_lab_pod(4, "neighbour", "team", {"app": "notebook"}),
        make_lab_pod(5, "false-gang", "evil", {JOB_LABEL: "run-1"}),
        make_lab_pod(6, "false-operator", "evil", operator_labels),
        make_lab_pod(7, "operator", "ops", operator_labels),
        make_lab_pod(8, "other-ops", "ops", {"app": "dashboard"}),
        make_lab_pod(9, "prometheus", "monitoring", {"app": "prometheus"}),
        cloud,
    )


def find_reached_ports(lab_pods: tuple[LabPod, ...], policies: tuple[Object, ...]) -> dict[str, list[int]]:
    """For each other pod, by name, return the ports of the pod `run-0` that it reaches: first over IPv4, then over IPv6."""
    target, *sources = lab_pods
    attempts = tuple((source.name, ip, port) for source in sources for ip in target.ips for port in PORTS)
    results = run_lab(Lab(lab_pods, policies, attempts))
    reached_ports: dict[str, list[int]] = {source.name: [] for source in sources}
    for (source, _, port), succeeded in zip(attempts, results, strict=True):
        reached_ports[source] += [port] if succeeded else []
    return reached_ports


def test_only_the_gang_the_operator_and_monitoring_reach_a_pod(helm_program: Path, operator_labels: Object) -> None:
    isolation = read_isolation(render(helm_program, {"metricsFrom": [MONITORING]}))
    assert find_reached_ports(make_lab_pods(operator_labels), build_policies(isolation)) == {
        "run-1": [*PORTS, *PORTS], "other-attempt": [], "neighbour": [], "false-gang": [], "false-operator": [],
        "operator": [PROGRESS_PORT] * 2, "other-ops": [], "prometheus": [PROGRESS_PORT] * 2, "cloud": [],
    }  # fmt: skip


@pytest.mark.parametrize(("metrics_from", "expected_ports"), [([], []), ([{"ipBlock": {"cidr": "10.77.0.99/32"}}], [PROGRESS_PORT])], ids=["default", "listed"])
def test_top_reaches_a_pod_if_the_addresses_of_the_api_server_are_listed(
    helm_program: Path, operator_labels: Object, metrics_from: list[Object], expected_ports: list[int]
) -> None:
    """`finetune top` reads pods through the API server, which is not a pod. In this test, connections from the API server are tried from the lab's pod
    `cloud`.
    """
    isolation = read_isolation(render(helm_program, {"metricsFrom": metrics_from}))
    assert find_reached_ports(make_lab_pods(operator_labels), build_policies(isolation))["cloud"] == expected_ports


def test_by_default_prometheus_does_not_reach_a_pod(chart: list[Object], operator_labels: Object) -> None:
    reached_ports = find_reached_ports(make_lab_pods(operator_labels), build_policies(read_isolation(chart)))
    assert {source for source, ports in reached_ports.items() if ports} == {"run-1", "operator"}


def test_without_policies_every_pod_reaches_every_port(helm_program: Path, operator_labels: Object) -> None:
    """This test shows that the connections that are refused in the other tests are refused because of the policies."""
    isolation = read_isolation(render(helm_program, {"networkPolicy": False}))
    reached_ports = find_reached_ports(make_lab_pods(operator_labels), build_policies(isolation))
    assert reached_ports == {source: [*PORTS, *PORTS] for source in reached_ports} and len(reached_ports) == 9


@pytest.mark.parametrize(
    ("isolation_values", "is_metadata_reached", "is_store_reached"),
    [
        ({}, True, True),
        ({"blockMetadata": True}, False, True),
        ({"blockedCidrs": ["203.0.113.0/24"]}, True, False),
    ],
    ids=["default", "metadata", "a network"],
)
def test_blocked_addresses_are_not_reached_but_all_others_are(
    helm_program: Path, operator_labels: Object, isolation_values: Object, is_metadata_reached: bool, is_store_reached: bool
) -> None:
    isolation = read_isolation(render(helm_program, isolation_values))
    addresses = (METADATA, METADATA_V6, STORE)
    attempts = [("run-0", address, 80) for address in addresses] + [("neighbour", address, 80) for address in addresses]
    attempts += [("run-0", "10.77.0.2", RANDOM_PORT), ("run-0", "fd77::4", PROGRESS_PORT)]
    results = run_lab(Lab(make_lab_pods(operator_labels), build_policies(isolation), tuple(attempts)))
    expected_results = [is_metadata_reached, is_metadata_reached, is_store_reached]
    assert results == [*expected_results, True, True, True, True, True]
