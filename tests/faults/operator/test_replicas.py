"""Tests with two replicas and one Lease: the leader is killed or paused, or another client deletes or takes over the Lease."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.names import Phase, Reason

from tests.support.apiproxy import ApiProxy
from tests.support.kubeapi import Object
from tests.support.kubelet import success
from tests.support.operator_process import OperatorProcess
from tests.support.rig import FTJ, Rig, attempt_reasons, count_created

pytestmark = pytest.mark.faults
LEASE = "finetune-operator"


def replica(rig: Rig) -> tuple[OperatorProcess, ApiProxy]:
    """Start an operator with leader election. A proxy records its requests."""
    election = {
        "enabled": True, "leaseName": LEASE, "leaseNamespace": rig.namespace, "leaseDurationSeconds": 3,
        "renewDeadlineSeconds": 2, "retryPeriodSeconds": 0.5,
    }  # fmt: skip
    proxy = rig.proxy()
    return rig.operator(through=proxy, config={"leaderElection": election}), proxy


def holder(rig: Rig) -> str:
    found = rig.api.find("leases", rig.namespace, LEASE)
    return str((found or {}).get("spec", {}).get("holderIdentity") or "")


def writes_except_lease(proxy: ApiProxy) -> list[str]:
    """Return all write requests except those to the Lease."""
    return [label for label in proxy.writes() if not label.endswith(" leases")]


def finish(rig: Rig, name: str, **more: Any) -> None:
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, name)[0], success())
    assert attempt_reasons(rig.wait_finished(name, timeout=40)) == [(1, Reason.SUCCEEDED)]


@pytest.mark.row(31)
def test_standby_takes_over_from_a_killed_leader(rig: Rig) -> None:
    leader, first = replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    standby, second = replica(rig)
    assert writes_except_lease(second) == []
    leader.kill()
    rig.submit("two")
    rig.wait_attempt(1, "two", timeout=40)
    finish(rig, "one")
    finish(rig, "two")
    assert (count_created(first, "jobs"), count_created(second, "jobs")) == (1, 1)
    last = max(e.started for e in first.exchanges)
    takeover_writes = [e.started for e in second.exchanges if e.operation.startswith(("create", "update")) and e.client_status < 400]
    assert last < min(takeover_writes)
    assert standby.is_running


@pytest.mark.row(32)
def test_paused_leader_writes_nothing_when_it_resumes(rig: Rig) -> None:
    rig.allowed_log_lines += ["Lease was not renewed in time", "is the leader now"]
    leader, first = replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    _, second = replica(rig)
    before = holder(rig)
    leader.signal(signal.SIGSTOP)
    rig.api.wait("leases", rig.namespace, LEASE, lambda b: b["spec"].get("holderIdentity") not in ("", before))
    rig.kubelet.end_pod(rig.kubelet.wait_running(rig.namespace, "one")[0], success())
    rig.wait_finished("one", timeout=40)
    rig.submit("two")
    rig.wait_attempt(1, "two")
    writes_before = writes_except_lease(first)
    leader.signal(signal.SIGCONT)
    assert leader.wait_end() == 1
    assert writes_except_lease(first) == writes_before
    assert holder(rig) != before
    assert count_created(second, "jobs") == 1


@pytest.mark.row(33)
def test_work_continues_after_the_lease_is_deleted_or_taken_over(rig: Rig) -> None:
    rig.allowed_log_lines += ["Lease was not renewed in time", "is the leader now"]
    replica(rig)
    replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    rig.api.delete("leases", rig.namespace, LEASE)
    rig.api.wait("leases", rig.namespace, LEASE, lambda b: bool(b["spec"].get("holderIdentity")))
    rig.submit("two")
    rig.wait_attempt(1, "two", timeout=40)
    rig.api.patch("leases", rig.namespace, LEASE, {"spec": {"holderIdentity": "somebody-else"}})

    def taken_back(lease: Object) -> bool:
        """Whether a replica holds the Lease again. If both replicas have exited, start a new one, as a Deployment does."""
        if not any(operator.is_running for operator in rig.operators):
            replica(rig)
        return lease["spec"].get("holderIdentity") not in ("", "somebody-else")

    rig.api.wait("leases", rig.namespace, LEASE, taken_back)
    rig.submit("three")
    rig.wait_attempt(1, "three", timeout=40)
    assert any(operator.is_running for operator in rig.operators)


def test_leader_releases_the_lease_on_sigterm(rig: Rig) -> None:
    leader, _ = replica(rig)
    rig.submit("one")
    rig.wait_attempt(1, "one")
    replica(rig)
    assert leader.stop() == 0
    rig.submit("two", suspend=True)
    rig.wait_phase(Phase.SUSPENDED, "two")
    assert rig.api.list(FTJ, rig.namespace)


@pytest.fixture
def neighbour(rig: Rig) -> Iterator[Rig]:
    """A second namespace in the same cluster."""
    folder = rig.folder / "neighbour"
    folder.mkdir()
    other = Rig(rig.cluster, f"{rig.namespace}-b", folder)
    rig.api.create("namespaces", None, {"metadata": {"name": other.namespace}})
    try:
        yield other
    finally:
        error_lines = other.close()
    assert not error_lines, error_lines


def test_two_operators_with_different_namespaces_share_a_cluster(rig: Rig, neighbour: Rig) -> None:
    """Each operator watches its own namespace with its own configuration. Neither operator affects the other's jobs."""
    sides = []
    for side, root in ((rig, "s3://here/runs"), (neighbour, "s3://there/runs")):
        proxy = side.proxy()
        sides.append((side, proxy, root, side.operator(through=proxy, config={"storage": {"uri": root}})))
    for side, _, root, _ in sides:
        side.submit("same-name")
        assert side.wait_attempt(1, "same-name")["status"]["resolved"]["defaults"]["storage.uri"] == root
    sides[0][3].kill()
    rig.submit("later")
    finish(neighbour, "same-name")
    assert rig.get("later").get("status", {}).get("phase") is None
    sides[0][3].start()
    for name in ("same-name", "later"):
        finish(rig, name)
    for side, proxy, _, _ in sides:
        assert proxy.writes() == proxy.writes(side.namespace)
        assert count_created(proxy, "jobs") == (2 if side is rig else 1)
