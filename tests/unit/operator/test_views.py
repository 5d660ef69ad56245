"""Views of Kubernetes objects: what is read, and what is skipped."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from finetune_operator.views import read_finetunejob, read_job, read_pod, read_status
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.operator.samples import UID, pod

META = {
    "namespace": "team", "name": "run-1-0-x", "uid": "u", "resourceVersion": "7", "creationTimestamp": "2026-11-21T12:00:00Z",
    "labels": {
        "app.kubernetes.io/managed-by": "finetune-operator", "finetune-operator.io/name": "run",
        "finetune-operator.io/uid": UID, "finetune-operator.io/attempt": "2",
    },
    "annotations": {"batch.kubernetes.io/job-completion-index": "3"},
    "ownerReferences": [{"kind": "Job", "uid": "job-2", "controller": True}],
}  # fmt: skip


def test_a_pod_is_read() -> None:
    body: dict[str, Any] = {
        "metadata": META | {"deletionTimestamp": "2026-11-21T12:05:00Z"},
        "spec": {"nodeName": "n1"},
        "status": {
            "phase": "Failed", "podIP": "10.0.0.9",
            "conditions": [
                {"type": "Ready", "status": "False"},
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "m"},
            ],
            "containerStatuses": [{"imageID": "img@sha256:1", "state": {"terminated": {
                "exitCode": 75, "reason": "Error", "message": "{}", "finishedAt": "2026-11-21T12:04:00Z",
            }}}],
        },
    }  # fmt: skip
    found = read_pod(body)
    assert found is not None
    assert (found.attempt, found.index, found.job_uid, found.node, found.ip) == (2, 3, "job-2", "n1", "10.0.0.9")
    assert (found.disruption, found.is_finished, found.is_ready) == ("PreemptionByScheduler", True, False)
    assert found.terminated is not None
    assert found.terminated.exit_code == 75
    assert found.deletion_timestamp == datetime(2026, 11, 21, 12, 5, tzinfo=UTC)


def test_what_is_not_ours_is_not_read() -> None:
    assert read_pod({"metadata": META | {"labels": {}}}) is None
    assert read_job({"metadata": META | {"labels": {"app.kubernetes.io/managed-by": "finetune-operator"}}}) is None


WORDS = st.text("abT1:-", max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["attempt", "attempts", "phase", "conditions", "progress", "observedGeneration", "checkpoints", "failure", "odd"]
)


@given(st.dictionaries(FIELDS, JSON))
def test_reading_a_corrupt_status_never_raises(raw: dict[str, Any]) -> None:
    read_status(raw)


def test_a_corrupt_field_does_not_take_the_others_with_it() -> None:
    found = read_status({"attempt": 4, "phase": "Odd", "progress": 7, "restarts": 3})
    assert (found.attempt, found.restarts, found.phase, found.progress) == (4, 3, None, None)


def test_a_foreign_condition_does_not_take_ours_with_it() -> None:
    ours = {"type": "Finished", "status": "True"}
    found = read_status({"attempt": 4, "conditions": [ours, {"type": "Theirs", "status": "True"}]})
    assert [c.type for c in found.conditions] == ["Finished"]


def test_a_finetunejob_is_read() -> None:
    meta = {"namespace": "team", "name": "run", "uid": UID, "resourceVersion": "12", "generation": 3}
    found = read_finetunejob({"metadata": meta, "spec": {"suspend": True}})
    assert (found.version, found.generation, found.is_deleting, found.status.observed_generation) == (12, 3, False, -1)


def test_pods_compare_by_value() -> None:
    assert pod() == replace(pod())
