"""The rows of the fault matrix that every change runs: lost answers, conflicts, stale views, a dead operator, foreign objects."""

from __future__ import annotations

import pytest
from finetune_api import names
from finetune_api.names import Condition, Label, Phase, Reason

from tests.support.apiproxy import LateEvents, LostResponse, Repeat, Status, StatusAfter, all_of
from tests.support.kubelet import Ending, Plan, failure, success
from tests.support.rig import FTJ, Rig, attempts, condition, created, holds, status_writes, strange_writes

pytestmark = pytest.mark.integration


@pytest.mark.row(1)
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_whole_life_costs_few_writes_and_none_of_what_is_the_user_s(rig: Rig, nodes: int) -> None:
    proxy = rig.proxy()
    rig.operator(through=proxy)
    rig.submit(resources={"nodes": nodes})
    pods = rig.kubelet.wait_running(rig.namespace, "job", count=nodes)
    rig.wait_phase(Phase.STARTING)
    for pod in pods:
        rig.kubelet.end(pod, success("s3://bucket/prefix/model"))
    body = rig.wait_finished()
    rig.wait_event(Reason.SUCCEEDED)
    assert holds(body, Condition.SUCCEEDED)
    assert body["status"]["phase"] == Phase.SUCCEEDED
    assert body["status"]["output"]["uri"] == "s3://bucket/prefix/model"
    assert attempts(body) == [(1, Reason.SUCCEEDED)]
    assert rig.jobs() == ["job-1"]
    assert (created(proxy, "jobs"), created(proxy, "services")) == (1, 1 if nodes > 1 else 0)
    assert status_writes(proxy) <= 8
    assert strange_writes(proxy) == []
    metadata = rig.get()["metadata"]
    assert "finalizers" not in metadata
    assert "annotations" not in metadata
    assert {m["subresource"] for m in metadata["managedFields"] if m["manager"] == names.MANAGER} == {"status"}
