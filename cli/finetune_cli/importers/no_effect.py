"""Removes fields that would have no effect, with a warning for each field that the user set.

The operator refuses a FineTuneJob with a field that would have no effect. Most files of other tools list every option. Without this step, the
operator would therefore refuse most imported jobs.
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


def _get_method(draft: JobDraft) -> str:
    return str(draft.value("method.type", "lora"))


def _make_untracked_check(tracker: Tracker) -> Callable[[JobDraft], bool]:
    return lambda draft: str(tracker) not in (draft.value("tracking.reportTo") or [])


def _is_4bit(draft: JobDraft) -> bool:
    return _get_method(draft) == "qlora" or draft.value("model.quantization.bits") == 4


NO_EFFECT_RULES: tuple[tuple[tuple[str, ...], Callable[[JobDraft], bool], str], ...] = (
    (("method.lora",), lambda draft: _get_method(draft) not in LORA_METHOD_NAMES, "the method has no low-rank adapters"),
    (
        tuple(f"method.lora.{name}" for name in ADAPTER_FIELDS),
        lambda draft: _get_method(draft) == "adapter",
        "the existing adapter defines this value",
    ),
    (("method.spectrum",), lambda draft: _get_method(draft) != "spectrum", "the method is not spectrum"),
    (
        ("method.promptLength",),
        lambda draft: _get_method(draft) not in ("prefixTuning", "promptTuning"),
        "the method uses no virtual tokens",
    ),
    (
        ("method.spectrum.snrThreshold", "method.spectrum.metric"),
        lambda draft: draft.has_value("method.spectrum.layers"),
        "the layers are listed explicitly, so they are not ranked",
    ),
    (
        ("model.quantization.type", "model.quantization.computeDtype", "model.quantization.doubleQuant"),
        lambda draft: not _is_4bit(draft),
        "the base model is not loaded in 4 bits",
    ),
    (
        ("trainer.maxCompletionLength",),
        lambda draft: draft.value("trainer.type", "sft") == "sft",
        "sft does not generate completions",
    ),
    (
        ("dataset.responseOnly.questionMarker", "dataset.responseOnly.answerMarker"),
        lambda draft: draft.value("dataset.responseOnly.enabled") is False,
        "the loss covers the whole sequence",
    ),
    (("dataset.template",), lambda draft: draft.value("dataset.format") != "custom", "dataset.format is not custom"),
    (("dataset.mcq",), lambda draft: draft.value("dataset.format") != "mcq", "dataset.format is not mcq"),
    (
        ("checkpoint.steps",),
        lambda draft: draft.value("checkpoint.strategy", "steps") != "steps",
        "checkpoint.strategy is not steps",
    ),
    (
        ("evaluation.steps",),
        lambda draft: draft.value("evaluation.strategy", "steps") != "steps",
        "evaluation.strategy is not steps",
    ),
    (("output.hub",), lambda draft: not draft.value("output.hub.push"), "output.hub.push is false"),
    (("tracking.mlflow",), _make_untracked_check(Tracker.MLFLOW), "mlflow is not in tracking.reportTo"),
    (("tracking.wandb",), _make_untracked_check(Tracker.WANDB), "wandb is not in tracking.reportTo"),
    (("tracking.mongodb",), _make_untracked_check(Tracker.MONGODB), "mongodb is not in tracking.reportTo"),
    (("distributed.deepspeed",), lambda draft: draft.value("distributed.strategy") != "deepspeed", "DeepSpeed is not used"),
    (("distributed.fsdp",), lambda draft: draft.value("distributed.strategy") != "fsdp", "FSDP is not used"),
    (
        ("evaluation.judge.inputPrice", "evaluation.judge.outputPrice", "evaluation.judge.embedding"),
        lambda draft: not draft.has_value("evaluation.judge.model"),
        "evaluation.judge.model is not set",
    ),
    (("output.layout",), lambda draft: not draft.has_value("output.dir"), "output.dir is not set"),
)
"""The rules for fields without effect.

Each rule has spec paths, a function that returns whether fields at these paths would have no effect, and the reason.
"""


def remove_options_without_effect(draft: JobDraft) -> None:
    """Apply `NO_EFFECT_RULES` in order, so that no field without effect is left in the draft."""
    if draft.value("output.hub.push") is False:
        draft.values.pop("output.hub.push", None)
    for prefixes, has_no_effect, reason in NO_EFFECT_RULES:
        if has_no_effect(draft):
            for prefix in prefixes:
                draft.remove(prefix, reason)
