"""Faults of the API server: it refuses requests, does not answer, compacts its store, or is unavailable."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from finetune_api.names import Phase, Reason

from localcluster import ControlPlane, processes
from tests.support.apiproxy import DisconnectWatch, SendEvent, StallWatch, Status
from tests.support.kubeapi import KubeApi
from tests.support.kubelet import FakeKubelet, PodPlan, failure_exit, success_exit
from tests.support.rig import FINETUNEJOBS, Cluster, Rig, attempt_reasons, count_created, install_crd

pytestmark = pytest.mark.faults
WATCHED_RESOURCES = ("pods", "jobs", FINETUNEJOBS)
NO_RESYNC = {"resyncSeconds": 3600}
"""A resync interval that is longer than a test, so the operator learns of changes only from watches."""


@pytest.mark.row(9)
def test_the_retry_after_header_of_a_429_response_limits_the_requests(rig: Rig) -> None:
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    for number in range(10):
        rig.submit(f"job-{number}")
    for number in range(10):
        rig.wait_attempt(1, f"job-{number}")
    with proxy.fault(Status(429, retry_after=3)):
        proxy.clear_exchanges()
        rig.kubelet.set_plan(rig.namespace, PodPlan(when_running=success_exit()))
        start = time.monotonic()
        proxy.wait_for(lambda e: e.started_at > start + 20, timeout_seconds=60)
        refused_count = len(proxy.exchanges)
    # Each of the 10 jobs and 3 watches retries at most once per 3 s. Up to 3 further requests of each can be in flight when the count starts.
    assert refused_count <= 13 * (20 / 3 + 3)
    for number in range(10):
        assert attempt_reasons(rig.wait_finished(f"job-{number}", timeout=60)) == [(1, Reason.SUCCEEDED)]


@pytest.mark.row(10)
def test_the_operator_survives_an_unavailable_server(rig: Rig) -> None:
    """By default, kopf gives up after 54 s without an API server. The operator must continue to retry instead."""
    rig.allowed_log_lines.append("503")
    proxy = rig.start_proxy()
    operator = rig.start_operator(proxy=proxy, config={"stuckSeconds": 3600})
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)
    with proxy.fault(Status(503)):
        for resource in WATCHED_RESOURCES:
            proxy.command_watches(resource, DisconnectWatch())
        start = time.monotonic()
        proxy.wait_for(lambda e: e.started_at > start + 65 and e.operation.startswith("watch"), timeout_seconds=120)
        rig.kubelet.end_pod(rig.kubelet.list_pods(rig.namespace, "job")[0], success_exit())
        assert operator.is_running
    assert attempt_reasons(rig.wait_finished(timeout=90)) == [(1, Reason.SUCCEEDED)]
    assert operator.is_running


@pytest.mark.row(12)
def test_no_transition_is_missed_while_watches_break(rig: Rig) -> None:
    proxy = rig.start_proxy()
    operator = rig.start_operator(proxy=proxy, config=NO_RESYNC)
    rig.kubelet.set_plan(rig.namespace, PodPlan(when_running=failure_exit(70, message="again")))
    for number in range(20):
        rig.submit(f"job-{number}", policy={"retries": 2})
        for resource in WATCHED_RESOURCES:
            proxy.command_watches(resource, DisconnectWatch())
    for number in range(20):
        for resource in WATCHED_RESOURCES:
            proxy.command_watches(resource, DisconnectWatch())
        body = rig.wait_finished(f"job-{number}", timeout=90)
        assert attempt_reasons(body) == [(n, Reason.INTERNAL_ERROR) for n in (1, 2, 3)]
    assert count_created(proxy, "jobs") == 60
    assert operator.is_running


@pytest.mark.row(13)
def test_objects_deleted_without_a_watch_are_dropped_from_the_cache(rig: Rig) -> None:
    proxy = rig.start_proxy()
    operator = rig.start_operator(proxy=proxy, config={"resyncSeconds": 3})
    for name in ("kept", "deleted"):
        rig.submit(name)
        rig.kubelet.wait_running(rig.namespace, name)
        rig.wait_attempt(1, name)
    for resource in WATCHED_RESOURCES:
        proxy.command_watches(resource, StallWatch())
    rig.api.delete(FINETUNEJOBS, rig.namespace, "deleted")
    rig.api.wait_gone(FINETUNEJOBS, rig.namespace, "deleted")
    rig.api.wait_gone("jobs", rig.namespace, "deleted-1", timeout=60)
    rig.api.wait_list("nodes", None, lambda items: sum(_count_phases(operator.read_metrics()).values()) == 1, timeout=60)
    proxy.clear_exchanges()
    for resource in WATCHED_RESOURCES:
        proxy.command_watches(resource, SendEvent.error(410))
    rig.kubelet.end_pod(rig.kubelet.list_pods(rig.namespace, "kept")[0], success_exit())
    rig.wait_finished("kept")
    rig.api.wait_list("nodes", None, lambda items: _count_phases(operator.read_metrics()) == {"Succeeded": 1}, timeout=60)
    assert [e.path for e in proxy.exchanges if e.method != "GET" and "/deleted" in e.path] == []
    rig.submit("deleted")
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "deleted")[0], success_exit())
    assert attempt_reasons(rig.wait_finished("deleted")) == [(1, Reason.SUCCEEDED)]


def _count_phases(metrics: dict[str, float]) -> dict[str, int]:
    """Return the number of jobs in each phase, from the operator's metrics."""
    jobs_by_phase = {}
    for name, value in metrics.items():
        if name.startswith("finetune_operator_jobs{") and value:
            jobs_by_phase[name.partition('phase="')[2].partition('"')[0]] = int(value)
    return jobs_by_phase


@pytest.mark.row(14)
def test_a_stalled_watch_is_closed_and_restarted(rig: Rig) -> None:
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy, config=NO_RESYNC)
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)
    for resource in WATCHED_RESOURCES:
        proxy.command_watches(resource, StallWatch())
    rig.kubelet.end_pod(rig.kubelet.list_pods(rig.namespace, "job")[0], success_exit())
    assert attempt_reasons(rig.wait_finished(timeout=150)) == [(1, Reason.SUCCEEDED)]


@pytest.mark.row(15)
@pytest.mark.parametrize("resource", WATCHED_RESOURCES)
def test_a_watch_error_ends_the_process(rig: Rig, resource: str) -> None:
    """The operator exits if a watch ends with an unexpected error, and its Deployment then restarts it."""
    rig.allowed_log_lines += ["watch", "Watch", "multitasker"]
    proxy = rig.start_proxy()
    operator = rig.start_operator(proxy=proxy, config=NO_RESYNC)
    rig.submit()
    rig.kubelet.wait_running(rig.namespace, "job")
    rig.wait_attempt(1)
    assert proxy.command_watches(resource, SendEvent.error(500)) >= 1
    assert operator.wait_end() == 1
    rig.kubelet.end_pod(rig.kubelet.list_pods(rig.namespace, "job")[0], success_exit())
    rig.start_operator(proxy=proxy, config=NO_RESYNC)
    assert attempt_reasons(rig.wait_finished()) == [(1, Reason.SUCCEEDED)]


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[tuple[Cluster, Path]]:
    """A control plane for one test, which may kill and restart its processes. The path is the control plane's state folder."""
    state = tmp_path / "state"
    with ControlPlane(state) as endpoint:
        api = KubeApi(endpoint)
        install_crd(api)
        with FakeKubelet(endpoint) as kubelet:
            yield Cluster(endpoint, api, kubelet), state


@pytest.mark.row(16)
def test_the_operator_survives_a_restart_of_the_server_with_a_compacted_store(own_cluster: tuple[Cluster, Path], tmp_path: Path) -> None:
    cluster, state = own_cluster
    cluster.api.create("namespaces", None, {"metadata": {"name": "work"}})
    rig = Rig(cluster, "work", tmp_path)
    operator = rig.start_operator(config={"resyncSeconds": 10})
    for name in ("kept", "ended", "deleted"):
        rig.submit(name)
        rig.kubelet.wait_running(rig.namespace, name)
        rig.wait_attempt(1, name)
    pid, argv = _find_process(state, "kube-apiserver")
    processes.kill(pid)
    _compact_etcd(next(word for word in argv if word.startswith("http://127.0.0.1:")))
    log = state / "logs" / "kube-apiserver.log"
    processes.spawn("kube-apiserver", argv, owner=state, log=log, lifetime=processes.Lifetime.UNTIL_PARENT_ENDS)
    processes.wait_until("the API server", cluster.endpoint.is_ready, servers=[], timeout=60)
    rig.api.delete(FINETUNEJOBS, rig.namespace, "deleted")
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "ended")[0], success_exit())
    assert attempt_reasons(rig.wait_finished("ended", timeout=90)) == [(1, Reason.SUCCEEDED)]
    rig.submit("new")
    rig.wait_attempt(1, "new", timeout=60)
    assert attempt_reasons(rig.get("kept")) == [(1, "")]
    assert operator.is_running
    for started_operator in rig.operators:
        started_operator.kill()


def _find_process(state: Path, name: str) -> tuple[int, list[str]]:
    """Return the process id and the command line of a control plane component."""
    for pid in processes.list_owned_pids(state):
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
        if len(argv) > 1 and argv[1] == name:
            return pid, argv
    raise AssertionError(f"no {name} runs in {state}")


def _compact_etcd(etcd_url: str) -> None:
    """Compact etcd's store, so that the resourceVersion of every watch is too old."""
    range_response = _post_json(f"{etcd_url}/v3/kv/range", b'{"key": "AA=="}')
    revision = range_response.partition('"revision":"')[2].partition('"')[0]
    _post_json(f"{etcd_url}/v3/kv/compaction", b'{"revision": "%s", "physical": true}' % revision.encode())


def _post_json(url: str, body: bytes) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, data=body, method="POST"), timeout=20) as answer:
        return str(answer.read().decode())


@pytest.mark.row(34)
def test_a_missing_crd_ends_the_process_with_a_message(tmp_path: Path) -> None:
    with ControlPlane(tmp_path / "state") as endpoint:
        api = KubeApi(endpoint)
        with FakeKubelet(endpoint) as kubelet:
            api.create("namespaces", None, {"metadata": {"name": "work"}})
            rig = Rig(Cluster(endpoint, api, kubelet), "work", tmp_path)
            operator_without_crd = rig.start_operator(wait_until_ready=False)
            assert operator_without_crd.wait_end() == 1
            assert "install the CRD first" in operator_without_crd.log
            assert "Traceback" not in operator_without_crd.log
            install_crd(api)
            rig.start_operator()
            rig.submit()
            rig.wait_attempt(1)
            for operator in rig.operators:
                operator.kill()


@pytest.mark.row(35)
def test_the_operator_survives_the_removal_and_reinstallation_of_the_crd(own_cluster: tuple[Cluster, Path], tmp_path: Path) -> None:
    cluster, _ = own_cluster
    cluster.api.create("namespaces", None, {"metadata": {"name": "work"}})
    rig = Rig(cluster, "work", tmp_path)
    operator = rig.start_operator(config={"resyncSeconds": 2})
    rig.submit("old")
    rig.wait_attempt(1, "old")
    cluster.api.delete("customresourcedefinitions", None, "finetunejobs.finetune-operator.io")
    cluster.api.wait_gone("customresourcedefinitions", None, "finetunejobs.finetune-operator.io")
    install_crd(cluster.api)
    try:
        rig.submit("new")
        rig.wait_attempt(1, "new", timeout=45)
    except AssertionError:
        assert operator.wait_end(10) > 0
        rig.start_operator()
    rig.kubelet.end_pod(rig.kubelet.wait_running("work", "new")[0], success_exit())
    # The garbage collector notices that the owner is deleted only when the API server serves the CRD again.
    rig.api.wait_gone("jobs", "work", "old-1", timeout=90)
    assert rig.wait_finished("new")["status"]["phase"] == Phase.SUCCEEDED
    for started_operator in rig.operators:
        started_operator.kill()


def test_a_job_runs_normally_through_a_proxy_without_faults(rig: Rig) -> None:
    """The operator behaves the same through a proxy without faults as without a proxy."""
    proxy = rig.start_proxy()
    rig.start_operator(proxy=proxy)
    rig.submit()
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "job")[0], success_exit())
    rig.wait_finished()
    assert {e.fault_name for e in proxy.exchanges} == {""}
