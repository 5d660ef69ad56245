"""Warnings about a valid spec. The operator writes the warnings into `status.resolved.notes`."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.defaults import LEARNING_RATE_ADAPTER, LEARNING_RATE_FULL, resolve_defaults
from finetune_api.objectives import OBJECTIVES
from finetune_api.rules import Problem, check_spec, choose_max_lora_rank, find_warnings
from finetune_api.rules.warnings import LEARNING_RATE_RANGES
from finetune_api.spec import FineTuneJobSpec


def make_spec(**groups: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate({"model": {"source": "org/m"}, "dataset": {"train": "org/d"}, **groups})


def find_rate_warnings(job: FineTuneJobSpec) -> list[Problem]:
    return [warning for warning in find_warnings(job) if warning.code == "LearningRateUnusual"]


@pytest.mark.parametrize(
    ("method", "trainer", "rate", "is_unusual"),
    [
        ("lora", "sft", 5, True),
        ("lora", "sft", 1e-2, False),
        ("lora", "sft", 2e-2, True),
        ("lora", "sft", 1e-7, True),
        ("qlora", "sft", 2e-4, False),
        ("full", "sft", 2e-3, True),
        ("full", "sft", 1e-3, False),
        ("spectrum", "sft", 2e-3, True),
        ("promptTuning", "sft", 0.3, False),
        ("lora", "dpo", 2e-3, True),
        ("lora", "dpo", 5e-6, False),
    ],
)
def test_a_learning_rate_outside_the_usual_range_gives_a_warning(
    method: str, trainer: str, rate: float, is_unusual: bool
) -> None:
    job = make_spec(method={"type": method}, trainer={"type": trainer}, training={"learningRate": rate})
    assert [warning.code for warning in find_rate_warnings(job)] == (["LearningRateUnusual"] if is_unusual else [])


@pytest.mark.parametrize(
    ("method", "trainer", "low", "high"),
    [
        ("full", "sft", 1e-7, 1e-3), ("lora", "reward", 1e-6, 1e-2), ("ia3", "sft", 1e-5, 1.0), ("prefixTuning", "sft", 1e-5, 1.0),
        ("full", "grpo", 1e-8, 1e-3), ("lora", "kto", 1e-8, 1e-3),
    ],
)  # fmt: skip
def test_the_lowest_and_the_highest_usual_learning_rate_give_no_warning(method: str, trainer: str, low: float, high: float) -> None:
    def list_message_starts(rate: float) -> list[str]:
        warnings = find_rate_warnings(make_spec(method={"type": method}, trainer={"type": trainer}, training={"learningRate": rate}))
        return [warning.message.split(" for ")[0] for warning in warnings]

    assert list_message_starts(low) == list_message_starts(high) == []
    assert list_message_starts(low * 0.9) == [f"{low * 0.9:g} is unusually small".replace("e-0", "e-")]
    assert list_message_starts(high * 1.1) == [f"{high * 1.1:g} is unusually large"]


def test_default_learning_rates_give_no_warning() -> None:
    for rate, range_name in ((LEARNING_RATE_ADAPTER, "adapters"), (LEARNING_RATE_FULL, "base weights")):
        low, high = LEARNING_RATE_RANGES[range_name]
        assert low <= rate <= high
    for objective, facts in OBJECTIVES.items():
        job = make_spec(trainer={"type": objective}, training={"learningRate": facts.learning_rate or LEARNING_RATE_ADAPTER})
        assert find_rate_warnings(job) == []


def test_epochs_next_to_max_steps_give_a_warning() -> None:
    (warning,) = find_warnings(make_spec(training={"epochs": 2, "maxSteps": 40}))
    assert str(warning) == (
        "spec.training.epochs: 2 has no effect, because training.maxSteps is 40; remove training.epochs or training.maxSteps"
    )
    assert find_warnings(make_spec(training={"maxSteps": 40})) == []


def test_the_notes_of_a_resolved_spec_contain_the_warnings() -> None:
    job = make_spec(training={"epochs": 2, "maxSteps": 40, "learningRate": 5})
    notes = resolve_defaults(job).notes
    assert (
        notes[0]
        == "training.learningRate 5 is unusually large for trainer sft with method lora, and usually makes training diverge"
    )
    assert notes[1] == "training.epochs 2 has no effect, because training.maxSteps is 40"


def test_a_feature_that_a_server_cannot_load_is_refused_only_if_the_job_names_the_server() -> None:
    dora_spec = make_spec(method={"type": "dora"})
    assert [(warning.path, warning.code, warning.message) for warning in find_warnings(dora_spec)] == [
        ("method.type", "NotServable", "vllm and kserve cannot load DoRA adapters")
    ]
    assert check_spec(dora_spec) == []
    named_spec = make_spec(method={"type": "dora"}, output={"serving": ["kserve"]})
    assert [warning.message for warning in find_warnings(named_spec)] == ["vllm cannot load DoRA adapters"]
    (problem,) = check_spec(named_spec)
    assert (problem.path, problem.message) == ("method.type", "output.serving contains kserve, but kserve cannot load DoRA adapters")
    merged_spec = make_spec(method={"type": "dora"}, output={"serving": ["vllm", "kserve"], "mergeAdapter": True})
    assert check_spec(merged_spec) == [] and find_warnings(merged_spec) == []


@pytest.mark.parametrize(("rank", "option"), [(1, 8), (8, 8), (9, 16), (200, 256), (512, 512)])
def test_vllms_rank_option_is_the_next_allowed_value(rank: int, option: int) -> None:
    assert choose_max_lora_rank(rank) == option


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"resources": {"cpu": "500"}}, ["resources.cpu ResourcesUnusual for thousandths of a CPU write 500m"]),
        ({"resources": {"cpu": "448"}}, []),
        ({"resources": {"cpu": "500M"}}, []),
        ({"resources": {"memory": "8Gi", "sharedMemory": "8193Mi"}},
         ["resources.sharedMemory ResourcesUnusual write a smaller sharedMemory or a larger memory"]),
        ({"resources": {"memory": "8Gi", "sharedMemory": "8Gi"}}, []),
        ({"resources": {"sharedMemory": "8Gi"}}, []),
        ({"dataset": {"train": "s3://bucket/${RUN}/x.jsonl"}}, ["dataset.train PlaceholderInSource write the value itself"]),
        ({"dataset": {"train": "s3://bucket/{{ run }}/x.jsonl"}}, ["dataset.train PlaceholderInSource write the value itself"]),
        ({"dataset": {"train": "s3://bucket/cost$/x.jsonl"}}, []),
        ({"method": {"lora": {"targetModules": ["all_linear"]}}}, ["method.lora.targetModules TargetModuleUnusual for all linear layers write [all-linear]"]),
        ({"method": {"lora": {"targetModules": ["all-linear"]}}}, []),
        ({"method": {"lora": {"targetModules": ["linear_in", "q_proj"]}}}, []),
    ],
    ids=str,
)  # fmt: skip
def test_a_valid_but_suspicious_value_gives_a_warning(groups: dict[str, Any], expected: list[str]) -> None:
    assert [f"{warning.path} {warning.code} {warning.hint}" for warning in find_warnings(make_spec(**groups))] == expected


def test_ttl_days_without_a_preparation_give_a_warning() -> None:
    unprepared_spec, prepared_spec = (make_spec(prepare={"strategy": strategy, "ttlDays": 7}) for strategy in ("never", "auto"))
    (warning,) = find_warnings(unprepared_spec)
    assert str(warning) == "spec.prepare.ttlDays: 7 has no effect, because prepare.strategy is never; remove prepare.ttlDays or prepare.strategy"
    assert find_warnings(prepared_spec) == [] and find_warnings(make_spec(prepare={"strategy": "never"})) == []
