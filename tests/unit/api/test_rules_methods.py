"""Rules about options of fine-tuning methods: adapter initialisations that change the base weights, and options that the chosen method does not read."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.base import find_nested_group
from finetune_api.rules import Problem, check_spec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.method import Method

GRPO_TRAINER: dict[str, Any] = {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}]}
TWO_GPUS: dict[str, Any] = {"gpusPerNode": 2}


def find_problems(lora: dict[str, Any], **groups: Any) -> list[Problem]:
    """Return the problems of a spec in which `method.lora` has the options `lora`, and the other groups are `groups`."""
    groups["model"] = {"source": "org/name", **groups.get("model", {})}
    groups["method"] = {**groups.get("method", {}), "lora": lora}
    return check_spec(FineTuneJobSpec.model_validate({"dataset": {"train": "s3://bucket/train.jsonl"}, **groups}))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    ("lora", "groups", "expected_text"),
    [
        ({}, {"trainer": {"type": "dpo"}}, "trainer.type dpo"),
        ({}, {"trainer": {"type": "kto"}}, "trainer.type kto"),
        ({}, {"trainer": {**GRPO_TRAINER, "grpo": {"beta": 0.1}}}, "trainer.type grpo"),
        ({}, {"trainer": {"type": "reward"}}, "trainer.type reward"),
        ({"modulesToSave": ["lm_head"]}, {}, "method.lora.modulesToSave"),
        ({"bias": "loraOnly"}, {}, "method.lora.bias loraOnly"),
        ({}, {"model": {"newTokens": ["<a>"]}}, "model.newTokens"),
        ({}, {"model": {"quantization": {"bits": 8}}}, "model.quantization.bits"),
        ({"useDora": True}, {}, "method.lora.useDora"),
        ({"rankStabilized": True}, {}, "method.lora.rankStabilized"),
        ({}, {"method": {"type": "dora"}}, "method.type dora"),
    ],
)
def test_an_initialisation_that_changes_the_base_model_is_refused_with_conflicting_options(
    init: str, lora: dict[str, Any], groups: dict[str, Any], expected_text: str
) -> None:
    problems = find_problems({"init": init, **lora}, **groups)
    assert [(problem.code, problem.path) for problem in problems] == [("LoraInitialisation", "method.lora.init")]
    assert f"{init} moves a part of the base" in problems[0].message and expected_text in problems[0].message


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"trainer": {"type": "orpo"}},
        {"trainer": GRPO_TRAINER},
        {"trainer": {"type": "dpo", "dpo": {"referenceModel": "a/b"}}},
        {"distributed": {"strategy": "ddp"}, "resources": TWO_GPUS},
        {"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}, "resources": TWO_GPUS},
    ],
)
def test_an_initialisation_that_changes_the_base_model_is_accepted_without_conflicting_options(groups: dict[str, Any]) -> None:
    assert find_problems({"init": "pissa"}, **groups) == []


def test_one_problem_names_all_conflicting_options() -> None:
    (problem,) = find_problems({"init": "pissa", "modulesToSave": ["norm"], "rankStabilized": True})
    assert "method.lora.rankStabilized and method.lora.modulesToSave" in problem.message


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_fsdp_is_refused_with_an_initialisation_that_changes_the_base_model(init: str) -> None:
    (problem,) = find_problems({"init": init}, distributed={"strategy": "fsdp"}, resources=TWO_GPUS)
    assert (problem.code, problem.path) == ("StrategyAndMethod", "method.lora.init")


def test_training_of_biases_is_refused_if_the_reference_model_shares_them() -> None:
    (problem,) = find_problems({"bias": "all"}, trainer={"type": "kto"})
    assert (problem.code, problem.path) == ("BiasBesideReference", "method.lora.bias")
    assert find_problems({"bias": "all"}, trainer={"type": "kto", "dpo": {"referenceModel": "a/b"}}) == []
    assert (
        find_problems({"bias": "all"}, trainer={"type": "orpo"}) == find_problems({"bias": "none"}, trainer={"type": "dpo"}) == []
    )


def test_training_of_float16_weights_is_refused_with_fp16_loss_scaling() -> None:
    def find_problem_codes(dtype: str, precision: str, **groups: Any) -> list[str]:
        model = {"source": "org/name", "dtype": dtype, **groups.pop("model", {})}
        other_groups = {
            "dataset": {"train": "s3://bucket/train.jsonl"},
            "model": model,
            "training": {"mixedPrecision": precision},
        }
        return [problem.code for problem in check_spec(FineTuneJobSpec.model_validate({**other_groups, **groups}))]

    full_method, spectrum_method, four_bit_model = {"type": "full"}, {"type": "spectrum"}, {"quantization": {"bits": 4}}
    deepspeed_groups = {"distributed": {"strategy": "deepspeed"}, "resources": TWO_GPUS}
    assert find_problem_codes("float16", "fp16", method=full_method) == find_problem_codes("float16", "fp16", method=spectrum_method) == ["HalfWeights"]
    assert find_problem_codes("float16", "bf16", method=full_method) == find_problem_codes("float32", "fp16", method=full_method) == []
    assert find_problem_codes("float16", "fp16", method=full_method, **deepspeed_groups) == []
    assert find_problem_codes("float16", "fp16", method=spectrum_method, model=four_bit_model) == find_problem_codes("float16", "fp16") == []


@pytest.mark.parametrize(
    "group", [info.alias or name for name, info in Method.model_fields.items() if find_nested_group(info.annotation)]
)
def test_a_group_of_options_is_refused_with_a_method_that_does_not_read_it(group: str) -> None:
    spec = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}
    method = {"type": "full", group: {}}
    (problem,) = check_spec(FineTuneJobSpec.model_validate({**spec, "method": method}))
    assert problem.path == f"method.{group}"
    assert f"method.{group} has no effect" in problem.message
