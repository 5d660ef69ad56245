"""Two replicas with one Lease: the leader is killed or paused, or another client deletes or takes over the Lease."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from finetune_api.names import Phase, Reason

from tests.support.apiproxy import ApiProxy
from tests.support.kubeapi import Objects
from tests.support.kubelet import success_exit
from tests.support.operator_process import OperatorProcess
from tests.support.rig import FINETUNEJOBS, Rig, attempt_reasons, count_created

pytestmark = pytest.mark.faults
LEASE_NAME = "finetune-operator"


def start_replica(rig: Rig) -> tuple[OperatorProcess, ApiProxy]:
    """Start an operator with leader election, behind a proxy that records its requests."""
    election = {
        "enabled": True, "leaseName": LEASE_NAME, "leaseNamespace": rig.namespace, "leaseDurationSeconds": 3,
        "renewDeadlineSeconds": 2, "retryPeriodSeconds": 0.5,
    }  # fmt: skip
    proxy = rig.start_proxy()
    return rig.start_operator(proxy=proxy, config={"leaderElection": election}), proxy


def read_lease_holder(rig: Rig) -> str:
    lease = rig.api.find("leases", rig.namespace, LEASE_NAME)
    return str((lease or {}).get("spec", {}).get("holderIdentity") or "")


def list_writes_except_lease(proxy: ApiProxy) -> list[str]:
    """Return all write requests, except the writes to the Lease."""
    return [label for label in proxy.list_writes() if not label.endswith(" leases")]


def finish_job(rig: Rig, name: str) -> None:
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, name)[0], success_exit())
    assert attempt_reasons(rig.wait_finished(name, timeout=40)) == [(1, Reason.SUCCEEDED)]


@pytest.mark.row(31)
def test_the_standby_replica_takes_over_from_a_killed_leader(rig: Rig) -> None:
    leader, first_proxy = start_replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    standby, second_proxy = start_replica(rig)
    assert list_writes_except_lease(second_proxy) == []
    leader.kill()
    rig.submit("two")
    rig.wait_attempt(1, "two", timeout=40)
    finish_job(rig, "one")
    finish_job(rig, "two")
    assert (count_created(first_proxy, "jobs"), count_created(second_proxy, "jobs")) == (1, 1)
    last_request_at = max(e.started_at for e in first_proxy.exchanges)
    takeover_writes = [e.started_at for e in second_proxy.exchanges if e.operation.startswith(("create", "update")) and e.client_status < 400]
    assert last_request_at < min(takeover_writes)
    assert standby.is_running


@pytest.mark.row(32)
def test_a_paused_leader_writes_nothing_when_it_resumes(rig: Rig) -> None:
    rig.allowed_log_lines += ["Lease was not renewed in time", "is the leader now"]
    leader, first_proxy = start_replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    _, second_proxy = start_replica(rig)
    first_holder = read_lease_holder(rig)
    leader.signal(signal.SIGSTOP)
    rig.api.wait("leases", rig.namespace, LEASE_NAME, lambda b: b["spec"].get("holderIdentity") not in ("", first_holder))
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "one")[0], success_exit())
    rig.wait_finished("one", timeout=40)
    rig.submit("two")
    rig.wait_attempt(1, "two")
    writes_before = list_writes_except_lease(first_proxy)
    leader.signal(signal.SIGCONT)
    assert leader.wait_end() == 1
    assert list_writes_except_lease(first_proxy) == writes_before
    assert read_lease_holder(rig) != first_holder
    assert count_created(second_proxy, "jobs") == 1


@pytest.mark.row(33)
def test_work_continues_after_the_lease_is_deleted_or_taken_over(rig: Rig) -> None:
    rig.allowed_log_lines += ["Lease was not renewed in time", "is the leader now"]
    start_replica(rig)
    start_replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    rig.api.delete("leases", rig.namespace, LEASE_NAME)
    rig.api.wait("leases", rig.namespace, LEASE_NAME, lambda b: bool(b["spec"].get("holderIdentity")))
    rig.submit("two")
    rig.wait_attempt(1, "two", timeout=40)
    rig.api.patch("leases", rig.namespace, LEASE_NAME, {"spec": {"holderIdentity": "somebody-else"}})

    def is_held_by_replica(leases: Objects) -> bool:
        """Whether a replica holds the Lease again. If both replicas have exited, start another, as a Deployment would."""
        if not any(operator.is_running for operator in rig.operators):
            start_replica(rig)
        return leases[0]["spec"].get("holderIdentity") not in ("", "somebody-else")

    # Both replicas may exit after the last change of the Lease. A watch on the Lease would then not call `is_held_by_replica` again, so the
    # test lists the Leases repeatedly.
    rig.api.wait_list("leases", rig.namespace, is_held_by_replica, timeout=60)
    rig.submit("three")
    rig.wait_attempt(1, "three", timeout=40)
    assert any(operator.is_running for operator in rig.operators)


def test_the_leader_releases_the_lease_on_sigterm(rig: Rig) -> None:
    leader, _ = start_replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    start_replica(rig)
    assert leader.stop() == 0
    rig.submit("two", suspend=True)
    rig.wait_phase(Phase.SUSPENDED, "two")
    assert rig.api.list(FINETUNEJOBS, rig.namespace)


@pytest.fixture
def neighbour(rig: Rig) -> Iterator[Rig]:
    """A rig with a second namespace in the same cluster."""
    folder = rig.folder / "neighbour"
    folder.mkdir()
    neighbour_rig = Rig(rig.cluster, f"{rig.namespace}-b", folder)
    rig.api.create("namespaces", None, {"metadata": {"name": neighbour_rig.namespace}})
    try:
        yield neighbour_rig
    finally:
        error_lines = neighbour_rig.close()
    assert not error_lines, error_lines


def test_two_operators_with_different_namespaces_share_a_cluster(rig: Rig, neighbour: Rig) -> None:
    """Each operator has its own namespace and configuration, and does not affect the other operator's jobs."""
    installations = []
    for side_rig, storage_uri in ((rig, "s3://here/runs"), (neighbour, "s3://there/runs")):
        proxy = side_rig.start_proxy()
        installations.append((side_rig, proxy, storage_uri, side_rig.start_operator(proxy=proxy, config={"storage": {"uri": storage_uri}})))
    for side_rig, _, storage_uri, _ in installations:
        side_rig.submit("same-name")
        assert side_rig.wait_attempt(1, "same-name")["status"]["resolved"]["defaults"]["storage.uri"] == storage_uri
    installations[0][3].kill()
    rig.submit("later")
    finish_job(neighbour, "same-name")
    assert rig.get("later").get("status", {}).get("phase") is None
    installations[0][3].start()
    for name in ("same-name", "later"):
        finish_job(rig, name)
    for side_rig, proxy, _, _ in installations:
        assert proxy.list_writes() == proxy.list_writes(side_rig.namespace)
        assert count_created(proxy, "jobs") == (2 if side_rig is rig else 1)
