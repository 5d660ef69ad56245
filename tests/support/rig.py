"""The test rig of the operator's fault tests: a real API server, a fake kubelet, fault proxies, and operators that run as processes.

All tests of a run share one API server and one fake kubelet. Each test has its own namespace, and the operators of the test watch only this namespace. At the
end of the test, its operators are killed. A log line of level error fails the test, unless it matches `Rig.allowed_log_lines`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.names import Condition, Label, Phase
from ruamel.yaml import YAML

from localcluster import Endpoint
from localcluster.processes import wait_until
from tests.support.apiproxy import ApiProxy
from tests.support.kubeapi import ApiError, KubeApi, Object, condition_is_true, find_condition
from tests.support.kubelet import FakeKubelet
from tests.support.operator_process import CHECKOUT_FOLDER, OperatorProcess, merge_mappings

FINETUNEJOBS = names.PLURAL
CRD = f"{names.PLURAL}.{names.GROUP}"
MINIMAL_SPEC: dict[str, Any] = {
    "model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}, "resources": {"gpusPerNode": 0},
}  # fmt: skip
_namespace_numbers = itertools.count(1)


@dataclass
class Cluster:
    """The API server and the fake kubelet that all tests of a run share."""

    endpoint: Endpoint
    api: KubeApi
    kubelet: FakeKubelet


def install_crd(api: KubeApi) -> None:
    """Apply the checked-in CRD and wait until the API server serves it."""
    crd = YAML(typ="safe").load((CHECKOUT_FOLDER / "crds" / "finetunejobs.yaml").read_text())
    api.patch("customresourcedefinitions", None, CRD, crd, patch_type="apply")
    api.wait("customresourcedefinitions", None, CRD, lambda body: condition_is_true(body, "Established"))
    wait_until("the CRD to be served", lambda: is_served(api), servers=[], timeout=30)


def is_served(api: KubeApi) -> bool:
    """Whether the API server lists FineTuneJobs. A server that is asked too early returns an error, even if the CRD already has the condition `Established`."""
    try:
        api.list(FINETUNEJOBS, "default")
    except ApiError as error:
        if error.code in (404, 429):
            return False
        raise
    return True


@pytest.fixture(scope="session")
def fault_cluster(control_plane: Endpoint) -> Iterator[Cluster]:
    """An API server with the installed CRD, and a fake kubelet."""
    api = KubeApi(control_plane)
    install_crd(api)
    with FakeKubelet(control_plane) as kubelet:
        yield Cluster(control_plane, api, kubelet)


@dataclass
class Rig:
    """The namespace, the operators and the fault proxies of one test."""

    cluster: Cluster
    namespace: str
    folder: Path
    operators: list[OperatorProcess] = field(default_factory=list)
    proxies: list[ApiProxy] = field(default_factory=list)
    allowed_log_lines: list[str] = field(default_factory=list)
    """Regular expressions of log lines that do not fail the test, although their level is error."""

    @property
    def api(self) -> KubeApi:
        return self.cluster.api

    @property
    def kubelet(self) -> FakeKubelet:
        return self.cluster.kubelet

    # -- the operator --------------------------------------------------------------------------------------------------

    def start_proxy(self, seed: int = 0) -> ApiProxy:
        """Start a fault proxy in front of the API server."""
        proxy = ApiProxy(self.cluster.endpoint, seed=seed).start()
        self.proxies.append(proxy)
        return proxy

    def start_operator(
        self, *, proxy: ApiProxy | None = None, config: Mapping[str, Any] | None = None,
        wait_until_ready: bool = True, token: str | None = None, env: Mapping[str, str] | None = None,
    ) -> OperatorProcess:  # fmt: skip
        """Start an operator for this namespace. The operator connects through `proxy`, if a proxy is given. It authenticates with `token`, by default with
        the administrator's token.
        """
        folder = self.folder / f"operator-{len(self.operators)}"
        folder.mkdir()
        if proxy is not None:
            kubeconfig = proxy.kubeconfig(folder / "kubeconfig", token)
        else:
            kubeconfig = self.cluster.endpoint.kubeconfig
        test_config = {"namespaces": [self.namespace], "scrape": {"url": self.kubelet.progress_url}}
        operator = OperatorProcess(folder, kubeconfig, merge_mappings(test_config, config or {}), env=env or {})
        self.operators.append(operator)
        return operator.start(wait_until_ready=wait_until_ready)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def submit(self, name: str = "job", **spec: Any) -> Object:
        """Create a FineTuneJob with the fields of MINIMAL_SPEC and `spec`."""
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}}
        return self.api.create(FINETUNEJOBS, self.namespace, body | {"spec": merge_mappings(MINIMAL_SPEC, spec)}, fieldValidation="Strict")

    def patch_spec(self, name: str = "job", **spec: Any) -> Object:
        """Merge `spec` into the FineTuneJob's spec."""
        return self.api.patch(FINETUNEJOBS, self.namespace, name, {"spec": spec})

    def get(self, name: str = "job") -> Object:
        return self.api.get(FINETUNEJOBS, self.namespace, name)

    def status(self, name: str = "job") -> Object:
        return dict(self.get(name).get("status") or {})

    def wait(self, until: Callable[[Object], bool], name: str = "job", *, timeout: float = 30, description: str = "") -> Object:
        return self.api.wait(FINETUNEJOBS, self.namespace, name, until, timeout=timeout, description=description)

    def wait_phase(self, phase: Phase, name: str = "job", *, timeout: float = 30) -> Object:
        """Wait until the FineTuneJob is in the phase, and return the object."""
        return self.wait(lambda body: (body.get("status") or {}).get("phase") == phase, name, timeout=timeout, description=phase)

    def wait_attempt(self, number: int, name: str = "job", *, timeout: float = 30) -> Object:
        """Wait until the status shows a start time for attempt `number`, and return the object."""
        return self.wait(
            lambda body: any(
                attempt["number"] == number and attempt.get("startTime") for attempt in (body.get("status") or {}).get("attempts", [])
            ),
            name, timeout=timeout, description=f"in attempt {number}",
        )  # fmt: skip

    def wait_finished(self, name: str = "job", *, timeout: float = 30) -> Object:
        return self.wait(lambda b: condition_is_true(b, Condition.FINISHED), name, timeout=timeout, description="finished")

    def list_job_names(self, name: str = "job") -> list[str]:
        """Return the names of a FineTuneJob's Jobs, sorted."""
        jobs = self.api.list("jobs", self.namespace, labels=f"{Label.JOB_NAME}={name}")
        return sorted(body["metadata"]["name"] for body in jobs)

    def list_event_reasons(self, name: str = "job") -> list[str]:
        """Return the reason of each event about a FineTuneJob, oldest first."""
        return [event["reason"] for event in self.api.list_events(self.namespace, name)]

    def list_event_notes(self, name: str = "job") -> list[tuple[str, str]]:
        """Return (reason, note) for each event about a FineTuneJob. An event that was emitted n times is listed n times."""
        events = self.api.list_events(self.namespace, name)
        return [(event["reason"], event["note"]) for event in events for _ in range((event.get("series") or {}).get("count", 1))]

    def wait_event(self, reason: str, name: str = "job", *, timeout: float = 20) -> Object:
        """Wait for an event about the FineTuneJob with this reason, and return the first one."""

        def select_events(items: list[Object]) -> list[Object]:
            return [event for event in items if event["reason"] == reason and event["regarding"]["name"] == name]

        return select_events(self.api.wait_list("events", self.namespace, lambda items: bool(select_events(items)), timeout=timeout))[0]

    def read_logs(self) -> str:
        """Return the logs of all operators of the test."""
        return "".join(operator.log for operator in self.operators)

    # -- cleanup ---------------------------------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """Kill the operators, stop the proxies and delete the namespace. Returns the log lines of level error that match no expression in
        `allowed_log_lines`.
        """
        for operator in self.operators:
            operator.kill()
        for proxy in self.proxies:
            proxy.stop()
        self.api.delete("namespaces", None, self.namespace)
        return [line for operator in self.operators for line in operator.find_error_lines(self.allowed_log_lines)]


@pytest.fixture
def rig(fault_cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A rig with a new namespace. A log line of level error fails the test, unless it matches `allowed_log_lines`."""
    test_name = re.sub(r"[^a-z0-9]+", "-", request.node.originalname.removeprefix("test_").lower())[:30].strip("-")
    namespace = f"f{next(_namespace_numbers)}-{test_name}".strip("-")
    fault_cluster.api.create("namespaces", None, {"metadata": {"name": namespace}})
    rig = Rig(fault_cluster, namespace, tmp_path)
    try:
        yield rig
    finally:
        error_lines = rig.close()
    assert not error_lines, "the operator logged errors:\n" + "\n".join(error_lines)


def count_status_writes(proxy: ApiProxy) -> int:
    """Count the accepted writes to the status of FineTuneJobs."""
    return sum(exchange.operation.endswith(f"{FINETUNEJOBS}/status") and 200 <= exchange.server_status < 300 for exchange in proxy.exchanges)


def count_created(proxy: ApiProxy, resource: str) -> int:
    """Count the objects of a resource that were created through the proxy."""
    return sum(exchange.operation == f"create {resource}" and exchange.server_status == 201 for exchange in proxy.exchanges)


def find_forbidden_writes(proxy: ApiProxy) -> list[str]:
    """Return the write requests that change anything but the status of FineTuneJobs. The operator must never send such requests."""
    return [exchange.operation for exchange in proxy.exchanges if exchange.method not in ("GET", "HEAD") and exchange.operation.endswith(f" {FINETUNEJOBS}")]


def attempt_reasons(body: Object) -> list[tuple[int, str]]:
    """Return (number, reason) for each attempt in the status."""
    return [(attempt["number"], attempt.get("reason", "")) for attempt in (body.get("status") or {}).get("attempts", [])]


__all__ = [
    "FINETUNEJOBS", "MINIMAL_SPEC", "Cluster", "Rig", "attempt_reasons", "find_condition", "condition_is_true", "count_created", "count_status_writes",
    "fault_cluster", "find_forbidden_writes", "install_crd", "rig",
]  # fmt: skip
