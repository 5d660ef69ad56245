"""Removes fields that would have no effect, with a warning for each field that the user set.

The operator refuses a FineTuneJob with a field that would have no effect. Most files of other tools list every option. Without this
step, the operator would refuse most imported jobs.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.rules import LORA_METHODS
from finetune_api.spec.enums import Tracker

from finetune_cli.importers.draft import JobDraft

LORA_METHOD_NAMES = tuple(str(method) for method in LORA_METHODS)
ADAPTER_FIELDS = (
    "rank", "alpha", "dropout", "targetModules", "bias", "taskType", "rankStabilized", "useDora", "loftq", "init", "modulesToSave",
)  # fmt: skip


def _method_of(draft: JobDraft) -> str:
    return str(draft.value("method.type", "lora"))


def _is_not_tracked(tracker: Tracker) -> Callable[[JobDraft], bool]:
    return lambda draft: str(tracker) not in (draft.value("tracking.reportTo") or [])


def _is_4bit(draft: JobDraft) -> bool:
    return _method_of(draft) == "qlora" or draft.value("model.quantization.bits") == 4


RULES: tuple[tuple[tuple[str, ...], Callable[[JobDraft], bool], str], ...] = (
    (("method.lora",), lambda d: _method_of(d) not in LORA_METHOD_NAMES, "the method has no low-rank adapters"),
    (
        tuple(f"method.lora.{name}" for name in ADAPTER_FIELDS),
        lambda d: _method_of(d) == "adapter",
        "the existing adapter defines this value",
    ),
    (("method.spectrum",), lambda d: _method_of(d) != "spectrum", "the method is not spectrum"),
    (
        ("method.promptLength",),
        lambda d: _method_of(d) not in ("prefixTuning", "promptTuning"),
        "the method uses no virtual tokens",
    ),
    (
        ("method.spectrum.snrThreshold", "method.spectrum.metric"),
        lambda d: d.has_value("method.spectrum.layers"),
        "the layers are listed explicitly, so they are not ranked",
    ),
    (
        ("model.quantization.type", "model.quantization.computeDtype", "model.quantization.doubleQuant"),
        lambda d: not _is_4bit(d),
        "the base model is not loaded in 4 bits",
    ),
    (
        ("trainer.maxCompletionLength",),
        lambda d: d.value("trainer.type", "sft") == "sft",
        "sft does not generate completions",
    ),
    (
        ("dataset.responseOnly.questionMarker", "dataset.responseOnly.answerMarker"),
        lambda d: d.value("dataset.responseOnly.enabled") is False,
        "the loss covers the whole sequence",
    ),
    (("dataset.template",), lambda d: d.value("dataset.format") != "custom", "dataset.format is not custom"),
    (("dataset.mcq",), lambda d: d.value("dataset.format") != "mcq", "dataset.format is not mcq"),
    (
        ("checkpoint.steps",),
        lambda d: d.value("checkpoint.strategy", "steps") != "steps",
        "checkpoint.strategy is not steps",
    ),
    (
        ("evaluation.steps",),
        lambda d: d.value("evaluation.strategy", "steps") != "steps",
        "evaluation.strategy is not steps",
    ),
    (("output.hub",), lambda d: not d.value("output.hub.push"), "output.hub.push is false"),
    (("tracking.mlflow",), _is_not_tracked(Tracker.MLFLOW), "mlflow is not in tracking.reportTo"),
    (("tracking.wandb",), _is_not_tracked(Tracker.WANDB), "wandb is not in tracking.reportTo"),
    (("tracking.mongodb",), _is_not_tracked(Tracker.MONGODB), "mongodb is not in tracking.reportTo"),
    (("distributed.deepspeed",), lambda d: d.value("distributed.strategy") != "deepspeed", "DeepSpeed is not used"),
    (("distributed.fsdp",), lambda d: d.value("distributed.strategy") != "fsdp", "FSDP is not used"),
    (
        ("evaluation.judge.inputPrice", "evaluation.judge.outputPrice", "evaluation.judge.embedding"),
        lambda d: not d.has_value("evaluation.judge.model"),
        "evaluation.judge.model is not set",
    ),
    (("output.layout",), lambda d: not d.has_value("output.dir"), "output.dir is not set"),
)


def remove_options_without_effect(draft: JobDraft) -> None:
    """Apply the table of rules in order."""
    if draft.value("output.hub.push") is False:
        draft.values.pop("output.hub.push", None)
    for prefixes, has_no_effect, reason in RULES:
        if has_no_effect(draft):
            for prefix in prefixes:
                draft.remove(prefix, reason)
