"""Views of Kubernetes objects: which fields are parsed, and which objects and fields are skipped."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from finetune_operator.views import read_finetunejob, read_job, read_pod, read_status
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.operator.samples import UID, pod

METADATA = {
    "namespace": "team", "name": "run-1-0-x", "uid": "u", "resourceVersion": "7", "creationTimestamp": "2026-11-21T12:00:00Z",
    "labels": {
        "app.kubernetes.io/managed-by": "finetune-operator", "finetune-operator.io/name": "run",
        "finetune-operator.io/uid": UID, "finetune-operator.io/attempt": "2",
    },
    "annotations": {"batch.kubernetes.io/job-completion-index": "3"},
    "ownerReferences": [{"kind": "Job", "uid": "job-2", "controller": True}],
}  # fmt: skip


def test_pod_is_parsed() -> None:
    body: dict[str, Any] = {
        "metadata": METADATA | {"deletionTimestamp": "2026-11-21T12:05:00Z"},
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
    view = read_pod(body)
    assert view is not None
    assert (view.attempt, view.completion_index, view.job_uid, view.node, view.ip) == (2, 3, "job-2", "n1", "10.0.0.9")
    assert (view.disruption_reason, view.is_finished, view.is_ready) == ("PreemptionByScheduler", True, False)
    assert view.terminated is not None
    assert view.terminated.exit_code == 75
    assert view.deletion_timestamp == datetime(2026, 11, 21, 12, 5, tzinfo=UTC)


def test_objects_without_the_operators_labels_are_skipped() -> None:
    assert read_pod({"metadata": METADATA | {"labels": {}}}) is None
    assert read_job({"metadata": METADATA | {"labels": {"app.kubernetes.io/managed-by": "finetune-operator"}}}) is None


SHORT_TEXTS = st.text("abT1:-", max_size=8)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | SHORT_TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT_TEXTS, inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["attempt", "attempts", "phase", "conditions", "progress", "observedGeneration", "checkpoints", "failure", "odd"]
)


@given(st.dictionaries(FIELDS, JSON_VALUES))
def test_reading_a_corrupt_status_never_raises(raw_status: dict[str, Any]) -> None:
    read_status(raw_status)


def test_corrupt_field_is_dropped_and_all_others_are_kept() -> None:
    new_status = read_status({"attempt": 4, "phase": "Odd", "progress": 7, "restarts": 3})
    assert (new_status.attempt, new_status.restarts, new_status.phase, new_status.progress) == (4, 3, None, None)


def test_unknown_condition_is_dropped_and_known_ones_are_kept() -> None:
    known_condition = {"type": "Finished", "status": "True"}
    new_status = read_status({"attempt": 4, "conditions": [known_condition, {"type": "Theirs", "status": "True"}]})
    assert [condition.type for condition in new_status.conditions] == ["Finished"]


def test_finetunejob_is_parsed() -> None:
    meta = {"namespace": "team", "name": "run", "uid": UID, "resourceVersion": "12", "generation": 3}
    view = read_finetunejob({"metadata": meta, "spec": {"suspend": True}})
    assert (view.version, view.generation, view.is_deleting, view.status.observed_generation) == (12, 3, False, -1)


def test_pods_with_equal_values_are_equal() -> None:
    assert pod() == replace(pod())
