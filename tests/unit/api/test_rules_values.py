"""Each case names a rule and a field. The rule must refuse the listed values of the field, and must accept all other values."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_api.rules import (
    OPTIMIZERS,
    ExecutionTarget,
    Problem,
    base_bits,
    check_spec,
    min_batch_size_per_device,
    raise_first_finding,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec, enums

VALUES_OF_FIELD: dict[str, Iterable[object]] = {
    "method.type": enums.MethodType, "method.lora.init": enums.LoraInit, "method.lora.bias": enums.LoraBias,
    "model.dtype": enums.WeightDtype, "model.quantization.bits": (4, 8), "trainer.type": enums.TrainerType,
    "trainer.backend": enums.TrainerBackend, "dataset.format": enums.DatasetFormat, "dataset.badRows": enums.BadRows,
    "training.mixedPrecision": enums.MixedPrecision, "training.optimizer": OPTIMIZERS, "training.device": enums.Device,
    "training.gradientCheckpointing": enums.GradientCheckpointing, "checkpoint.strategy": enums.IntervalStrategy,
    "evaluation.strategy": enums.IntervalStrategy, "distributed.strategy": enums.StrategyType,
    "distributed.deepspeed.zeroStage": range(4), "distributed.fsdp.stateDict": enums.FsdpStateDict,
    "resources.gpusPerNode": range(4), "resources.processesPerNode": range(1, 5), "resources.nodes": range(1, 4),
    "storage.encryption.type": enums.EncryptionType, "trainer.grpo.numGenerations": range(2, 8),
    "training.batchSizePerDevice": range(1, 4), "model.modality": enums.Modality,
    "trainer.dpo.lossTypes": [[loss] for loss in enums.DpoLoss],
}  # fmt: skip
"""Values that the tests try for each field."""
REQUIRED_FIELDS = {"model.source": "org/name", "dataset.train": "s3://bucket/train.jsonl"}
FSDP = {"distributed.strategy": "fsdp", "resources.gpusPerNode": 2}
CONTEXT_PARALLEL = {"distributed.strategy": "deepspeed", "distributed.contextParallelSize": 2, "resources.gpusPerNode": 2}
ZERO3 = {"distributed.strategy": "deepspeed", "distributed.deepspeed.zeroStage": 3, "resources.gpusPerNode": 2}
HALF_WEIGHTS = {"model.dtype": "float16", "training.mixedPrecision": "fp16"}
GRPO = {"trainer.type": "grpo", "trainer.rewards": [{"builtin": "thinkFormat"}]}
ONE_ROW = {"training.batchSizePerDevice": 1, "training.gradientAccumulationSteps": 1}
LOAD_BEST = {"checkpoint.loadBestAtEnd": True, "dataset.validation": "a/b"}
LABEL_SMOOTHING = {"trainer.type": "dpo", "trainer.dpo.labelSmoothing": 0.1}
CASES: list[tuple[str, str, dict[str, Any], str, str]] = [
    # rule code, path of the problem, fields of the spec, field for which all values are tried, the refused values (or `not` and the accepted values)
    ("QloraNeedsFourBits", "model.quantization.bits", {"model.quantization.bits": 8}, "method.type", "qlora"),
    ("QloraNeedsFourBits", "model.quantization.bits", {"method.type": "qlora"}, "model.quantization.bits", "8"),
    ("FullNeedsWholeWeights", "model.quantization.bits", {"model.quantization.bits": 8}, "method.type", "full spectrum"),
    ("FullNeedsWholeWeights", "model.quantization.bits", {"model.quantization.bits": 4}, "method.type", "full"),
    ("QuantizationWithoutBits", "model.quantization.bits", {"model.quantization.type": "nf4"}, "method.type", "not qlora"),
    ("QuantizationWithoutBits", "model.quantization", {"model.quantization.type": "nf4"}, "model.quantization.bits", "8"),
    ("AdapterSourceMissing", "method.adapter.source", {}, "method.type", "adapter"),
    ("AdapterSourceMissing", "method.adapter", {"method.adapter.source": "a/b"}, "method.type", "not adapter"),
    ("OptionOfAnotherMethod", "method.lora", {"method.lora": {}}, "method.type", "not lora qlora dora adapter"),
    ("OptionOfAnotherMethod", "method.promptLength", {"method.promptLength": 8}, "method.type", "not prefixTuning promptTuning"),
    ("OptionOfAnotherMethod", "method.lora.useDora", {"method.lora.useDora": False}, "method.type", "dora adapter"),
    ("LoraTargetParameters", "method.lora.useDora", {"method.lora.targetParameters": ["all-experts"]}, "method.type", "dora"),
    ("LoraTargetParameters", "method.lora.init", {"method.lora.targetParameters": ["all-experts"]}, "method.lora.init", "not default"),
    ("LoraTargetParameters", "method.lora.targetParameters", {"method.lora.targetParameters": ["a.b"]}, "distributed.strategy", "fsdp deepspeed"),
    ("LoraInitialisation", "method.lora.init", {"method.lora.loftq": {}}, "method.lora.init", "not loftq"),
    ("LoraInitialisation", "method.lora.init", {"method.lora.init": "loftq"}, "method.type", "dora"),
    ("LoraInitialisation", "model.quantization.bits", {"method.lora.init": "loftq"}, "model.quantization.bits", "8"),
    ("LoraInitialisation", "method.lora.init", {"method.lora.init": "eva"}, "trainer.type", "not sft"),
    ("LoraInitialisation", "dataset.packing", {"dataset.packing": True}, "method.lora.init", "eva"),
    ("LoraInitialisation", "method.lora.init", {"method.lora.bias": "all"}, "method.lora.init", "pissa olora"),
    ("LoraInitialisation", "method.lora.init", {"method.lora.init": "pissa"}, "method.lora.bias", "not none"),
    ("LoraInitialisation", "method.lora.init", {"method.lora.init": "pissa"}, "method.type", "not lora"),
    ("LoraInitialisation", "method.lora.init", {"method.lora.init": "pissa"}, "trainer.type", "dpo kto reward"),
    ("BiasBesideReference", "method.lora.bias", {"method.lora.bias": "all"}, "trainer.type", "dpo kto"),
    ("BiasBesideReference", "method.lora.bias", {"method.lora.bias": "all", "trainer.grpo.beta": 0.1}, "trainer.type", "dpo kto grpo"),
    ("BiasBesideReference", "method.lora.bias", {"trainer.type": "dpo"}, "method.lora.bias", "not none"),
    ("NewTokensUntrained", "model.newTokens", {"model.newTokens": ["a"]}, "method.type", "ia3 prefixTuning promptTuning"),
    ("NewTokensUntrained", "model.newTokens", {"model.newTokens": ["a"], "model.quantization.bits": 4}, "method.type",
     "ia3 prefixTuning promptTuning spectrum"),
    ("NewTokensUntrained", "model.newTokens", {"model.newTokens": ["a"], **FSDP}, "method.type", "not full spectrum"),
    ("NewTokensUntrained", "model.newTokens", {"model.newTokens": ["a"]}, "distributed.strategy", "fsdp"),
    ("NewTokensUntrained", "model.newTokens", {"model.newTokens": ["a"], **ZERO3}, "distributed.strategy", "fsdp deepspeed"),
    ("NewTokensUntrained", "model.newTokens", {"model.newTokens": ["a"], **ZERO3}, "distributed.deepspeed.zeroStage", "3"),
    ("HalfWeights", "model.dtype", HALF_WEIGHTS, "method.type", "full spectrum"),
    ("HalfWeights", "model.dtype", HALF_WEIGHTS | {"model.quantization.bits": 4}, "method.type", "full"),
    ("HalfWeights", "model.dtype", HALF_WEIGHTS | {"method.type": "full"}, "distributed.strategy", "not deepspeed"),
    ("HalfWeights", "model.dtype", HALF_WEIGHTS | {"method.type": "full"}, "model.dtype", "float16"),
    ("HalfWeights", "model.dtype", HALF_WEIGHTS | {"method.type": "full"}, "training.mixedPrecision", "fp16"),
    ("PromptTuning", "training.gradientCheckpointing", {"training.gradientCheckpointing": "enabled"}, "method.type", "prefixTuning"),
    ("PromptTuning", "training.gradientCheckpointing", {"method.type": "prefixTuning"}, "training.gradientCheckpointing", "not disabled"),
    ("PromptTuning", "dataset.packing", {"dataset.packing": True}, "method.type", "prefixTuning promptTuning"),
    ("RewardsMissing", "trainer.rewards", {}, "trainer.type", "grpo"),
    ("OptionOfAnotherObjective", "dataset.packing", {"dataset.packing": True}, "trainer.type", "not sft"),
    ("OptionOfAnotherObjective", "training.neftuneNoiseAlpha", {"training.neftuneNoiseAlpha": 5}, "trainer.type", "not sft"),
    ("OptionOfAnotherObjective", "training.groupByLength", {"training.groupByLength": True}, "trainer.type", "not sft"),
    ("OptionOfAnotherObjective", "method.lora.taskType", {"method.lora.taskType": "causalLM"}, "trainer.type", "reward"),
    ("OptionOfAnotherObjective", "trainer.dpo", {"trainer.dpo": {}}, "trainer.type", "not dpo kto orpo"),
    ("OptionOfAnotherObjective", "trainer.grpo", {"trainer.grpo": {}}, "trainer.type", "not grpo"),
    ("OptionOfAnotherObjective", "trainer.maxCompletionLength", {"trainer.maxCompletionLength": 9}, "trainer.type", "sft reward"),
    ("OptionOfAnotherObjective", "trainer.dpo.lossTypes", {"trainer.dpo.lossTypes": ["ipo"]}, "trainer.type", "kto orpo"),
    ("OptionOfAnotherObjective", "trainer.dpo.referenceModel", {"trainer.dpo.referenceModel": "a/b"}, "trainer.type", "orpo"),
    ("DpoLosses", "trainer.dpo.labelSmoothing", LABEL_SMOOTHING, "trainer.type", "dpo"),
    ("DpoLosses", "trainer.dpo.labelSmoothing", LABEL_SMOOTHING, "trainer.dpo.lossTypes", "not robust exoPair"),
    ("DpoLosses", "trainer.dpo.labelSmoothing", {"trainer.type": "dpo"}, "trainer.dpo.lossTypes", "exoPair"),
    ("BatchTooSmall", "training.batchSizePerDevice", ONE_ROW, "trainer.type", "kto"),
    ("BatchTooSmall", "training.batchSizePerDevice", {"trainer.type": "kto"}, "training.batchSizePerDevice", "1"),
    ("OptionOfAnotherMethod", "method.vision", {"method.vision": {}}, "model.modality", "text"),
    ("VisionUnsupported", "method.type", {"model.modality": "visionLanguage"}, "method.type", "not lora qlora dora full"),
    ("VisionUnsupported", "trainer.type", {"model.modality": "visionLanguage"}, "trainer.type", "not sft dpo"),
    ("VisionUnsupported", "distributed.strategy", {"model.modality": "visionLanguage"}, "distributed.strategy", "fsdp deepspeed"),
    ("VisionUnsupported", "method.lora.init", {"model.modality": "visionLanguage"}, "method.lora.init", "not default gaussian"),
    ("VisionUnsupported", "method.lora.bias", {"model.modality": "visionLanguage"}, "method.lora.bias", "not none"),
    ("VisionPacking", "dataset.packing", {"dataset.packing": True}, "model.modality", "visionLanguage"),
    ("OptionOfAnotherMethod", "method.lora.alpha", {"method.lora.alpha": 8}, "method.type", "adapter"),
    ("OptionOfAnotherMethod", "method.lora.plusRatio", {"method.lora.plusRatio": 8}, "method.type", ""),
    ("ObjectiveAndMethod", "method.type", {"trainer.type": "orpo"}, "method.type", "promptTuning"),
    ("ObjectiveAndMethod", "method.type", {"method.type": "promptTuning"}, "trainer.type", "orpo"),
    ("GenerationsDoNotDivide", "trainer.grpo.numGenerations", ONE_ROW, "trainer.type", "grpo"),
    ("GenerationsDoNotDivide", "trainer.grpo.numGenerations",
     GRPO | {"training.batchSizePerDevice": 2, "training.gradientAccumulationSteps": 3}, "trainer.grpo.numGenerations", "4 5 7"),
    ("GenerationsDoNotDivide", "evaluation.batchSizePerDevice", GRPO | {"evaluation.batchSizePerDevice": 5, "dataset.test": "a/b"},
     "trainer.grpo.numGenerations", "2 3 4"),
    ("GenerationsDoNotDivide", "evaluation.batchSizePerDevice", GRPO | {"evaluation.batchSizePerDevice": 6, "dataset.test": "a/b"},
     "trainer.grpo.numGenerations", ""),
    ("ResponseOnlyWithoutTurns", "dataset.responseOnly.enabled", {"dataset.responseOnly.enabled": True}, "dataset.format", "plainText custom"),
    ("DataOptionWithoutEffect", "dataset.maxBadRowRatio", {"dataset.maxBadRowRatio": 0.1}, "dataset.badRows", "not skip"),
    ("DataOptionWithoutEffect", "dataset.template", {"dataset.template": "{q}"}, "dataset.format", "not custom"),
    ("DataOptionWithoutEffect", "dataset.template", {}, "dataset.format", "custom"),
    ("DataOptionWithoutEffect", "dataset.mcq", {"dataset.mcq": {}}, "dataset.format", "not mcq"),
    ("PrecisionOnCpu", "training.mixedPrecision", {"resources.gpusPerNode": 0}, "training.mixedPrecision", "fp16"),
    ("PrecisionOnCpu", "training.mixedPrecision", {"training.mixedPrecision": "fp16"}, "training.device", "cpu"),
    ("PrecisionOnCpu", "training.mixedPrecision", {"training.mixedPrecision": "fp16"}, "resources.gpusPerNode", "0"),
    ("PrecisionOnCpu", "training.gradientCheckpointing", {"resources.gpusPerNode": 0}, "training.gradientCheckpointing", "unsloth"),
    ("DeviceOfAnotherMachine", "training.device", {}, "training.device", "mps cpu"),
    ("DeviceOfAnotherMachine", "training.device", {"resources.gpusPerNode": 0}, "training.device", "mps cuda"),
    ("BestNeedsMatchingSteps", "checkpoint.strategy", LOAD_BEST, "checkpoint.strategy", "not steps"),
    ("BestNeedsMatchingSteps", "checkpoint.strategy", LOAD_BEST | {"evaluation.strategy": "epoch"}, "checkpoint.strategy", "not epoch"),
    ("BestNeedsMatchingSteps", "checkpoint.steps", LOAD_BEST | {"checkpoint.steps": 3, "evaluation.steps": 2}, "checkpoint.strategy", "steps"),
    ("BestNeedsMatchingSteps", "checkpoint.steps", LOAD_BEST | {"checkpoint.steps": 3, "evaluation.steps": 2}, "evaluation.strategy", "steps"),
    ("BestNeedsMatchingSteps", "checkpoint.loadBestAtEnd", LOAD_BEST, "evaluation.strategy", "no"),
    ("StepsWithoutEffect", "checkpoint.steps", {"checkpoint.steps": 5}, "checkpoint.strategy", "epoch no"),
    ("StepsWithoutEffect", "evaluation.steps", {"evaluation.steps": 5}, "evaluation.strategy", "epoch no"),
    ("StepsWithoutEffect", "training.checkpointEveryNLayers", {"training.checkpointEveryNLayers": 2}, "method.type", "prefixTuning"),
    ("StepsWithoutEffect", "training.checkpointEveryNLayers", {"training.checkpointEveryNLayers": 2}, "resources.gpusPerNode", "0"),
    ("StepsWithoutEffect", "training.checkpointEveryNLayers", {"training.checkpointEveryNLayers": 2, "resources.gpusPerNode": 0},
     "training.gradientCheckpointing", "disabled"),
    ("TrainingOptionWithoutEffect", "training.adamEpsilon", {"training.adamEpsilon": 1e-6}, "training.optimizer",
     " ".join(name for name in OPTIMIZERS if "adam" not in name and "ademamix" not in name)),
    ("TrainingOptionWithoutEffect", "training.adamBeta1", {"training.adamBeta1": 0.8}, "training.optimizer",
     " ".join(name for name in OPTIMIZERS if "adam" not in name and "ademamix" not in name and "lion" not in name)),
    ("ValidationMissing", "evaluation.strategy", {}, "evaluation.strategy", "not no"),
    ("ValidationMissing", "training.earlyStopping", {"training.earlyStopping": {}, "dataset.validation": "a/b"}, "evaluation.strategy", "no"),
    ("RanksAndGpus", "resources.processesPerNode", {"resources.gpusPerNode": 2}, "resources.processesPerNode", "not 2"),
    ("RanksAndGpus", "resources.processesPerNode", {"resources.processesPerNode": 2}, "resources.gpusPerNode", "1 3"),
    ("StrategyAndRanks", "distributed.strategy", {}, "distributed.strategy", "fsdp"),
    ("StrategyAndRanks", "distributed.strategy", {"resources.gpusPerNode": 2}, "distributed.strategy", "none"),
    ("StrategyAndRanks", "distributed.strategy", {"distributed.strategy": "none"}, "resources.nodes", "not 1"),
    ("StrategyAndRanks", "distributed.deepspeed", {"distributed.deepspeed": {}}, "distributed.strategy", "not deepspeed"),
    ("StrategyAndRanks", "distributed.fsdp", {"distributed.fsdp": {}}, "distributed.strategy", "not fsdp"),
    ("StrategyAndRanks", "distributed.deepspeed.offloadParameters", {"distributed.deepspeed.offloadParameters": True},
     "distributed.deepspeed.zeroStage", "not 3"),
    ("StrategyAndRanks", "distributed.deepspeed.offloadOptimizer", {"distributed.deepspeed.offloadOptimizer": True},
     "distributed.deepspeed.zeroStage", "0"),
    ("ContextParallel", "distributed.contextParallelSize", CONTEXT_PARALLEL, "distributed.strategy", "not deepspeed"),
    ("ContextParallel", "distributed.contextParallelSize", CONTEXT_PARALLEL, "resources.gpusPerNode", "0 1 3"),
    ("ContextParallel", "trainer.type", CONTEXT_PARALLEL, "trainer.type", "not sft"),
    ("ContextParallel", "method.type", CONTEXT_PARALLEL, "method.type", "prefixTuning promptTuning"),
    ("StrategyAndMethod", "method.type", FSDP, "method.type", "prefixTuning promptTuning"),
    ("StrategyAndMethod", "method.type", FSDP | {"method.type": "promptTuning"}, "distributed.strategy", "fsdp"),
    ("StrategyAndMethod", "model.quantization.bits", FSDP | {"model.quantization.bits": 4}, "method.type", "spectrum"),
    ("StrategyAndMethod", "model.quantization.bits", FSDP, "model.quantization.bits", "8"),
    ("StrategyAndMethod", "method.lora.init", FSDP, "method.lora.init", "pissa olora"),
    ("StrategyAndMethod", "method.lora.modulesToSave", FSDP | {"method.lora.modulesToSave": ["x.lm_head"]}, "trainer.type", "not reward"),
    ("StrategyAndMethod", "method.lora.modulesToSave", FSDP | {"method.lora.modulesToSave": ["x.norm"]}, "trainer.type", ""),
    ("StrategyAndMethod", "training.optimizer", FSDP, "training.optimizer", "not adamw_torch adamw_torch_fused sgd adagrad rmsprop"),
    ("StrategyAndMethod", "training.optimizer", {"distributed.strategy": "deepspeed"}, "training.optimizer", "adagrad"),
    ("StrategyAndMethod", "training.optimizer", {"training.optimizer": "adagrad"}, "distributed.strategy", "deepspeed"),
    ("StrategyAndMethod", "distributed.deepspeed.zeroStage", ZERO3, "method.type", "qlora"),
    ("StrategyAndMethod", "method.type", ZERO3, "method.type", "spectrum prefixTuning promptTuning"),
    ("StrategyAndMethod", "method.type", ZERO3 | {"trainer.type": "kto"}, "method.type", "spectrum prefixTuning promptTuning ia3"),
    ("StrategyAndMethod", "method.type", ZERO3 | {"method.type": "ia3"}, "trainer.type", "kto"),
    ("StrategyAndMethod", "method.type", ZERO3 | {"method.type": "spectrum"}, "distributed.deepspeed.zeroStage", "3"),
    ("StrategyAndMethod", "method.lora.init", ZERO3, "method.lora.init", "pissa olora eva"),
    ("StateDictUnavailable", "distributed.fsdp.stateDict", {}, "distributed.fsdp.stateDict", "local"),
    ("BackendAndStrategy", "trainer.backend", {"trainer.backend": "unsloth"}, "distributed.strategy", "not none"),
    ("BackendAndStrategy", "trainer.backend", {"trainer.backend": "unsloth"}, "resources.gpusPerNode", "0 2 3"),
    ("BackendAndStrategy", "trainer.backend", {"trainer.backend": "unsloth"}, "training.device", "cpu"),
    ("BackendAndStrategy", "trainer.backend", {"resources.gpusPerNode": 2}, "trainer.backend", "unsloth"),
    ("OutputOptionWithoutEffect", "output.mergeAdapter", {"output.mergeAdapter": True}, "method.type",
     "full spectrum prefixTuning promptTuning"),
    ("EncryptionContradiction", "storage.encryption.kmsKeyId", {"storage.encryption.kmsKeyId": "k"}, "storage.encryption.type", "not kms"),
    ("EncryptionContradiction", "storage.encryption.customerKeySecretRef", {}, "storage.encryption.type", "customerKey"),
    ("EncryptionContradiction", "storage.encryption.customerKeySecretRef",
     {"storage.encryption.customerKeySecretRef": {"name": "s", "key": "k"}}, "storage.encryption.type", "not customerKey"),
    ("EncryptionContradiction", "storage.endpoint", {"storage.endpoint": "http://s3"}, "storage.encryption.type", "customerKey"),
]  # fmt: skip


def find_problems(fields: dict[str, Any], target: ExecutionTarget = ExecutionTarget.CLUSTER) -> list[Problem]:
    """Return the problems of a minimal spec with these fields. `fields` has the value of each field by its path in the spec."""
    spec: dict[str, Any] = {}
    for path, value in (REQUIRED_FIELDS | fields).items():
        *groups, name = path.split(".")
        group = spec
        for key in groups:
            group = group.setdefault(key, {})
        group[name] = dict(value) if isinstance(value, dict) else value
    copied_spec = json.loads(json.dumps(spec))  # creates new string objects, so that rules that compare strings with `is` by mistake fail
    return check_spec(FineTuneJobSpec.model_validate(copied_spec), target=target)


@pytest.mark.parametrize(
    ("code", "path", "fields", "tried_field", "expected_refusals"), CASES, ids=[f"{number}-{case[0]}-{case[3]}" for number, case in enumerate(CASES)]
)
def test_a_rule_refuses_exactly_the_expected_values(code: str, path: str, fields: dict[str, Any], tried_field: str, expected_refusals: str) -> None:
    named_values = set(expected_refusals.removeprefix("not ").split())
    values = {value[0] if isinstance(value, list) else str(value): value for value in VALUES_OF_FIELD[tried_field]}
    refused_values = {
        text for text, value in values.items()
        if (code, path) in {(problem.code, problem.path) for problem in find_problems(fields | {tried_field: value})}
    }  # fmt: skip
    assert named_values <= set(values)
    assert refused_values == (set(values) - named_values if expected_refusals.startswith("not ") else named_values)


REWARD_PATH = "trainer.rewards[0].parameters"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"training.optimizer": "adamw_torch_fusd"}, "'adamw_torch_fusd' is not a supported optimizer; did you mean adamw_torch_fused?"),
        ({"training.optimizer": "adamw_hf"}, "'adamw_hf' is not a supported optimizer; write adamw_torch_fused"),
        ({"training.optimizer": "paged_lion"}, "'paged_lion' is not a supported optimizer; write paged_lion_32bit"),
        ({"training.optimizer": "zzz"}, "'zzz' is not a supported optimizer; write one of " + ", ".join(OPTIMIZERS)),
        (LOAD_BEST | {"checkpoint.steps": 50, "evaluation.steps": 20},
         "50 is not a multiple of evaluation.steps 20, but loadBestAtEnd needs an evaluation of every checkpoint; write for example 60"),
        ({"placement.env": [{"name": "FINETUNE_X"}]},
         "the operator sets FINETUNE_X; remove FINETUNE_X; write credentials into storage.credentialsSecretRef and model.tokenSecretRef"),
        ({"placement.volumes": [{"name": "v", "secret": "s", "configMap": "c"}]},
         "v has 2 sources; write exactly one of `persistentVolumeClaim`, `configMap` and `secret`"),
        ({"checkpoint.resume": "https://host/x"}, "'https://host/x' does not name a checkpoint; write https://host/jobs/checkpoints/step-00000100"),
        ({"training.adamBeta1": 0.8, "training.optimizer": "sgd"},
         "0.8, but adamBeta1 has no effect on optimizer sgd; remove adamBeta1, or choose an Adam optimizer"),
        ({"dataset.format": "preference"},
         "preference, but trainer sft cannot learn from preference rows; write `format: messages`, or `trainer: {type: dpo}`"),
        ({"trainer.dpo": {}}, "dpo has an effect only with dpo, kto and orpo, but trainer.type is sft; remove trainer.dpo, or change trainer.type"),
        (GRPO | {"resources.gpusPerNode": 3, "evaluation.batchSizePerDevice": 3, "dataset.test": "a/b", "trainer.grpo.numGenerations": 2},
         "an evaluation batch of all ranks has 9 answers, which cannot be divided into groups of two or more; write an even number"),
        ({"distributed.fsdp": {}, "distributed.strategy": "none"},
         "distributed.fsdp has no effect, because distributed.strategy is none; write `strategy: fsdp`, or remove distributed.fsdp"),
        ({"distributed.deepspeed": {}},
         "distributed.deepspeed has no effect, because distributed.strategy is missing; write `strategy: deepspeed`, or remove distributed.deepspeed"),
        ({"storage.encryption.type": "customerKey"},
         "type is customerKey, but customerKeySecretRef is missing; write `{type: customerKey, customerKeySecretRef: {name: s3-customer-key, "
         "key: key}}`, or write another type and remove customerKeySecretRef"),
        ({"model.quantization.bits": 8, "model.quantization.doubleQuant": True},
         "without effect, because bits is 8: doubleQuant; remove doubleQuant, or write `bits: 4`"),
    ],
)  # fmt: skip
def test_a_problem_says_what_is_wrong_and_what_to_write(fields: dict[str, Any], expected: str) -> None:
    assert [f"{problem.message}; {problem.hint}" for problem in find_problems(fields)] == [expected]


@pytest.mark.parametrize(
    ("builtin", "name", "valid_values", "invalid_values", "hint"),
    [
        ("length", "minimum", ["0", "-1.5", "1e3"], ["many", ""], "write a number"),
        ("length", "maximum", ["9"], ["inf", "nan"], "write a finite number"),
        ("length", "unit", ["tokens", "words", "characters"], ["rows", "token"], "write one of tokens, words, characters"),
        ("thinkFormat", "emptyAnswer", ["true", "false"], ["True", "1", ""], "write true or false"),
        ("jsonSchema", "schema", ["{}", "true"], ["{", "x"], "write JSON"),
        ("regex", "pattern", ["^a+$", ""], ["(", "x" * 300 + "("], "write a valid regular expression ("),
        ("exactMatch", "column", ["answer", "{("], [], ""),
    ],
)
def test_only_valid_values_of_reward_parameters_are_accepted(builtin: str, name: str, valid_values: list[str], invalid_values: list[str], hint: str) -> None:
    def find_parameter_problems(value: str) -> list[Problem]:
        parameters = ({"minimum": "1"} if name == "unit" else {}) | {name: value}
        found_problems = find_problems(GRPO | {"trainer.rewards": [{"builtin": builtin, "parameters": parameters}]})
        return [problem for problem in found_problems if problem.code == "RewardIncomplete"]

    assert {value: find_parameter_problems(value) for value in valid_values} == {value: [] for value in valid_values}
    for value in invalid_values:
        (problem,) = find_parameter_problems(value)
        assert (problem.path, problem.message) == (f"{REWARD_PATH}.{name}", f"{value[:200]!r} is not a valid value")
        assert problem.hint.startswith(hint)


@pytest.mark.parametrize(
    ("fields", "expected_paths"),
    [
        ({"training.mixedPrecision": "fp16", "resources.gpusPerNode": 0}, []),
        ({"training.mixedPrecision": "fp16", "training.device": "auto", "resources.gpusPerNode": 0}, []),
        ({"training.mixedPrecision": "fp16", "training.device": "cpu"}, ["training.mixedPrecision"]),
        ({"training.device": "cuda", "resources.gpusPerNode": 0}, []),
        ({"resources.gpusPerNode": 2, "resources.processesPerNode": 1}, []),
        ({"tracking.reportTo": ["wandb"]}, []),
    ],
)
def test_a_local_run_may_use_all_devices_of_the_users_machine(fields: dict[str, Any], expected_paths: list[str]) -> None:
    assert [problem.path for problem in find_problems(fields, ExecutionTarget.LOCAL)] == expected_paths


MAP_REWARD = {"configMapRef": {"name": "r", "key": "r.py"}}
KEY = {"name": "s", "key": "k"}


@pytest.mark.parametrize(
    ("fields", "expected_paths"),
    [
        ({"dataset.split": {"validation": 0.6, "test": 0.6}}, ["dataset.split"]),
        ({"dataset.split": {"validation": 0.5, "test": 0.4}}, []),
        ({"dataset.chatTemplate": {"configMapRef": KEY}}, []),
        ({"dataset.chatTemplate": {"configMapRef": KEY, "text": "x"}}, ["dataset.chatTemplate"]),
        ({"dataset.format": "custom", "dataset.template": "{q}", "dataset.responseOnly": {"enabled": True, "answerMarker": "A:"}},
         ["dataset.responseOnly"]),
        (GRPO | {"trainer.rewards": [MAP_REWARD, MAP_REWARD]}, ["trainer.rewards[1].name"]),
        (GRPO | {"trainer.rewards": [MAP_REWARD | {"function": "f"}, MAP_REWARD | {"function": "g"}, MAP_REWARD]}, []),
        (GRPO | {"trainer.rewards": [{"builtin": "thinkFormat", "name": "a"}, {"builtin": "thinkFormat"}]}, []),
        (GRPO | {"trainer.rewards": [{"builtin": "thinkFormat", "name": "a"}, {"builtin": "citationFormat", "name": "a"}]},
         ["trainer.rewards[1].name"]),
        ({"model.source": "ftp://x", "model.tokenizer": "ftp://x", "dataset.test": "ftp://x"}, ["model.source", "model.tokenizer", "dataset.test"]),
        ({"output.hub": {}}, []),
        ({"output.hub.private": True}, ["output.hub"]),
        ({"evaluation.judge": {}}, []),
        ({"evaluation.judge.outputPrice": 1}, ["evaluation.judge.model"]),
        ({"tracking.reportTo": ["wandb"], "tracking.wandb": {}}, ["tracking.wandb.apiKeySecretRef"]),
        ({"tracking.reportTo": ["wandb"], "tracking.wandb.apiKeySecretRef": KEY}, []),
        ({"tracking.reportTo": ["mlflow"], "tracking.mlflow": {}}, ["tracking.mlflow.trackingUri"]),
        ({"tracking.reportTo": ["mlflow"], "tracking.mlflow.trackingUri": "http://x"}, []),
        ({"tracking.reportTo": ["wandb"], "placement.env": [{"name": "WANDB_MODE", "value": "offline"}]}, []),
        ({"tracking.reportTo": ["wandb"], "placement.env": [{"name": "WANDB_API_KEY", "secretKeyRef": KEY}]}, []),
        ({"tracking.reportTo": ["mlflow"], "tracking.mlflow.trackingUri": "https://user:k@mlflow/x"}, ["tracking.mlflow.trackingUri"]),
        ({"tracking.reportTo": ["mlflow"], "tracking.mlflow.trackingUri": "https://mlflow.mlops:5000/prefix"}, []),
        ({"tracking.reportTo": ["mongodb"], "tracking.mongodb": {}}, ["tracking.mongodb.uriSecretRef"]),
        ({"tracking.reportTo": ["mongodb"], "tracking.mongodb.uriSecretRef": KEY}, []),
    ],
)  # fmt: skip
def test_a_spec_has_problems_at_exactly_the_expected_paths(fields: dict[str, Any], expected_paths: list[str]) -> None:
    assert [problem.path for problem in find_problems(fields)] == expected_paths


def test_a_folder_on_a_web_server_that_is_not_a_jobs_result_cannot_be_a_model() -> None:
    (problem,) = find_problems({"model.source": "https://host/x"})
    assert problem.message == "the trainer cannot list the files of 'https://host/x' on a web server"


def test_bits_micro_batch_and_world_size_are_derived_from_the_spec() -> None:
    def make_spec(**groups: Any) -> FineTuneJobSpec:
        return FineTuneJobSpec.model_validate({"model": {"source": "a/b"}, **groups})

    assert [base_bits(make_spec()), base_bits(make_spec(method={"type": "qlora"})), base_bits(make_spec(method={"lora": {"init": "loftq"}}))] == [None, 4, 4]
    assert [min_batch_size_per_device(make_spec(trainer={"type": name})) for name in ("kto", "dpo")] == [2, 1]
    assert [world_size(make_spec(resources=resources)) for resources in ({"gpusPerNode": 0}, {"nodes": 2, "gpusPerNode": 3})] == [1, 6]


def test_only_the_first_finding_is_raised_as_an_error() -> None:
    raise_first_finding("Code", iter(()))
    with pytest.raises(ConfigError, match="first") as caught:
        raise_first_finding("Code", iter([("path", "first", "write x"), ("path", "second", "")]))
    assert (caught.value.code, caught.value.hint) == ("Code", "write x")
