"""The hash of a spec's immutable fields. The operator records this hash in the status, so all versions of the operator must compute the same hash."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_operator.policies.spec_hash import compute_spec_sha256

SPEC = {"model": {"source": "org/\u6a21"}, "dataset": {"train": ["a", "b"]}, "suspend": True}


def test_hash_is_equal_in_all_versions_of_the_operator() -> None:
    assert compute_spec_sha256(SPEC) == "017f4cc9743a56647d7eef2431f359c58f514848d28cc377517d36de0c9e9ef4"


@pytest.mark.parametrize(
    "change",
    [
        {"suspend": False}, {"cancel": True}, {"policy": {}}, {"policy": {"ttlSecondsAfterFinished": 5, "activeDeadlineSeconds": 5}},
        {"placement": {"queueName": "q"}}, {"dataset": {"format": {}, "train": ["a", "b"]}},
    ],
)  # fmt: skip
def test_mutable_fields_and_empty_objects_do_not_change_the_hash(change: dict[str, Any]) -> None:
    assert compute_spec_sha256({**change, **SPEC, **change}) == compute_spec_sha256(SPEC)


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": {"train": ["b", "a"]}}, {"queueName": "q"}, {"policy": {"retries": 1}}, {"model": {"source": None}},
        {"placement": {"queueName": "q", "image": "i"}}, {"method": {"suspend": True}}, {"resources": []},
    ],
)  # fmt: skip
def test_every_other_field_of_the_spec_changes_the_hash(change: dict[str, Any]) -> None:
    assert compute_spec_sha256({**SPEC, **change}) != compute_spec_sha256(SPEC)
