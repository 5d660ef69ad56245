"""Fields of a spec that would make a preparation pod run code that the platform has not approved."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tenancy import find_user_code_in_preparation


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({}, []),
        ({"model": {"source": "hf://a/b", "trustRemoteCode": False}, "placement": {"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}}, []),
        ({"model": {"source": "hf://a/b", "trustRemoteCode": True}}, ["model.trustRemoteCode"]),
        ({"placement": {"env": [{"name": "LD_PRELOAD", "value": "/x.so"}]}}, ["placement.env[0].name"]),
        (
            {"placement": {"volumes": [{"name": "v", "persistentVolumeClaim": "c"}], "volumeMounts": [{"name": "v", "mountPath": "/opt/venv/lib"}]}},
            ["placement.volumeMounts[0].mountPath"],
        ),
        ({"placement": {"nodeSelector": {"a": "b"}, "serviceAccountName": "own"}}, []),
        ({"checkpoint": {"allowPickle": True}}, []),
    ],
)  # fmt: skip
def test_fields_that_bring_user_code_into_a_preparation_are_found(spec: dict[str, Any], fields: list[str]) -> None:
    assert find_user_code_in_preparation(FineTuneJobSpec.model_validate(spec)) == fields
