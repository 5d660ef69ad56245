"""Comparison of a new job with an earlier result: which values and inputs are compared, and which differences are reported."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api.defaults import PlatformDefaults, resolve_defaults
from finetune_api.existing_result import (
    PATHS_WITHOUT_EFFECT_ON_RESULT,
    RunResult,
    collect_result_settings,
    compute_result_digest,
    list_result_differences,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Output

SPEC: dict[str, Any] = {
    "model": {"source": "s3://models/base"}, "dataset": {"train": "https://host/rows.jsonl?signature=1"}, "training": {"epochs": 2},
    "resources": {"gpusPerNode": 8},
}  # fmt: skip
INPUTS = {"training data": "11", "model.source": "sha256:22"}


def collect_settings(*changes: dict[str, Any], platform_defaults: PlatformDefaults | None = None, user_values: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the settings of a job with SPEC and these changes that are compared with an earlier result. If the operator changed fields after a failure,
    `user_values` holds the values that the user had set.
    """
    raw_spec = dict(SPEC)
    for change in changes:
        for group, fields in change.items():
            raw_spec[group] = {**raw_spec.get(group, {}), **fields} if isinstance(fields, dict) else fields
    resolved_spec = resolve_defaults(FineTuneJobSpec.model_validate(raw_spec), platform_defaults=platform_defaults)
    return collect_result_settings(resolved_spec.spec, set(resolved_spec.defaults), user_values)


def test_only_values_that_the_user_set_are_compared() -> None:
    assert collect_settings() == {
        "model.source": "s3://models/base", "dataset.train": "https://host/rows.jsonl", "training.epochs": 2, "resources.gpusPerNode": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"placement": {"labels": {"team": "a"}, "priorityClassName": "high", "image": "x:2", "env": [{"name": "A", "value": "secret"}]}},
        {"resources": {"cpu": "8", "memory": "64Gi", "nodePool": "h200", "sharedMemory": "8Gi"}},
        {"policy": {"retries": 9, "onExistingResult": "adopt"}},
        {"prepare": {"strategy": "always"}},
        {"storage": {"endpoint": "https://other.example.com"}},
        {"tracking": {"loggingSteps": 1}},
        {"suspend": True},
        {"checkpoint": {"keep": 9}},
        {"model": {"tokenSecretRef": {"name": "hub", "key": "token"}}},
        {"dataset": {"train": "https://host/rows.jsonl?signature=2"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_values_without_effect_on_the_result_are_not_compared(change: dict[str, Any]) -> None:
    assert collect_settings(change) == collect_settings()


def test_defaults_of_the_platform_are_not_compared() -> None:
    platform_settings = collect_settings(platform_defaults=PlatformDefaults(cpu="8", prepare_strategy="auto", node_pool="h200"))
    assert platform_settings == collect_settings()
    assert "training.learningRate" not in platform_settings


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"training": {"learningRate": 1e-4}}, "training.learningRate"),
        ({"resources": {"nodes": 2}}, "resources.nodes"),
        ({"output": {"mergeAdapter": True}}, "output.mergeAdapter"),
        ({"method": {"lora": {"rank": 8}}}, "method.lora.rank"),
        ({"evaluation": {"metrics": ["accuracy"]}}, "evaluation.metrics"),
        ({"checkpoint": {"resume": "s3://a/b/checkpoints/step-00000100"}}, "checkpoint.resume"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_difference_that_can_change_the_result_is_reported_by_its_spec_path(change: dict[str, Any], path: str) -> None:
    old_settings, new_settings = collect_settings(), collect_settings(change)
    digest = compute_result_digest(old_settings, INPUTS)
    earlier_result = RunResult(digest=digest, settings=old_settings, inputs=INPUTS, finished_at=datetime.now(UTC), output=Output())
    assert compute_result_digest(new_settings, INPUTS) != earlier_result.digest
    assert list_result_differences(earlier_result, new_settings, INPUTS) == [path]


def test_changed_inputs_are_reported_after_changed_fields() -> None:
    old_settings = collect_settings()
    digest = compute_result_digest(old_settings, INPUTS)
    earlier_result = RunResult(digest=digest, settings=old_settings, inputs=INPUTS, finished_at=datetime.now(UTC), output=Output())
    changed_inputs = {"training data": "12", "test data": "1"}
    assert compute_result_digest(old_settings, changed_inputs) != earlier_result.digest
    assert list_result_differences(earlier_result, collect_settings({"training": {"epochs": 3}}), changed_inputs) == [
        "training.epochs", "contents of model.source", "contents of test data", "contents of training data",
    ]  # fmt: skip


def test_the_users_own_values_of_adapted_fields_are_compared() -> None:
    user_values = {"training.batchSizePerDevice": 8, "training.gradientAccumulationSteps": None}
    adapted_settings = collect_settings({"training": {"batchSizePerDevice": 4, "gradientAccumulationSteps": 2}}, user_values=user_values)
    assert adapted_settings == collect_settings({"training": {"batchSizePerDevice": 8}})


def test_every_path_without_effect_on_the_result_is_a_field_of_the_spec() -> None:
    for path in PATHS_WITHOUT_EFFECT_ON_RESULT:
        model: Any = FineTuneJobSpec
        for name in path.split("."):
            fields = {info.alias or field: info for field, info in model.model_fields.items()}
            assert name in fields, path
            arguments = [fields[name].annotation, *getattr(fields[name].annotation, "__args__", ())]
            model = next((item for item in arguments if hasattr(item, "model_fields")), None)
