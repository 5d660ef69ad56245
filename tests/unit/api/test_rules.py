"""For each rule that compares fields: specs that break the rule, and the field that the reported problem names. Also specs that break no rule."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.rules import (
    JUDGE_METRICS,
    RULES,
    ExecutionTarget,
    check_spec,
    compares_answers,
    compares_metrics,
    effective_batch,
    new_problems,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import EvaluationMetric, GateMetric

MINIMAL_SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with the values of `change`. Nested dicts are merged instead of replaced."""
    merged_dict = dict(base)
    for key, value in change.items():
        old_value = merged_dict.get(key)
        merged_dict[key] = merge(old_value, value) if isinstance(old_value, dict) and isinstance(value, dict) else value
    return merged_dict


def make_spec(change: dict[str, Any]) -> FineTuneJobSpec:
    """Return the minimal spec with a change."""
    return FineTuneJobSpec.model_validate(merge(MINIMAL_SPEC, change))


def make_vllm_spec(field: str = "gpus", value: Any = 1) -> dict[str, Any]:
    generation = {"backend": "vllm", field: value}
    return {"trainer": {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}], "grpo": {"generation": generation}}}


ADAPTER_SPEC: dict[str, Any] = {"method": {"type": "adapter", "adapter": {"source": "s3://models/a"}}}
FSDP_SPEC: dict[str, Any] = {"distributed": {"strategy": "fsdp"}, "resources": {"gpusPerNode": 2}}
CONTEXT_PARALLEL_SPEC: dict[str, Any] = {
    "distributed": {"strategy": "deepspeed", "contextParallelSize": 2},
    "resources": {"gpusPerNode": 4},
}
ZERO3_SPEC: dict[str, Any] = {
    "distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}},
    "resources": {"gpusPerNode": 2},
}


def make_grpo_spec(reward: dict[str, Any], **groups: Any) -> dict[str, Any]:
    return merge({"trainer": {"type": "grpo", "rewards": [reward]}}, groups)


GENERATION_FIELDS = frozenset({"image", "gpus", "gpuMemoryUtilization", "cpu", "memory", "startTimeoutSeconds", "requestTimeoutSeconds"})


def make_generation_spec(*, backend: str | None = "vllm", **values: Any) -> dict[str, Any]:
    """Return a grpo spec. `values` are options of `trainer.grpo.generation` and further groups of the spec."""
    options = {name: value for name, value in values.items() if name in GENERATION_FIELDS} | ({"backend": backend} if backend else {})
    groups = {name: value for name, value in values.items() if name not in GENERATION_FIELDS}
    return make_grpo_spec({"builtin": "thinkFormat"}, trainer={"grpo": {"generation": options}}, **groups)


KEY_REF = {"name": "judge", "key": "apiKey"}
ACCURACY_GATE = {"metric": "accuracy", "op": "ge", "value": 0.8}


def make_benchmarks(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"evaluation": {"benchmarks": list(entries)}}


def make_gates_spec(*gates: dict[str, Any], metrics: list[str] | None = ["accuracy", "f1", "perplexity"]) -> dict[str, Any]:  # noqa: B006 -- never changed
    return {"evaluation": {"metrics": metrics, "gates": list(gates)}, "dataset": {"test": "s3://bucket/test.jsonl"}}


WITH_TEST_DATA: dict[str, Any] = {"dataset": {"test": "s3://bucket/test.jsonl"}}
VISION_SPEC = {"model": {"modality": "visionLanguage"}}
PROBLEM_CASES: list[tuple[str, dict[str, Any], str]] = [
    # code of the rule, change of the minimal spec that breaks it, path of the problem
    ("ModelMissing", {"model": {"source": None}}, "model.source"),
    ("DatasetMissing", {"dataset": {"train": None}}, "dataset.train"),
    ("DatasetMissing", {"dataset": {"mixture": [{"source": "a/b"}]}}, "dataset.mixture"),
    ("SourceInvalid", {"model": {"source": "./local/model"}}, "model.source"),
    ("SourceInvalid", {"model": {"source": "configmap://name/key"}}, "model.source"),
    ("SourceInvalid", {"dataset": {"train": "data/chats.jsonl"}}, "dataset.train"),
    ("SourceInvalid", {"dataset": {"train": "chats.jsonl"}}, "dataset.train"),
    ("SourceInvalid", {"dataset": {"train": "train.csv"}}, "dataset.train"),
    ("QuantityInvalid", {"resources": {"memory": "32GB"}}, "resources.memory"),
    ("QuantityInvalid", {"resources": {"cpu": "4 cores"}}, "resources.cpu"),
    ("QuantityInvalid", {"resources": {"ephemeralStorage": 4}}, "resources.ephemeralStorage"),
    ("QuantityInvalid", {"resources": {"sharedMemory": "10%"}}, "resources.sharedMemory"),
    ("QuantityInvalid", {"prepare": {"resources": {"memory": "16 GB"}}}, "prepare.resources.memory"),
    ("QuantityInvalid", {"prepare": {"resources": {"cpu": "4 cores"}}}, "prepare.resources.cpu"),
    ("QuantityInvalid", {"prepare": {"resources": {"ephemeralStorage": 4}}}, "prepare.resources.ephemeralStorage"),
    ("SourceInvalid", {"dataset": {"validation": "ftp://host/file"}}, "dataset.validation"),
    ("SourceInvalid", {"model": {"source": "https://host/models/model.gguf"}}, "model.source"),
    ("SourceInvalid", {"model": {"tokenizer": "https://host/jobs/model/other"}}, "model.tokenizer"),
    ("SourceInvalid", {"checkpoint": {"resume": "https://host/jobs/model"}}, "checkpoint.resume"),
    ("SourceInvalid", {"checkpoint": {"resume": "http://host/jobs/checkpoints/step-00000100"}}, "checkpoint.resume"),
    (
        "QloraNeedsFourBits",
        {"method": {"type": "qlora"}, "model": {"quantization": {"bits": 8}}},
        "model.quantization.bits",
    ),
    (
        "FullNeedsWholeWeights",
        {"method": {"type": "full"}, "model": {"quantization": {"bits": 4}}},
        "model.quantization.bits",
    ),
    (
        "FullNeedsWholeWeights",
        {"method": {"type": "spectrum"}, "model": {"quantization": {"bits": 8}}},
        "model.quantization.bits",
    ),
    ("QuantizationWithoutBits", {"model": {"quantization": {"type": "nf4"}}}, "model.quantization.bits"),
    ("QuantizationWithoutBits", {"model": {"quantization": {"bits": 8, "doubleQuant": True}}}, "model.quantization"),
    ("AdapterSourceMissing", {"method": {"type": "adapter"}}, "method.adapter.source"),
    ("AdapterSourceMissing", {"method": {"adapter": {"source": "a/b"}}}, "method.adapter"),
    ("OptionOfAnotherMethod", {"method": {"type": "full", "lora": {"rank": 8}}}, "method.lora"),
    ("OptionOfAnotherMethod", {"method": {"spectrum": {"snrThreshold": 0.5}}}, "method.spectrum"),
    ("OptionOfAnotherMethod", {"method": {"promptLength": 8}}, "method.promptLength"),
    ("OptionOfAnotherMethod", {"method": {"vision": {"visionLayers": True}}}, "method.vision"),
    ("OptionOfAnotherMethod", {"method": {"type": "dora", "lora": {"useDora": False}}}, "method.lora.useDora"),
    ("VisionPacking", VISION_SPEC | {"dataset": {"packing": True}}, "dataset.packing"),
    ("VisionUnsupported", VISION_SPEC | {"method": {"type": "ia3"}}, "method.type"),
    ("VisionUnsupported", VISION_SPEC | {"trainer": {"type": "kto"}}, "trainer.type"),
    ("VisionUnsupported", VISION_SPEC | {"distributed": {"strategy": "fsdp"}, "resources": {"gpusPerNode": 2}}, "distributed.strategy"),
    ("VisionUnsupported", VISION_SPEC | {"method": {"lora": {"init": "pissa"}}}, "method.lora.init"),
    ("VisionUnsupported", VISION_SPEC | {"method": {"lora": {"loftq": {"bits": 4}}}}, "method.lora.init"),
    ("VisionUnsupported", VISION_SPEC | {"method": {"lora": {"bias": "all"}}}, "method.lora.bias"),
    ("VisionUnsupported", {"model": {"modality": "visionLanguage", "newTokens": ["<a>"]}}, "model.newTokens"),
    ("VisionUnsupported", VISION_SPEC | {"dataset": {"useChatTemplate": False}}, "dataset.useChatTemplate"),
    ("VisionUnsupported", VISION_SPEC | {"dataset": {"test": "a/b"}, "evaluation": {"metrics": ["bleu"]}}, "evaluation.metrics"),
    ("VisionUnsupported", VISION_SPEC | {"dataset": {"test": "a/b"}, "phases": {"infer": True}}, "phases.infer"),
    ("VisionUnsupported", VISION_SPEC | {"evaluation": {"comparison": {"promptsRef": {"name": "p", "key": "k"}}}}, "evaluation.comparison"),
    ("VisionUnsupported", VISION_SPEC | {"evaluation": {"benchmarks": [{"name": "x", "folder": "a/b"}]}}, "evaluation.benchmarks"),
    ("VisionUnsupported", VISION_SPEC | {"output": {"serving": ["vllm"]}}, "output.serving"),
    ("VisionOptionWithoutEffect", {"dataset": {"images": {"maxPixels": 100}}}, "dataset.images"),
    ("VisionOptionWithoutEffect", {"dataset": {"columns": {"images": "picture"}}}, "dataset.columns.images"),
    ("VisionOptionWithoutEffect", VISION_SPEC | {"method": {"vision": {"languageLayers": False}}}, "method.vision.languageLayers"),
    ("VisionOptionWithoutEffect", VISION_SPEC | {"method": {"vision": {"attentionModules": False, "mlpModules": False}}}, "method.vision.mlpModules"),
    ("SourceInvalid", VISION_SPEC | {"dataset": {"images": {"root": "https://host/images"}}}, "dataset.images.root"),
    ("SourceInvalid", VISION_SPEC | {"dataset": {"images": {"root": "configmap://a/b"}}}, "dataset.images.root"),
    ("LoraOnHead", {"method": {"lora": {"targetModules": ["q_proj", "lm_head"]}}}, "method.lora.targetModules"),
    ("LoraTargetParameters", {"method": {"lora": {"targetParameters": ["all-experts"], "dropout": 0.1}}}, "method.lora.dropout"),
    ("LoraInitialisation", {"method": {"lora": {"init": "pissa", "loftq": {"bits": 4}}}}, "method.lora.init"),
    (
        "LoraInitialisation",
        {"method": {"lora": {"init": "loftq"}}, "model": {"quantization": {"bits": 8}}},
        "model.quantization.bits",
    ),
    ("LoraInitialisation", {"method": {"type": "dora", "lora": {"init": "loftq"}}}, "method.lora.init"),
    ("LoraInitialisation", {"method": {"lora": {"init": "pissa", "useDora": True}}}, "method.lora.init"),
    ("LoraInitialisation", {"method": {"type": "qlora", "lora": {"init": "olora"}}}, "method.lora.init"),
    (
        "BiasBesideReference",
        {"method": {"lora": {"bias": "all"}}, "trainer": {"type": "dpo"}},
        "method.lora.bias",
    ),
    (
        "HalfWeights",
        {"method": {"type": "full"}, "model": {"dtype": "float16"}, "training": {"mixedPrecision": "fp16"}},
        "model.dtype",
    ),
    ("LoraInitialisation", {"method": {"lora": {"init": "eva"}}, "dataset": {"packing": True}}, "dataset.packing"),
    ("LoraInitialisation", {"method": {"lora": {"init": "eva"}}, "trainer": {"type": "dpo"}}, "method.lora.init"),
    ("OptionOfAnotherMethod", ADAPTER_SPEC | {"method": {**ADAPTER_SPEC["method"], "lora": {"rank": 8}}}, "method.lora.rank"),
    ("NewTokensUntrained", {"model": {"newTokens": ["<a>", "<a>"]}}, "model.newTokens"),
    ("NewTokensUntrained", {"model": {"newTokens": ["<a>"]}, "method": {"type": "ia3"}}, "model.newTokens"),
    (
        "NewTokensUntrained",
        {"model": {"newTokens": ["<a>"], "quantization": {"bits": 4}}, "method": {"type": "spectrum"}},
        "model.newTokens",
    ),
    (
        "NewTokensUntrained",
        {"model": {"newTokens": ["<a>"]}, "distributed": {"strategy": "fsdp"}, "resources": {"gpusPerNode": 2}},
        "model.newTokens",
    ),
    ("NewTokensUntrained", {"model": {"newTokens": ["<a>"]}, **ZERO3_SPEC}, "model.newTokens"),
    ("SpectrumLayers", {"method": {"type": "spectrum", "spectrum": {"layers": [1, 1]}}}, "method.spectrum.layers"),
    (
        "SpectrumLayers",
        {"method": {"type": "spectrum", "spectrum": {"layers": [1], "snrThreshold": 0.2}}},
        "method.spectrum.snrThreshold",
    ),
    (
        "PromptTuning",
        {"method": {"type": "prefixTuning"}, "training": {"gradientCheckpointing": "enabled"}},
        "training.gradientCheckpointing",
    ),
    ("PromptTuning", {"method": {"type": "promptTuning"}, "dataset": {"packing": True}}, "dataset.packing"),
    ("FormatOfAnotherObjective", {"dataset": {"format": "preference"}}, "dataset.format"),
    ("FormatOfAnotherObjective", {"trainer": {"type": "dpo"}, "dataset": {"format": "messages"}}, "dataset.format"),
    ("RewardsMissing", {"trainer": {"type": "grpo"}}, "trainer.rewards"),
    ("RewardIncomplete", {"trainer": {"type": "grpo", "rewards": [{"weight": 1}]}}, "trainer.rewards[0]"),
    (
        "RewardIncomplete",
        {"trainer": {"type": "grpo", "rewards": [{"builtin": "thinkFormat", "function": "f"}]}},
        "trainer.rewards[0].function",
    ),
    ("OptionOfAnotherObjective", {"trainer": {"dpo": {"beta": 0.1}}}, "trainer.dpo"),
    ("OptionOfAnotherObjective", {"trainer": {"type": "kto", "dpo": {"lossTypes": ["ipo"]}}}, "trainer.dpo.lossTypes"),
    (
        "OptionOfAnotherObjective",
        {"trainer": {"type": "orpo", "dpo": {"referenceModel": "a/b"}}},
        "trainer.dpo.referenceModel",
    ),
    (
        "OptionOfAnotherObjective",
        {"trainer": {"type": "reward"}, "training": {"groupByLength": True}},
        "training.groupByLength",
    ),
    (
        "OptionOfAnotherObjective",
        {"trainer": {"type": "reward"}, "method": {"lora": {"taskType": "causalLM"}}},
        "method.lora.taskType",
    ),
    ("DpoLosses", {"trainer": {"type": "dpo", "dpo": {"lossTypes": ["exoPair"]}}}, "trainer.dpo.labelSmoothing"),
    ("DpoLosses", {"trainer": {"type": "dpo", "dpo": {"labelSmoothing": 0.1}}}, "trainer.dpo.labelSmoothing"),
    ("DpoLosses", {"trainer": {"type": "dpo", "dpo": {"lossTypes": ["ipo", "ipo"]}}}, "trainer.dpo.lossTypes"),
    (
        "BatchTooSmall",
        {"trainer": {"type": "kto"}, "training": {"batchSizePerDevice": 1}},
        "training.batchSizePerDevice",
    ),
    ("EffectiveBatchSize", {"training": {"effectiveBatchSize": 30, "batchSizePerDevice": 4}}, "training.effectiveBatchSize"),
    ("BatchTooSmall", {"trainer": {"type": "kto"}, "training": {"effectiveBatchSize": 1}}, "training.effectiveBatchSize"),
    ("ObjectiveAndMethod", {"trainer": {"type": "orpo"}, "method": {"type": "promptTuning"}}, "method.type"),
    ("RewardIncomplete", make_grpo_spec({"builtin": "thinkFormat", "timeoutSeconds": 5}), "trainer.rewards[0].timeoutSeconds"),
    ("RewardIncomplete", make_grpo_spec({"builtin": "regex"}), "trainer.rewards[0].parameters.pattern"),
    (
        "RewardIncomplete",
        make_grpo_spec({"builtin": "regex", "parameters": {"pattern": "("}}),
        "trainer.rewards[0].parameters.pattern",
    ),
    ("RewardIncomplete", make_grpo_spec({"builtin": "thinkFormat", "parameters": {"x": "1"}}), "trainer.rewards[0].parameters"),
    ("RewardIncomplete", make_grpo_spec({"builtin": "length"}), "trainer.rewards[0].parameters"),
    (
        "RewardIncomplete",
        make_grpo_spec({"builtin": "length", "parameters": {"minimum": "many"}}),
        "trainer.rewards[0].parameters.minimum",
    ),
    (
        "RewardIncomplete",
        make_grpo_spec({"builtin": "jsonSchema", "parameters": {"schema": "{"}}),
        "trainer.rewards[0].parameters.schema",
    ),
    (
        "RewardIncomplete",
        make_grpo_spec({"configMapRef": {"name": "r", "key": "r.py"}, "parameters": {"x": "1"}}),
        "trainer.rewards[0].parameters",
    ),
    (
        "RewardIncomplete",
        {"trainer": {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}, {"builtin": "thinkFormat"}]}},
        "trainer.rewards[1].name",
    ),
    (
        "GenerationsDoNotDivide",
        make_grpo_spec(
            {"builtin": "thinkFormat"},
            evaluation={"batchSizePerDevice": 1},
            dataset={"validation": "a/b"},
            trainer={"grpo": {"numGenerations": 4}},
        ),
        "evaluation.batchSizePerDevice",
    ),
    (
        "ResponseOnlyWithoutTurns",
        {"dataset": {"format": "plainText", "responseOnly": {"enabled": True}}},
        "dataset.responseOnly.enabled",
    ),
    ("StrategyAndMethod", {**FSDP_SPEC, "method": {"type": "prefixTuning"}}, "method.type"),
    ("StrategyAndMethod", {**FSDP_SPEC, "model": {"quantization": {"bits": 8}}}, "model.quantization.bits"),
    (
        "StrategyAndMethod",
        {**FSDP_SPEC, "model": {"quantization": {"bits": 4}}, "method": {"type": "spectrum"}},
        "model.quantization.bits",
    ),
    ("StrategyAndMethod", {**ZERO3_SPEC, "method": {"type": "spectrum"}}, "method.type"),
    ("StrategyAndMethod", {**ZERO3_SPEC, "method": {"type": "promptTuning"}}, "method.type"),
    ("StrategyAndMethod", {**ZERO3_SPEC, "method": {"lora": {"init": "pissa"}}}, "method.lora.init"),
    ("StrategyAndMethod", {**ZERO3_SPEC, "method": {"lora": {"init": "loftq"}}}, "distributed.deepspeed.zeroStage"),
    ("ContextParallel", {"distributed": {"contextParallelSize": 2}, "resources": {"gpusPerNode": 2}}, "distributed.contextParallelSize"),
    ("ContextParallel", merge(FSDP_SPEC, {"distributed": {"contextParallelSize": 2}}), "distributed.contextParallelSize"),
    ("ContextParallel", merge(CONTEXT_PARALLEL_SPEC, {"distributed": {"contextParallelSize": 3}}), "distributed.contextParallelSize"),
    ("ContextParallel", {**CONTEXT_PARALLEL_SPEC, "trainer": {"type": "dpo"}}, "trainer.type"),
    ("ContextParallel", {**CONTEXT_PARALLEL_SPEC, "dataset": {"packing": True}}, "dataset.packing"),
    ("ContextParallel", {**CONTEXT_PARALLEL_SPEC, **VISION_SPEC}, "model.modality"),
    ("ContextParallel", {**CONTEXT_PARALLEL_SPEC, "method": {"type": "promptTuning"}}, "method.type"),
    ("ContextParallel", {**CONTEXT_PARALLEL_SPEC, "model": {"attention": "eager"}}, "model.attention"),
    (
        "StateDictUnavailable",
        merge(FSDP_SPEC, {"distributed": {"fsdp": {"stateDict": "local"}}}),
        "distributed.fsdp.stateDict",
    ),
    ("OptionOfAnotherObjective", {"trainer": {"grpo": {"beta": 0.1}}}, "trainer.grpo"),
    ("OptionOfAnotherObjective", {"trainer": {"rewards": [{"builtin": "thinkFormat"}]}}, "trainer.rewards"),
    ("OptionOfAnotherObjective", {"trainer": {"maxCompletionLength": 12}}, "trainer.maxCompletionLength"),
    ("OptionOfAnotherObjective", {"trainer": {"type": "dpo"}, "dataset": {"packing": True}}, "dataset.packing"),
    (
        "OptionOfAnotherObjective",
        {"trainer": {"type": "dpo"}, "training": {"neftuneNoiseAlpha": 5}},
        "training.neftuneNoiseAlpha",
    ),
    (
        "GenerationsDoNotDivide",
        {"trainer": {"type": "grpo", "rewards": [{"builtin": "thinkFormat"}], "grpo": {"numGenerations": 7}}},
        "trainer.grpo.numGenerations",
    ),
    ("GenerationOptionWithoutEffect", make_generation_spec(backend=None, gpus=2), "trainer.grpo.generation.gpus"),
    ("GenerationOptionWithoutEffect", make_generation_spec(backend="transformers", image="x:1"), "trainer.grpo.generation.image"),
    ("GenerationServerUnsupported", make_generation_spec(resources={"nodes": 2}), "resources.nodes"),
    ("GenerationServerUnsupported", make_generation_spec(**FSDP_SPEC), "distributed.strategy"),
    ("GenerationServerUnsupported", make_generation_spec(**ZERO3_SPEC), "distributed.strategy"),
    ("GenerationServerUnsupported", make_generation_spec(method={"type": "promptTuning"}), "method.type"),
    ("GenerationServerUnsupported", make_generation_spec(method={"type": "ia3"}), "method.type"),
    ("GenerationServerUnsupported", make_generation_spec(method={"type": "qlora"}), "method.type"),
    ("GenerationServerUnsupported", make_generation_spec(model={"quantization": {"bits": 8}}), "model.quantization.bits"),
    ("GenerationServerUnsupported", make_generation_spec(model={"newTokens": ["<a>"]}), "model.newTokens"),
    ("GenerationServerUnsupported", make_generation_spec(model={"trustRemoteCode": True}), "model.trustRemoteCode"),
    ("GenerationGpus", make_generation_spec(gpus=0), "trainer.grpo.generation.gpus"),
    ("GenerationGpus", make_generation_spec(resources={"gpusPerNode": 0}), "trainer.grpo.generation.gpus"),
    ("SplitRatios", {"dataset": {"split": {"train": 0.9, "validation": 0.2}}}, "dataset.split"),
    ("SplitRatios", {"dataset": {"split": {"validation": 0.6, "test": 0.4}}}, "dataset.split"),
    ("SplitRatios", {"dataset": {"split": {"validation": 0.1}, "validation": "a/b"}}, "dataset.split.validation"),
    ("DataOptionWithoutEffect", {"dataset": {"maxBadRowRatio": 0.1}}, "dataset.maxBadRowRatio"),
    ("DataOptionWithoutEffect", {"dataset": {"template": "{q}"}}, "dataset.template"),
    ("DataOptionWithoutEffect", {"dataset": {"format": "custom"}}, "dataset.template"),
    ("DataOptionWithoutEffect", {"dataset": {"format": "alpaca", "mcq": {"includeOptions": True}}}, "dataset.mcq"),
    ("DataOptionWithoutEffect", {"dataset": {"chatTemplate": {}}}, "dataset.chatTemplate"),
    ("OptionOfTextRows", {"dataset": {"format": "preTokenized", "addEosToken": True}}, "dataset.addEosToken"),
    ("OptionOfTextRows", {"dataset": {"format": "preTokenized", "templateVariables": {"a": "1"}}}, "dataset.templateVariables"),
    ("DataOptionWithoutEffect", {"dataset": {"useChatTemplate": False, "templateVariables": {"a": "1"}}}, "dataset.templateVariables.a"),
    ("DataOptionWithoutEffect", {"dataset": {"templateVariables": {"messages": "1"}}}, "dataset.templateVariables.messages"),
    ("DataOptionWithoutEffect", {"dataset": {"templateVariables": {"a-b": "1"}}}, "dataset.templateVariables.a-b"),
    ("DataOptionWithoutEffect", {"dataset": {"templateVariables": {"bos_token": "x"}}}, "dataset.templateVariables.bos_token"),
    ("DataOptionWithoutEffect", {"dataset": {"templateVariables": {"range": "x"}}}, "dataset.templateVariables.range"),
    ("DataOptionWithoutEffect", {"dataset": {"templateVariables": {"none": "1"}}}, "dataset.templateVariables.none"),
    ("DataOptionWithoutEffect", {"dataset": {"templateVariables": {"if": "x"}}}, "dataset.templateVariables.if"),
    ("QuantityInvalid", make_vllm_spec("memory", "64GB"), "trainer.grpo.generation.memory"),
    ("QuantityInvalid", make_vllm_spec("memory", 16), "trainer.grpo.generation.memory"),
    ("QuantityInvalid", make_vllm_spec("cpu", "-2"), "trainer.grpo.generation.cpu"),
    (
        "GenerationServerUnsupported",
        make_vllm_spec() | {"phases": {"train": False, "from": "s3://bucket/run", "evaluate": True}},
        "trainer.grpo.generation.backend",
    ),
    ("GenerationServerUnsupported", make_vllm_spec() | {"method": {"lora": {"init": "loftq"}}}, "method.lora"),
    ("ContextParallel", {"distributed": {"strategy": "deepspeed", "contextParallelSize": 2}}, "distributed.contextParallelSize"),
    ("ModelCacheInvalid", {"model": {"cache": "pvc://claim/a\nb"}}, "model.cache"),
    ("ModelCacheInvalid", {"model": {"cache": "pvc://claim/a\x1b[31m"}}, "model.cache"),
    ("OptionOfTextRows", {"dataset": {"format": "preTokenized", "checks": {"piiScan": True}}}, "dataset.checks.piiScan"),
    (
        "OptionOfTextRows",
        {"dataset": {"train": None, "mixture": [{"source": "s3://b/a", "format": "preTokenized", "columns": {"text": "a"}}]}},
        "dataset.mixture[0].columns",
    ),
    ("ImagesOfTokenRows", {"dataset": {"format": "preTokenized"}, "model": {"modality": "visionLanguage"}}, "dataset.format"),
    (
        "DataOptionWithoutEffect",
        {"dataset": {"chatTemplate": {"text": "x"}, "useChatTemplate": False}},
        "dataset.chatTemplate",
    ),
    ("DataOptionWithoutEffect", {"dataset": {"responseOnly": {"answerMarker": "A:"}}}, "dataset.responseOnly"),
    (
        "DataOptionWithoutEffect",
        {"dataset": {"responseOnly": {"enabled": False, "answerMarker": "A:", "questionMarker": "Q:"}}},
        "dataset.responseOnly",
    ),
    (
        "CheckpointMayContainCode",
        {"checkpoint": {"resume": "s3://b/checkpoints/step-00000100"}, "distributed": {"strategy": "fsdp"}, "resources": {"gpusPerNode": 2}},
        "checkpoint.allowPickle",
    ),
    (
        "CheckpointMayContainCode",
        {
            "checkpoint": {"resume": "pvc://c/checkpoints/step-00000100", "allowPickle": False}, "distributed": {"strategy": "deepspeed"},
            "resources": {"gpusPerNode": 2},
        },
        "checkpoint.allowPickle",
    ),
    ("CheckpointMayContainCode", {"checkpoint": {"resume": "s3://b/checkpoints/step-00000100", "allowPickle": True}}, "checkpoint.allowPickle"),
    (
        "CheckpointMayContainCode",
        {"checkpoint": {"allowPickle": True}, "distributed": {"strategy": "fsdp"}, "resources": {"gpusPerNode": 2}},
        "checkpoint.allowPickle",
    ),
    ("WarmupTwice", {"training": {"warmupSteps": 5, "warmupRatio": 0.1}}, "training.warmupRatio"),
    ("WarmupTwice", {"training": {"warmupSteps": 0, "warmupRatio": 0.1}}, "training.warmupRatio"),
    ("WarmupTwice", {"training": {"warmupSteps": 5, "warmupRatio": 0.0}}, "training.warmupRatio"),
    ("StorageUriInvalid", {"storage": {"uri": "pvc://claim/../x"}}, "storage.uri"),
    ("StorageUriInvalid", {"storage": {"uri": "s3://bucket/a/.."}}, "storage.uri"),
    ("StorageUriInvalid", {"storage": {"uri": "file:///../etc"}}, "storage.uri"),
    ("VolumeContradiction", {"placement": {"volumeMounts": [{"name": "x", "mountPath": "/x"}]}}, "placement.volumeMounts[0].name"),
    ("LabelSyntax", {"placement": {"labels": {"a b": ""}}}, "placement.labels.a b"),
    ("LabelSyntax", {"placement": {"labels": {"team": "d e"}}}, "placement.labels.team"),
    ("LabelSyntax", {"placement": {"nodeSelector": {"zone": "x" * 64}}}, "placement.nodeSelector.zone"),
    ("LabelSyntax", {"placement": {"annotations": {"a/b/c": ""}}}, "placement.annotations.a/b/c"),
    ("SchedulingTermInvalid", {"placement": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}}, "placement.tolerations[0].value"),
    ("SchedulingTermInvalid", {"placement": {"tolerations": [{"operator": "Exists"}, {"effect": "NoExecute"}]}}, "placement.tolerations[1].key"),
    ("SchedulingTermInvalid", {"placement": {"tolerations": [{"key": "a", "tolerationSeconds": 3}]}}, "placement.tolerations[0].tolerationSeconds"),
    ("SchedulingTermInvalid", {"placement": {"nodeAffinity": [{"key": "a", "operator": "In"}]}}, "placement.nodeAffinity[0].values"),
    ("SchedulingTermInvalid", {"placement": {"nodeAffinity": [{"key": "a", "operator": "DoesNotExist", "values": ["b"]}]}}, "placement.nodeAffinity[0].values"),
    ("SchedulingTermInvalid", {"placement": {"nodeAffinity": [{"key": "a", "operator": "Gt", "values": ["b"]}]}}, "placement.nodeAffinity[0].values"),
    ("SchedulingTermInvalid", {"placement": {"nodeAffinity": [{"key": "a", "operator": "Lt", "values": ["1", "2"]}]}}, "placement.nodeAffinity[0].values"),
    ("SchedulingTermInvalid", {"resources": {"gpuResource": "amd"}}, "resources.gpuResource"),
    ("DataFileUnreadable", {"dataset": {"train": "s3://bucket/train.xlsx"}}, "dataset.train"),
    ("DataFileUnreadable", {"dataset": {"train": "s3://bucket/a.jsonl", "test": "pvc://claim/b.ARROW"}}, "dataset.test"),
    ("DataFileUnreadable", {"dataset": {"train": None, "mixture": [{"source": "https://host/x.zip?sig=1"}]}}, "dataset.mixture[0].source"),
    ("SourceInvalid", {"checkpoint": {"resume": "latest"}}, "checkpoint.resume"),
    ("SourceInvalid", {"checkpoint": {"resume": "checkpoints/step-100"}}, "checkpoint.resume"),
    ("OutputPathInvalid", {"output": {"dir": "s3://bucket/out"}}, "output.dir"),
    ("VolumeContradiction", {"placement": {"volumes": [{"name": "x"}]}}, "placement.volumes[0]"),
    ("MaxCostWithoutGpus", {"policy": {"maxCost": 5}, "resources": {"gpusPerNode": 0}}, "policy.maxCost"),
    ("VolumeContradiction", {"placement": {"volumes": [{"name": "x", "secret": "a", "configMap": "b"}]}}, "placement.volumes[0]"),
    (
        "EnvironmentContradiction",
        {"placement": {"env": [{"name": "A", "value": "", "secretKeyRef": {"name": "s", "key": "k"}}]}},
        "placement.env[0]",
    ),
    ("PlacementNameTwice", {"placement": {"env": [{"name": "A"}, {"name": "B"}, {"name": "A"}]}}, "placement.env[2].name"),
    (
        "PlacementNameTwice",
        {"placement": {"volumes": [{"name": "v", "secret": "a"}, {"name": "v", "secret": "b"}]}},
        "placement.volumes[1].name",
    ),
    (
        "PlacementNameTwice",
        {
            "placement": {
                "volumes": [{"name": "v", "secret": "a"}],
                "volumeMounts": [{"name": "v", "mountPath": "/x"}, {"name": "v", "mountPath": "/x"}],
            }
        },
        "placement.volumeMounts[1].mountPath",
    ),
    ("OptimizerUnknown", {"training": {"optimizer": "adamw_torch_fusd"}}, "training.optimizer"),
    (
        "PrecisionOnCpu",
        {"training": {"mixedPrecision": "fp16"}, "resources": {"gpusPerNode": 0}},
        "training.mixedPrecision",
    ),
    ("PrecisionOnCpu", {"model": {"ligerKernels": True}, "resources": {"gpusPerNode": 0}}, "model.ligerKernels"),
    (
        "PrecisionOnCpu",
        {"training": {"gradientCheckpointing": "unsloth"}, "resources": {"gpusPerNode": 0}},
        "training.gradientCheckpointing",
    ),
    ("DeviceOfAnotherMachine", {"training": {"device": "mps"}}, "training.device"),
    ("DeviceOfAnotherMachine", {"training": {"device": "cpu"}}, "training.device"),
    ("DeviceOfAnotherMachine", {"training": {"device": "cuda"}, "resources": {"gpusPerNode": 0}}, "training.device"),
    ("BestNeedsMatchingSteps", {"checkpoint": {"loadBestAtEnd": True}}, "checkpoint.loadBestAtEnd"),
    (
        "BestNeedsMatchingSteps",
        {
            "checkpoint": {"loadBestAtEnd": True, "steps": 30},
            "evaluation": {"steps": 20},
            "dataset": {"validation": "a/b"},
        },
        "checkpoint.steps",
    ),
    (
        "BestNeedsMatchingSteps",
        {"checkpoint": {"loadBestAtEnd": True, "strategy": "epoch"}, "dataset": {"validation": "a/b"}},
        "checkpoint.strategy",
    ),
    ("StepsWithoutEffect", {"checkpoint": {"strategy": "epoch", "steps": 5}}, "checkpoint.steps"),
    (
        "StepsWithoutEffect",
        {"evaluation": {"strategy": "epoch", "steps": 5}, "dataset": {"validation": "a/b"}},
        "evaluation.steps",
    ),
    (
        "StepsWithoutEffect",
        {"training": {"gradientCheckpointing": "disabled", "checkpointEveryNLayers": 2}},
        "training.checkpointEveryNLayers",
    ),
    (
        "StepsWithoutEffect",
        {"training": {"checkpointEveryNLayers": 2}, "resources": {"gpusPerNode": 0}},
        "training.checkpointEveryNLayers",
    ),
    (
        "StepsWithoutEffect",
        {"training": {"checkpointEveryNLayers": 2}, "method": {"type": "prefixTuning"}},
        "training.checkpointEveryNLayers",
    ),
    ("TrainingOptionWithoutEffect", {"training": {"optimizer": "sgd", "adamBeta1": 0.8}}, "training.adamBeta1"),
    ("TrainingOptionWithoutEffect", {"training": {"optimizer": "adafactor", "adamBeta2": 0.9}}, "training.adamBeta2"),
    (
        "TrainingOptionWithoutEffect",
        {"training": {"optimizer": "lion_8bit", "adamEpsilon": 1e-6}},
        "training.adamEpsilon",
    ),
    (
        "TrainingOptionWithoutEffect",
        {"training": {"groupByLength": True}, "dataset": {"packing": True}},
        "training.groupByLength",
    ),
    ("ValidationMissing", {"evaluation": {"strategy": "steps"}}, "evaluation.strategy"),
    ("ValidationMissing", {"evaluation": {"steps": 5}}, "evaluation.steps"),
    ("ValidationMissing", {"training": {"earlyStopping": {}}}, "training.earlyStopping"),
    (
        "ValidationMissing",
        {"training": {"earlyStopping": {}}, "evaluation": {"strategy": "no"}, "dataset": {"validation": "a/b"}},
        "training.earlyStopping",
    ),
    ("RanksAndGpus", {"resources": {"gpusPerNode": 4, "processesPerNode": 2}}, "resources.processesPerNode"),
    ("StrategyAndRanks", {"distributed": {"strategy": "none"}, "resources": {"nodes": 2}}, "distributed.strategy"),
    ("StrategyAndRanks", {"distributed": {"strategy": "fsdp"}}, "distributed.strategy"),
    ("StrategyAndRanks", {"distributed": {"deepspeed": {"zeroStage": 2}}}, "distributed.deepspeed"),
    ("StrategyAndRanks", {"distributed": {"fsdp": {}}}, "distributed.fsdp"),
    (
        "StrategyAndRanks",
        {"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 1, "offloadParameters": True}}},
        "distributed.deepspeed.offloadParameters",
    ),
    (
        "StrategyAndMethod",
        {"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 3}}, "method": {"type": "qlora"}},
        "distributed.deepspeed.zeroStage",
    ),
    ("BackendAndStrategy", {"trainer": {"backend": "unsloth"}, "distributed": {"strategy": "ddp"}}, "trainer.backend"),
    ("BackendAndStrategy", {"trainer": {"backend": "unsloth"}, "resources": {"gpusPerNode": 2}}, "trainer.backend"),
    ("BackendAndStrategy", {"trainer": {"backend": "unsloth"}, "resources": {"gpusPerNode": 0}}, "trainer.backend"),
    ("BackendAndStrategy", {"trainer": {"backend": "unsloth"}, "training": {"device": "cpu"}}, "trainer.backend"),
    (
        "HubRepositoryMissing",
        {"output": {"hub": {"push": True, "tokenSecretRef": {"name": "h", "key": "t"}}}},
        "output.hub.repository",
    ),
    ("HubRepositoryMissing", {"output": {"hub": {"push": True, "repository": "a/b"}}}, "output.hub.tokenSecretRef"),
    ("HubRepositoryMissing", {"output": {"hub": {"repository": "a/b"}}}, "output.hub"),
    ("OutputPathInvalid", {"output": {"dir": "a/../b"}}, "output.dir"),
    ("OutputPathInvalid", {"output": {"dir": "a", "project": ".."}}, "output.project"),
    ("OutputOptionWithoutEffect", {"output": {"export": ["oci"]}, "phases": {"train": False, "from": "s3://b/m", "infer": True}}, "output.export"),
    ("AdaptersNotCombinable", {"output": {"adapterWeight": 0.5}}, "output.adapterWeight"),
    ("AdaptersNotCombinable", {"output": {"combineAdapters": [{"source": "s3://b/a"}]}}, "output.combineAdapters"),
    (
        "AdaptersNotCombinable",
        {"method": {"type": "dora"}, "output": {"mergeAdapter": True, "combineAdapters": [{"source": "s3://b/a"}]}},
        "output.combineAdapters",
    ),
    ("OutputOptionWithoutEffect", {"output": {"project": "p"}}, "output.project"),
    ("OutputOptionWithoutEffect", {"output": {"layout": "flat"}}, "output.layout"),
    (
        "OutputOptionWithoutEffect",
        {"output": {"mergeAdapter": True}, "method": {"type": "full"}},
        "output.mergeAdapter",
    ),
    (
        "OutputOptionWithoutEffect",
        {"output": {"mergeAdapter": True}, "method": {"type": "promptTuning"}},
        "output.mergeAdapter",
    ),
    (
        "OutputOptionWithoutEffect",
        {"output": {"mergeAdapter": True}, "method": {"type": "qlora", "lora": {"init": "loftq"}}},
        "output.mergeAdapter",
    ),
    ("TrackerAndOptions", {"tracking": {"wandb": {"project": "x"}}}, "tracking.wandb"),
    ("TrackerAndOptions", {"tracking": {"reportTo": ["wandb"]}}, "tracking.wandb.apiKeySecretRef"),
    ("TrackerAndOptions", {"tracking": {"reportTo": ["mlflow"]}}, "tracking.mlflow.trackingUri"),
    (
        "TrackerAndOptions",
        {"tracking": {"reportTo": ["wandb"]}, "placement": {"env": [{"name": "WANDB_MODE", "value": "online"}]}},
        "tracking.wandb.apiKeySecretRef",
    ),
    ("TrackerAndOptions", {"tracking": {"reportTo": ["mlflow"], "mlflow": {"trackingUri": "mlflow:5000"}}}, "tracking.mlflow.trackingUri"),
    ("TrackerAndOptions", {"tracking": {"reportTo": ["mongodb"]}}, "tracking.mongodb.uriSecretRef"),
    ("TrackerAndOptions", {"tracking": {"reportTo": ["tensorboard", "tensorboard"]}}, "tracking.reportTo[1]"),
    ("NotServable", {"method": {"type": "dora"}, "output": {"serving": ["vllm"]}}, "method.type"),
    ("NotServable", {"method": {"type": "promptTuning"}, "output": {"serving": ["kserve"]}}, "method.type"),
    ("NotServable", {"method": {"type": "ia3"}, "output": {"serving": ["vllm", "kserve"]}}, "method.type"),
    ("NotServable", {"method": {"lora": {"modulesToSave": ["lm_head"]}}, "output": {"serving": ["vllm"]}}, "method.lora.modulesToSave"),
    ("NotServable", {"method": {"lora": {"bias": "all"}}, "output": {"serving": ["vllm"]}}, "method.lora.bias"),
    ("NotServable", {"method": {"lora": {"rank": 513}}, "output": {"serving": ["vllm"]}}, "method.lora.rank"),
    ("NotServable", {"method": {"lora": {"rank": 257, "init": "pissa"}}, "output": {"serving": ["vllm"]}}, "method.lora.rank"),
    ("NotServable", {"model": {"newTokens": ["<a>"]}, "output": {"serving": ["vllm"]}}, "model.newTokens"),
    ("NotServable", {"trainer": {"type": "reward"}, "output": {"serving": ["vllm"]}}, "trainer.type"),
    ("NotServable", {"model": {"source": "s3://bucket/model"}, "output": {"serving": ["kserve"]}}, "model.source"),
    ("NotServable", {"output": {"serving": ["vllm", "vllm"]}}, "output.serving[1]"),
    ("JudgeMissing", {"evaluation": {"judge": {"inputPrice": 1}}}, "evaluation.judge.model"),
    ("JudgeMissing", {"evaluation": {"metrics": ["answerAccuracy"], "judge": {"apiKeySecretRef": KEY_REF}}}, "evaluation.judge.model"),
    ("JudgeMissing", {"evaluation": {"metrics": ["factualCorrectness"], "judge": {"model": "m"}}}, "evaluation.judge.apiKeySecretRef"),
    (
        "JudgeMissing",
        {"evaluation": {"metrics": ["answerRelevancy"], "judge": {"model": "m", "apiKeySecretRef": KEY_REF}}},
        "evaluation.judge.embedding",
    ),
    (
        "JudgeMissing",
        {"evaluation": {"metrics": ["answerCorrectness"], "judge": {"model": "m", "apiKeySecretRef": KEY_REF}}},
        "evaluation.judge.embedding",
    ),
    ("MetricModelMissing", {"evaluation": {"metrics": ["bertscore"]}}, "evaluation.metricModels.bertscore"),
    ("MetricModelMissing", {"evaluation": {"metrics": ["semanticSimilarity"]}}, "evaluation.metricModels.semanticSimilarity"),
    ("MetricModelMissing", {"evaluation": {"metricModels": {"bertscore": "a/b"}}}, "evaluation.metricModels.bertscore"),
    (
        "MetricModelMissing",
        {"evaluation": {"metrics": ["accuracy"], "metricModels": {"semanticSimilarity": "a/b"}}},
        "evaluation.metricModels.semanticSimilarity",
    ),
    ("GateInvalid", make_gates_spec({"metric": "accuracy"}), "evaluation.gates[0]"),
    ("GateInvalid", make_gates_spec({"metric": "accuracy", "op": "ge", "value": 0.8, "notWorseThanBase": {}}), "evaluation.gates[0]"),
    ("GateInvalid", make_gates_spec({"metric": "accuracy", "value": 0.8}), "evaluation.gates[0].op"),
    ("GateInvalid", make_gates_spec({"metric": "accuracy", "op": "ge", "notWorseThanBase": {}}), "evaluation.gates[0].op"),
    ("GateInvalid", make_gates_spec(ACCURACY_GATE, {"metric": "f1", "op": "ge", "value": 80}), "evaluation.gates[1].value"),
    (
        "GateInvalid",
        make_gates_spec({"metric": "accuracy", "notWorseThanBase": {"margin": 2}}),
        "evaluation.gates[0].notWorseThanBase.margin",
    ),
    ("GateMetricMissing", make_gates_spec(ACCURACY_GATE, metrics=["bleu"]), "evaluation.gates[0].metric"),
    ("GateMetricMissing", make_gates_spec({"metric": "loss", "op": "le", "value": 2}, metrics=["bleu"]), "evaluation.gates[0].metric"),
    ("GateMetricMissing", make_gates_spec(ACCURACY_GATE, metrics=None), "evaluation.gates[0].metric"),
    ("GateMetricMissing", merge(make_gates_spec(ACCURACY_GATE), {"phases": {"evaluate": False}}), "evaluation.gates"),
    ("EvaluationRowsMissing", merge(make_gates_spec(ACCURACY_GATE), {"dataset": {"test": None}}), "evaluation.gates"),
    ("EvaluationRowsMissing", {"evaluation": {"metrics": ["bleu"]}}, "evaluation.metrics"),
    ("EvaluationRowsMissing", {"phases": {"infer": True}}, "phases.infer"),
    ("RewardModelWritesNoText", {"trainer": {"type": "reward"}, "evaluation": {"metrics": ["bleu"]}} | WITH_TEST_DATA, "evaluation.metrics"),
    ("RewardModelWritesNoText", {"trainer": {"type": "reward"}, "phases": {"infer": True}} | WITH_TEST_DATA, "phases.infer"),
    ("RewardModelWritesNoText", {"trainer": {"type": "reward"}} | make_benchmarks({"name": "lm-eval", "folder": "a/b"}), "evaluation.benchmarks"),
    ("BenchmarkUnknown", make_benchmarks({"name": "lm-evall", "folder": "a/b"}), "evaluation.benchmarks[0].name"),
    ("BenchmarkUnknown", make_benchmarks({"name": "hellaswag", "folder": "a/b"}), "evaluation.benchmarks[0].name"),
    ("BenchmarkFolderMissing", make_benchmarks({"name": "lm-evaluation-harness", "tasks": ["hellaswag"]}), "evaluation.benchmarks[0].folder"),
    ("BenchmarkFolderMissing", make_benchmarks({"name": "domain-specific-eval"}), "evaluation.benchmarks[0].folder"),
    ("BenchmarkFolderMissing", make_benchmarks({"name": "openai-humaneval", "allowCodeExecution": True}), "evaluation.benchmarks[0].folder"),
    ("CodeExecutionNotAllowed", make_benchmarks({"name": "openai-humaneval", "folder": "a/b"}), "evaluation.benchmarks[0].allowCodeExecution"),
    ("BenchmarkOptionWithoutEffect", WITH_TEST_DATA | make_benchmarks({"name": "human-eval", "folder": "a/b"}), "evaluation.benchmarks[0].folder"),
    ("BenchmarkOptionWithoutEffect", WITH_TEST_DATA | make_benchmarks({"name": "human-eval", "fewShot": 0}), "evaluation.benchmarks[0].fewShot"),
    (
        "BenchmarkOptionWithoutEffect",
        make_benchmarks({"name": "domain-specific-eval", "folder": "a/b", "applyChatTemplate": True}),
        "evaluation.benchmarks[0].applyChatTemplate",
    ),
    ("BenchmarkOptionWithoutEffect", make_benchmarks({"name": "lm-eval", "folder": "a/b"}) | {"phases": {"evaluate": False}}, "evaluation.benchmarks"),
    (
        "BenchmarkRepeated",
        make_benchmarks(
            {"name": "lm-eval", "folder": "a/b", "tasks": ["truthfulqa_mc"]},
            {"name": "lm-evaluation-harness", "folder": "a/c", "tasks": ["truthfulqa_mc2"]},
        ),
        "evaluation.benchmarks[1]",
    ),
    ("BenchmarkRepeated", WITH_TEST_DATA | make_benchmarks({"name": "human-eval"}, {"name": "human-eval", "limit": 3}), "evaluation.benchmarks[1]"),
    ("BenchmarkRowsMissing", make_benchmarks({"name": "human-eval"}), "evaluation.benchmarks[0]"),
    ("SourceInvalid", make_benchmarks({"name": "lm-eval", "folder": "https://host/jobs/model"}), "evaluation.benchmarks[0].folder"),
    ("SourceInvalid", make_benchmarks({"name": "lm-eval", "folder": "configmap://a/b"}), "evaluation.benchmarks[0].folder"),
    ("EvaluationOptionWithoutEffect", {"evaluation": {"maxRows": 100}}, "evaluation.maxRows"),
    ("EvaluationOptionWithoutEffect", {"evaluation": {"maxRows": 100, "metrics": ["bleu"]}, "phases": {"evaluate": False}}, "evaluation.maxRows"),
    ("PhasesContradiction", {"phases": {"from": "s3://bucket/model"}}, "phases.from"),
    ("PhasesContradiction", {"phases": {"train": True, "from": "s3://bucket/model"}}, "phases.from"),
    ("PhasesContradiction", {"phases": {"train": False, "infer": True}}, "phases.from"),
    ("PhasesContradiction", {"phases": {"train": False, "infer": True, "from": "org/model"}}, "phases.from"),
    ("PhasesContradiction", {"phases": {"train": False, "from": "s3://bucket/model"}}, "phases"),
    ("PhasesContradiction", {"phases": {"train": False, "from": "s3://bucket/model"}, "output": {"verify": False}}, "phases"),
    ("PhasesContradiction", {"phases": {"evaluate": True}}, "phases.evaluate"),
    (
        "PhasesContradiction",
        {"phases": {"train": False, "evaluate": False, "from": "s3://bucket/model"}} | make_benchmarks({"name": "human-eval"}),
        "phases",
    ),
    ("PhasesContradiction", {"phases": {"evaluate": True}, "evaluation": {"metrics": []}}, "phases.evaluate"),
    (
        "RewardModelWritesNoText",
        {"trainer": {"type": "reward"}, "evaluation": {"comparison": {"promptsRef": KEY_REF}}},
        "evaluation.comparison.promptsRef",
    ),
    (
        "PhasesContradiction",
        {"phases": {"train": False, "infer": False, "evaluate": False, "from": "s3://bucket/model"}, "evaluation": {"metrics": ["bleu"]}},
        "phases",
    ),
    ("SourceInvalid", {"phases": {"train": False, "infer": True, "from": "configmap://name/key"}}, "phases.from"),
    ("SourceInvalid", {"evaluation": {"metrics": ["bertscore"], "metricModels": {"bertscore": "./roberta"}}}, "evaluation.metricModels.bertscore"),
    ("DatasetMissing", {"dataset": {"train": None}, "phases": {"train": False, "infer": True, "from": "s3://bucket/model"}}, "dataset.train"),
    (
        "DatasetMissing",
        {"dataset": {"train": None}, "phases": {"train": False, "from": "s3://bucket/model"}}
        | make_benchmarks({"name": "lm-eval", "folder": "s3://bucket/tasks"}),
        "dataset.train",
    ),
    (
        "DatasetMissing",
        {"dataset": {"train": None, "split": {"test": 0.1}}, "output": {"verify": True}, "phases": {"train": False, "from": "s3://bucket/model"}},
        "dataset.train",
    ),
    (
        "EnvironmentReserved",
        {"placement": {"env": [{"name": "AWS_ACCESS_KEY_ID", "value": "x"}]}},
        "placement.env[0].name",
    ),
    ("ModelCacheInvalid", {"model": {"source": "org/m", "cache": "s3://bucket/cache"}}, "model.cache"),
    ("ModelCacheInvalid", {"model": {"source": "org/m", "cache": "Node"}}, "model.cache"),
    ("ModelCacheInvalid", {"model": {"source": "org/m", "cache": "pvc://claim/../x"}}, "model.cache"),
    ("ModelCacheInvalid", {"model": {"source": "org/m", "cache": "/var/lib/models"}}, "model.cache"),
    ("ModelCacheWithoutEffect", {"model": {"source": "pvc://claim/m", "cache": "pvc://models/hub"}}, "model.cache"),
    ("ModelCacheWithoutEffect", {"model": {"source": "file:///m", "cache": "node"}}, "model.cache"),
    (
        "EncryptionContradiction",
        {"storage": {"encryption": {"type": "s3", "kmsKeyId": "alias/x"}}},
        "storage.encryption.kmsKeyId",
    ),
    (
        "EncryptionContradiction",
        {"model": {"storage": {"encryption": {"type": "customerKey"}}}},
        "model.storage.encryption.customerKeySecretRef",
    ),
    (
        "EncryptionContradiction",
        {
            "dataset": {
                "storage": {
                    "endpoint": "http://store:9000",
                    "encryption": {"type": "customerKey", "customerKeySecretRef": {"name": "s", "key": "k"}},
                }
            }
        },
        "dataset.storage.endpoint",
    ),
    (
        "EncryptionContradiction",
        {"storage": {"uri": "pvc://claim/root", "encryption": {"type": "s3"}}},
        "storage.encryption",
    ),
    ("ExistingResultNotCompared", {"policy": {"onExistingResult": "adopt"}, "prepare": {"strategy": "never"}}, "policy.onExistingResult"),
    (
        "ExistingResultNotCompared",
        {"policy": {"onExistingResult": "fail"}, "phases": {"train": False, "from": "s3://models/x/model"}, "dataset": {"test": "s3://data/t"}},
        "policy.onExistingResult",
    ),
]


@pytest.mark.parametrize(("code", "change", "path"), PROBLEM_CASES, ids=[f"{code}-{path}" for code, _, path in PROBLEM_CASES])
def test_a_problem_names_the_field_and_what_to_write(code: str, change: dict[str, Any], path: str) -> None:
    problems = [problem for problem in check_spec(make_spec(change)) if problem.code == code]
    assert [problem.path for problem in problems] == [path]
    assert problems[0].message
    assert problems[0].hint
    assert str(problems[0]).startswith(f"spec.{path}: ")


@pytest.mark.parametrize(
    "folder", ["model", "model/a1-1f3c9a2b", "checkpoints/step-00000100/", "checkpoints/step-00000100/a12-1f3c9a2b"]
)
def test_a_jobs_checkpoint_or_model_on_a_web_server_is_a_valid_source(folder: str) -> None:
    uri = f"https://host/jobs/{folder}?signature=a/b"
    change = {"model": {"source": uri}} | ({"checkpoint": {"resume": uri}} if "step" in folder else {})
    assert [problem for problem in check_spec(make_spec(change)) if problem.code == "SourceInvalid"] == []


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x.gguf?hidden",
        "http://host/x?hidden",
        "HTTPS://host/x?hidden",
        "https://host:port/x?hidden",
        "https://u:hidden@h/x",
    ],
)
def test_the_problem_of_a_source_contains_no_signature_and_no_password(text: str) -> None:
    problems = [problem for problem in check_spec(make_spec({"model": {"source": text}})) if problem.code == "SourceInvalid"]
    assert len(problems) == 1 and problems[0].hint and "hidden" not in str(problems[0])


def test_every_rule_has_a_spec_that_breaks_it() -> None:
    assert {rule.code for rule in RULES} == {code for code, _, _ in PROBLEM_CASES}


def test_rule_codes_are_unique() -> None:
    codes = [rule.code for rule in RULES]
    assert len(codes) == len(set(codes))


def test_a_resolved_spec_without_its_defaults_equals_the_users_spec() -> None:
    from finetune_api.defaults import resolve_defaults
    from finetune_api.errors import ConfigError
    from finetune_api.rules import enforce_rules, remove_defaults

    for change in (
        {},
        {"trainer": {"type": "kto"}},
        {"trainer": {"type": "orpo", "dpo": {"beta": 0.2}}},
        ADAPTER_SPEC,
        ZERO3_SPEC,
    ):
        user_spec = make_spec(change)
        resolution = resolve_defaults(user_spec)
        stripped_spec = remove_defaults(resolution.spec, resolution.defaults)
        user_groups = {key: value for key, value in user_spec.to_wire().items() if value not in ({}, False)}
        assert {key: value for key, value in stripped_spec.to_wire().items() if value not in ({}, False)} == user_groups
        assert check_spec(stripped_spec) == check_spec(user_spec) == []
    invalid_resolution = resolve_defaults(make_spec({"trainer": {"type": "kto"}, "training": {"batchSizePerDevice": 1}}))
    with pytest.raises(ConfigError, match="BatchTooSmall: training.batchSizePerDevice: 1, but kto"):
        enforce_rules(remove_defaults(invalid_resolution.spec, invalid_resolution.defaults), "BatchTooSmall")
    enforce_rules(invalid_resolution.spec, "DpoLosses")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"method": {"type": "qlora"}},
        {"method": {"type": "lora"}, "model": {"quantization": {"bits": 8}}},
        {"trainer": {"type": "dpo"}, "dataset": {"format": "preference"}},
        {
            "trainer": {"type": "grpo", "rewards": [{"builtin": "regex", "parameters": {"pattern": "x"}}]},
            "dataset": {"format": "promptOnly"},
        },
        {"dataset": {"split": {"train": 0.8, "validation": 0.1, "test": 0.1}}, "checkpoint": {"loadBestAtEnd": True}},
        {"resources": {"gpusPerNode": 0, "processesPerNode": 2}},
        {"training": {"checkpointEveryNLayers": 2}},
        {
            "training": {"checkpointEveryNLayers": 2, "gradientCheckpointing": "enabled"},
            "resources": {"gpusPerNode": 0},
        },
        {"training": {"checkpointEveryNLayers": 1, "groupByLength": True}, "method": {"type": "prefixTuning"}},
        {"training": {"adamBeta1": 0.8, "adamBeta2": 0.9, "adamEpsilon": 1e-6}},
        {"training": {"optimizer": "paged_ademamix_8bit", "adamBeta1": 0.8, "adamEpsilon": 1e-6}},
        {"training": {"optimizer": "lion_32bit", "adamBeta1": 0.8, "adamBeta2": 0.9}},
        {"training": {"groupByLength": False}, "dataset": {"packing": True}},
        make_gates_spec(
            ACCURACY_GATE, {"metric": "loss", "op": "lt", "value": 2}, {"metric": "perplexity", "op": "gt", "value": 1},
            {"metric": "f1", "op": "le", "value": 1}, {"metric": "f1", "notWorseThanBase": {}}, {"metric": "loss", "notWorseThanBase": {"margin": 3}},
        ),
        merge(make_gates_spec(ACCURACY_GATE), {"dataset": {"test": None, "split": {"validation": 0.1}}}),
        WITH_TEST_DATA | {"evaluation": {"metrics": [*JUDGE_METRICS], "judge": {"model": "m", "embedding": "e", "apiKeySecretRef": KEY_REF}}},
        WITH_TEST_DATA
        | {"evaluation": {"metrics": ["answerAccuracy"], "judge": {"model": "m"}}, "placement": {"env": [{"name": "OPENAI_API_KEY", "secretKeyRef": KEY_REF}]}},
        {"evaluation": {"metrics": ["answerAccuracy", "bertscore"]}, "phases": {"evaluate": False}},
        WITH_TEST_DATA | {"evaluation": {"metrics": ["semanticSimilarity"], "judge": {"embedding": "e"}, "maxRows": 5}},
        WITH_TEST_DATA | {"evaluation": {"metrics": ["bertscore", "semanticSimilarity"], "metricModels": {"bertscore": "a/b", "semanticSimilarity": "pvc://c/d"}}},
        WITH_TEST_DATA | {"phases": {"infer": True}, "evaluation": {"maxRows": 5}},
        WITH_TEST_DATA | make_benchmarks({"name": "human-eval", "limit": 5, "compareWithBase": True}),
        make_benchmarks({"name": "openai-humaneval", "folder": "a/b", "allowCodeExecution": True}),
        make_benchmarks({"name": "lm-eval", "folder": "a/b", "tasks": ["x"], "fewShot": 0, "applyChatTemplate": True}, {"name": "lm-eval", "folder": "pvc://c/d"}),
        make_benchmarks({"name": "domain-specific-eval", "folder": "s3://bucket/domains", "tasks": ["medical"], "fewShot": None}),
        {"phases": {"train": False, "infer": True, "from": "s3://bucket/model"}, "dataset": {"train": None, "test": "s3://bucket/test.jsonl"}},
        WITH_TEST_DATA | {"phases": {"train": False, "from": "https://host/jobs/model"}, "evaluation": {"metrics": ["bleu"]}},
        {"phases": {"evaluate": True}} | make_benchmarks({"name": "openai-humaneval", "folder": "a/b", "allowCodeExecution": True}),
        {"phases": {"train": False, "from": "s3://bucket/model"}, "output": {"serving": ["vllm"]}},
        {"phases": {"train": False, "from": "s3://bucket/model"}, "output": {"verify": True}, "dataset": {"train": None}},
        {"phases": {"train": False, "from": "s3://bucket/model"}, "output": {"mergeAdapter": True}, "dataset": {"train": None}},
    ],
)
def test_a_valid_spec_has_no_problems(change: dict[str, Any]) -> None:
    assert check_spec(make_spec(change)) == []


DATASET_WITH_VALIDATION: dict[str, Any] = {"train": "a/b", "validation": "a/c"}


@pytest.mark.parametrize(
    ("save_steps", "eval_steps", "is_refused"),
    [(40, 20, False), (20, 40, True), (40, 40, False), (30, 20, True), (None, 50, False), (None, 200, True), (40, None, False)],
)
def test_save_steps_must_be_a_multiple_of_eval_steps(save_steps: int | None, eval_steps: int | None, is_refused: bool) -> None:
    change = {
        "dataset": DATASET_WITH_VALIDATION,
        "checkpoint": {"loadBestAtEnd": True, "steps": save_steps},
        "evaluation": {"steps": eval_steps},
    }
    codes = {problem.code for problem in check_spec(make_spec(change))}
    assert ("BestNeedsMatchingSteps" in codes) == is_refused


@pytest.mark.parametrize(
    ("resources", "is_refused"),
    [
        ({"gpusPerNode": 8}, False),
        ({"gpusPerNode": 4, "nodes": 2}, False),
        ({"gpusPerNode": 0, "processesPerNode": 8}, False),
        ({"gpusPerNode": 4}, True),
        ({"gpusPerNode": 1}, True),
    ],
    ids=str,
)
def test_completions_of_all_ranks_together_must_be_divisible_by_the_generations(resources: dict[str, int], is_refused: bool) -> None:
    change = make_grpo_spec({"builtin": "thinkFormat"}, training={"batchSizePerDevice": 1, "gradientAccumulationSteps": 1}, resources=resources)
    codes = {problem.code for problem in check_spec(make_spec(change))}
    assert ("GenerationsDoNotDivide" in codes) == is_refused


@pytest.mark.parametrize(("gpus", "is_refused"), [(1, True), (2, False)])
def test_an_evaluation_batch_of_all_ranks_must_contain_a_whole_group_of_completions(gpus: int, is_refused: bool) -> None:
    change = make_grpo_spec(
        {"builtin": "thinkFormat"}, dataset=DATASET_WITH_VALIDATION, resources={"gpusPerNode": gpus},
        evaluation={"batchSizePerDevice": 1},
    )  # fmt: skip
    paths = {problem.path for problem in check_spec(make_spec(change)) if problem.code == "GenerationsDoNotDivide"}
    assert ("evaluation.batchSizePerDevice" in paths) == is_refused


def test_a_local_run_needs_no_secret_for_the_judges_key() -> None:
    judged_spec = make_spec(WITH_TEST_DATA | {"evaluation": {"metrics": ["answerAccuracy"], "judge": {"model": "m"}}})
    assert check_spec(judged_spec, target=ExecutionTarget.LOCAL) == []


def test_the_hint_for_a_gate_contains_a_value_that_fits_the_metric() -> None:
    problems = check_spec(make_spec(make_gates_spec({"metric": "f1", "op": "ge", "value": 80}, {"metric": "loss", "value": 2})))
    assert [problem.hint for problem in problems] == ["write for example 0.8", "write `op: le`, or another comparison: lt, le, gt or ge"]


def test_gates_can_use_every_metric_and_the_loss() -> None:
    assert {metric.value for metric in GateMetric} == {metric.value for metric in EvaluationMetric} | {"loss"}


def test_a_local_run_needs_no_secret_for_the_hub_token() -> None:
    pushed_spec = make_spec({"output": {"hub": {"push": True, "repository": "org/bot"}}})
    assert check_spec(pushed_spec, target=ExecutionTarget.LOCAL) == []


def test_a_local_run_may_use_an_apple_gpu() -> None:
    assert check_spec(make_spec({"training": {"device": "mps"}}), target=ExecutionTarget.LOCAL) == []


def test_all_problems_are_reported_at_once() -> None:
    problems = check_spec(
        make_spec(
            {"model": {"source": None}, "trainer": {"type": "grpo"}, "dataset": {"split": {"train": 0.9, "test": 0.2}}}
        )
    )
    assert [problem.path for problem in problems] == ["model.source", "trainer.rewards", "dataset.split"]
    assert problems[-1].message == "train 0.9 + test 0.2 = 1.1, but the sum of the ratios must be 1"


def test_new_problems_are_only_those_that_a_change_causes() -> None:
    spec_before = make_spec({"method": {"type": "full", "promptLength": 4}})
    spec_after = spec_before.with_values({"method.lora": {"rank": 4}})
    assert [problem.path for problem in check_spec(spec_before)] == ["method.promptLength"]
    assert [problem.path for problem in new_problems(spec_before, spec_after)] == ["method.lora"]
    assert new_problems(spec_after, spec_before) == []


@pytest.mark.parametrize(
    ("change", "are_metrics_compared", "are_answers_compared"),
    [
        ({"evaluation": {"metrics": ["bleu"]}}, False, False),
        ({"evaluation": {"metrics": ["bleu"], "comparison": {}}}, True, True),
        ({"evaluation": {"metrics": ["bleu"], "comparison": {}}, "phases": {"evaluate": False}}, False, False),
        ({"evaluation": {"metrics": ["bleu"], "gates": [{"metric": "bleu", "op": "ge", "value": 3}]}}, False, False),
        ({"evaluation": {"metrics": ["bleu"], "gates": [{"metric": "bleu", "notWorseThanBase": {}}]}}, True, False),
        ({"evaluation": {"comparison": {"generation": {"maxNewTokens": 5}}}}, False, False),
        ({"evaluation": {"comparison": {"promptsRef": {"name": "p", "key": "k"}}}}, False, True),
    ],
)  # fmt: skip
def test_gates_and_comparison_decide_whether_the_base_model_is_compared(
    change: dict[str, Any], are_metrics_compared: bool, are_answers_compared: bool
) -> None:
    assert (compares_metrics(make_spec(change)), compares_answers(make_spec(change))) == (are_metrics_compared, are_answers_compared)


def test_a_job_without_training_may_do_nothing_but_compare_answers() -> None:
    comparison = {"promptsRef": {"name": "p", "key": "k"}}
    assert check_spec(make_spec({"phases": {"train": False, "from": "s3://bucket/model"}, "evaluation": {"comparison": comparison}})) == []


def test_ranks_that_share_each_sequence_count_as_one_in_the_effective_batch() -> None:
    change = merge(CONTEXT_PARALLEL_SPEC, {"training": {"effectiveBatchSize": 6}})
    assert check_spec(make_spec(change)) == [] and effective_batch(make_spec(change)) == 6
    problems = check_spec(make_spec(merge(change, {"training": {"effectiveBatchSize": 7}})))
    assert [problem.message for problem in problems] == ["7 is not divisible by 2 groups of 2 ranks"]
