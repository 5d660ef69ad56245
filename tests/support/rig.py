"""What a fault test of the operator stands on: a real API server, a played kubelet, proxies, operators as processes.

One API server and one kubelet serve a whole run; each test has a namespace of its own, in which its operators work. When a
test ends, its operators are killed and their logs searched: a line that would wake a person fails the test, unless the
test said that it must be there.
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
from tests.support.kubeapi import KubeApi, Object, Refused, condition, holds
from tests.support.kubelet import FakeKubelet
from tests.support.operator_process import CHECKOUT, OperatorProcess, merged

FTJ = names.PLURAL
CRD = f"{names.PLURAL}.{names.GROUP}"
MINIMAL: dict[str, Any] = {
    "model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}, "resources": {"gpusPerNode": 0},
}  # fmt: skip
_numbers = itertools.count(1)


@dataclass
class Cluster:
    """What all tests of a run share."""

    endpoint: Endpoint
    api: KubeApi
    kubelet: FakeKubelet


def install_crd(api: KubeApi) -> None:
    """Apply the checked-in definition and wait until it is served."""
    crd = YAML(typ="safe").load((CHECKOUT / "crds" / "finetunejobs.yaml").read_text())
    api.patch("customresourcedefinitions", None, CRD, crd, patch="apply")
    api.wait("customresourcedefinitions", None, CRD, lambda body: holds(body, "Established"))
    wait_until("the definition", lambda: served(api), servers=[], timeout=30)


def served(api: KubeApi) -> bool:
    """Whether FineTuneJobs can be listed: an established definition takes a moment more."""
    try:
        api.list(FTJ, "default")
    except Refused as error:
        if error.code in (404, 429):
            return False
        raise
    return True


@pytest.fixture(scope="session")
def fault_cluster(control_plane: Endpoint) -> Iterator[Cluster]:
    """The API server with our definition in it, and nodes that are played."""
    api = KubeApi(control_plane)
    install_crd(api)
    with FakeKubelet(control_plane) as kubelet:
        yield Cluster(control_plane, api, kubelet)


@dataclass
class Rig:
    """One test's part of the cluster."""

    cluster: Cluster
    namespace: str
    folder: Path
    operators: list[OperatorProcess] = field(default_factory=list)
    proxies: list[ApiProxy] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    """Expressions for alarming lines that must be in the logs."""

    @property
    def api(self) -> KubeApi:
        return self.cluster.api

    @property
    def kubelet(self) -> FakeKubelet:
        return self.cluster.kubelet

    # -- the operator --------------------------------------------------------------------------------------------------

    def proxy(self, seed: int = 0) -> ApiProxy:
        """A fault proxy in front of the API server."""
        proxy = ApiProxy(self.cluster.endpoint, seed=seed).start()
        self.proxies.append(proxy)
        return proxy

    def operator(
        self, *, through: ApiProxy | None = None, config: Mapping[str, Any] | None = None, crash_at: str = "",
        ready: bool = True, token: str | None = None, env: Mapping[str, str] | None = None,
    ) -> OperatorProcess:  # fmt: skip
        """A running operator for this namespace, through a proxy if one is given, as a user if a token is given."""
        folder = self.folder / f"operator-{len(self.operators)}"
        folder.mkdir()
        if through is not None:
            kubeconfig = through.kubeconfig(folder / "kubeconfig", token)
        else:
            kubeconfig = self.cluster.endpoint.kubeconfig
        own = {"namespaces": [self.namespace], "scrape": {"url": self.kubelet.progress_url}}
        operator = OperatorProcess(
            folder, kubeconfig, merged(own, config or {}), crash_at=crash_at, env=env or {}
        )
        self.operators.append(operator)
        return operator.start(ready=ready)

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def submit(self, name: str = "job", **spec: Any) -> Object:
        """Create a FineTuneJob; `spec` is laid over a minimal one."""
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}}
        return self.api.create(FTJ, self.namespace, body | {"spec": merged(MINIMAL, spec)}, fieldValidation="Strict")

    def steer(self, name: str = "job", **spec: Any) -> Object:
        """Change its spec."""
        return self.api.patch(FTJ, self.namespace, name, {"spec": spec})

    def get(self, name: str = "job") -> Object:
        return self.api.get(FTJ, self.namespace, name)

    def status(self, name: str = "job") -> Object:
        return dict(self.get(name).get("status") or {})

    def wait(self, good: Callable[[Object], bool], name: str = "job", *, timeout: float = 30, what: str = "") -> Object:
        return self.api.wait(FTJ, self.namespace, name, good, timeout=timeout, what=what)

    def wait_phase(self, phase: Phase, name: str = "job", *, timeout: float = 30) -> Object:
        """The object as soon as its phase is that."""
        return self.wait(lambda b: (b.get("status") or {}).get("phase") == phase, name, timeout=timeout, what=phase)

    def wait_attempt(self, number: int, name: str = "job", *, timeout: float = 30) -> Object:
        """The object as soon as that attempt's Job is in its status."""
        return self.wait(
            lambda b: any(
                a["number"] == number and a.get("startTime") for a in (b.get("status") or {}).get("attempts", [])
            ),
            name, timeout=timeout, what=f"in attempt {number}",
        )  # fmt: skip

    def wait_finished(self, name: str = "job", *, timeout: float = 30) -> Object:
        return self.wait(lambda b: holds(b, Condition.FINISHED), name, timeout=timeout, what="finished")

    def jobs(self, name: str = "job") -> list[str]:
        """Names of its Jobs, sorted."""
        found = self.api.list("jobs", self.namespace, labels=f"{Label.NAME}={name}")
        return sorted(body["metadata"]["name"] for body in found)

    def reasons(self, name: str = "job") -> list[str]:
        """Reasons of its events, oldest first."""
        return [event["reason"] for event in self.api.events(self.namespace, name)]

    def notes(self, name: str = "job") -> list[tuple[str, str]]:
        """(reason, note) of its events, once for each time that it was told."""
        events = self.api.events(self.namespace, name)
        return [(e["reason"], e["note"]) for e in events for _ in range((e.get("series") or {}).get("count", 1))]

    def wait_event(self, reason: str, name: str = "job", *, timeout: float = 20) -> Object:
        """The first event with that reason."""

        def found(items: list[Object]) -> list[Object]:
            return [e for e in items if e["reason"] == reason and e["regarding"]["name"] == name]

        return found(self.api.wait_list("events", self.namespace, lambda items: bool(found(items)), timeout=timeout))[0]

    def log(self) -> str:
        """All that the operators wrote."""
        return "".join(operator.log for operator in self.operators)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """Kill what runs, remove the namespace; returns alarming lines."""
        for operator in self.operators:
            operator.kill()
        for proxy in self.proxies:
            proxy.stop()
        self.api.delete("namespaces", None, self.namespace)
        return [line for operator in self.operators for line in operator.alarms(self.allowed)]


@pytest.fixture
def rig(fault_cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A namespace of its own, and an eye on the logs."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.originalname.removeprefix("test_").lower())[:30].strip("-")
    namespace = f"f{next(_numbers)}-{words}".strip("-")
    fault_cluster.api.create("namespaces", None, {"metadata": {"name": namespace}})
    rig = Rig(fault_cluster, namespace, tmp_path)
    try:
        yield rig
    finally:
        alarms = rig.close()
    assert not alarms, "the operator's log has lines that would wake a person:\n" + "\n".join(alarms)


def status_writes(proxy: ApiProxy) -> int:
    """Writes of FineTuneJob status that reached the server."""
    return sum(e.operation.endswith(f"{FTJ}/status") and 200 <= e.applied < 300 for e in proxy.exchanges)


def created(proxy: ApiProxy, resource: str) -> int:
    """Objects of a kind that were really created through the proxy."""
    return sum(e.operation == f"create {resource}" and e.applied == 201 for e in proxy.exchanges)


def strange_writes(proxy: ApiProxy) -> list[str]:
    """Writes that the operator must never make: anything of a FineTuneJob but its status."""
    return [e.operation for e in proxy.exchanges if e.method not in ("GET", "HEAD") and e.operation.endswith(f" {FTJ}")]


def attempts(body: Object) -> list[tuple[int, str]]:
    """(number, reason) of the attempts in a status."""
    return [(one["number"], one.get("reason", "")) for one in (body.get("status") or {}).get("attempts", [])]


__all__ = [
    "FTJ", "MINIMAL", "Cluster", "Rig", "attempts", "condition", "created", "fault_cluster", "holds", "install_crd",
    "rig", "status_writes", "strange_writes",
]  # fmt: skip
