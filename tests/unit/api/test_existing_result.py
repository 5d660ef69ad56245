"""The comparison of a new job with an earlier result: which values and inputs count, and how differences are named."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_api.defaults import PlatformDefaults, resolve_defaults
from finetune_api.existing_result import (
    WITHOUT_EFFECT_ON_RESULT,
    RunResult,
    result_differences,
    result_digest,
    result_settings,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Output

SPEC: dict[str, Any] = {
    "model": {"source": "s3://models/base"}, "dataset": {"train": "https://host/rows.jsonl?signature=1"}, "training": {"epochs": 2},
    "resources": {"gpusPerNode": 8},
}  # fmt: skip
INPUTS = {"training data": "11", "model.source": "sha256:22"}


def settings(*changes: dict[str, Any], platform_defaults: PlatformDefaults | None = None, originals: dict[str, Any] | None = None) -> dict[str, Any]:
    value = dict(SPEC)
    for change in changes:
        for group, fields in change.items():
            value[group] = {**value.get(group, {}), **fields} if isinstance(fields, dict) else fields
    resolved = resolve_defaults(FineTuneJobSpec.model_validate(value), platform_defaults=platform_defaults)
    return result_settings(resolved.spec, set(resolved.defaults), originals)


def test_only_the_values_of_the_user_count() -> None:
    assert settings() == {
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
def test_values_without_effect_on_the_result_do_not_count(change: dict[str, Any]) -> None:
    assert settings(change) == settings()


def test_defaults_of_another_release_or_platform_do_not_count() -> None:
    other = settings(platform_defaults=PlatformDefaults(cpu="8", prepare_strategy="auto", node_pool="h200"))
    assert other == settings()
    assert "training.learningRate" not in other


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
def test_a_value_that_can_change_the_result_is_named(change: dict[str, Any], path: str) -> None:
    old, new = settings(), settings(change)
    earlier = RunResult(digest=result_digest(old, INPUTS), settings=old, inputs=INPUTS, finished_at=datetime.now(UTC), output=Output())
    assert result_digest(new, INPUTS) != earlier.digest
    assert result_differences(earlier, new, INPUTS) == [path]


def test_changed_inputs_are_named_after_the_fields() -> None:
    old = settings()
    earlier = RunResult(digest=result_digest(old, INPUTS), settings=old, inputs=INPUTS, finished_at=datetime.now(UTC), output=Output())
    changed = {"training data": "12", "test data": "1"}
    assert result_digest(old, changed) != earlier.digest
    assert result_differences(earlier, settings({"training": {"epochs": 3}}), changed) == [
        "training.epochs", "contents of model.source", "contents of test data", "contents of training data",
    ]  # fmt: skip


def test_an_adapted_run_is_compared_by_the_values_of_the_user() -> None:
    written = {"training": {"batchSizePerDevice": 8}}
    originals = {"training.batchSizePerDevice": 8, "training.gradientAccumulationSteps": None}
    adapted = settings({"training": {"batchSizePerDevice": 4, "gradientAccumulationSteps": 2}}, originals=originals)
    assert adapted == settings(written)


def test_the_fields_without_effect_exist() -> None:
    for path in WITHOUT_EFFECT_ON_RESULT:
        model: Any = FineTuneJobSpec
        for name in path.split("."):
            fields = {info.alias or field: info for field, info in model.model_fields.items()}
            assert name in fields, path
            arguments = [fields[name].annotation, *getattr(fields[name].annotation, "__args__", ())]
            model = next((item for item in arguments if hasattr(item, "model_fields")), None)
