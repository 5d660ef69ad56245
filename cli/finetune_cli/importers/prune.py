"""Options that would have no effect are taken out, with a warning if the user wrote them.

The other tools accept any option in any combination; a FineTuneJob refuses what it would ignore. Files that name all options
of their tool, as most do, must still import.
"""

from __future__ import annotations

from collections.abc import Callable

from finetune_api.rules import LORA_METHODS
from finetune_api.spec.enums import Tracker

from finetune_cli.importers.material import Draft

LORA = tuple(str(method) for method in LORA_METHODS)
OF_THE_ADAPTER = (
    "rank", "alpha", "dropout", "targetModules", "bias", "taskType", "rankStabilized", "useDora", "loftq", "init", "modulesToSave",
)  # fmt: skip


def _method(draft: Draft) -> str:
    return str(draft.value("method.type", "lora"))


def _tracked(tracker: Tracker) -> Callable[[Draft], bool]:
    return lambda draft: str(tracker) not in (draft.value("tracking.reportTo") or [])


def _four_bits(draft: Draft) -> bool:
    return _method(draft) == "qlora" or draft.value("model.quantization.bits") == 4


RULES: tuple[tuple[tuple[str, ...], Callable[[Draft], bool], str], ...] = (
    (("method.lora",), lambda d: _method(d) not in LORA, "the method is not one with low-rank adapters"),
    (
        tuple(f"method.lora.{name}" for name in OF_THE_ADAPTER),
        lambda d: _method(d) == "adapter",
        "the adapter that is continued has its own",
    ),
    (("method.spectrum",), lambda d: _method(d) != "spectrum", "the method is not spectrum"),
    (
        ("method.promptLength",),
        lambda d: _method(d) not in ("prefixTuning", "promptTuning"),
        "the method has no virtual tokens",
    ),
    (
        ("method.spectrum.snrThreshold", "method.spectrum.metric"),
        lambda d: d.has("method.spectrum.layers"),
        "the layers are named by hand, so nothing is ranked",
    ),
    (
        ("model.quantization.type", "model.quantization.computeDtype", "model.quantization.doubleQuant"),
        lambda d: not _four_bits(d),
        "the base is not loaded in 4 bit",
    ),
    (("trainer.maxCompletionLength",), lambda d: d.value("trainer.type", "sft") == "sft", "sft generates nothing"),
    (
        ("dataset.responseOnly.questionMarker", "dataset.responseOnly.answerMarker"),
        lambda d: d.value("dataset.responseOnly.enabled") is False,
        "the loss is not limited to answers",
    ),
    (("dataset.template",), lambda d: d.value("dataset.format") != "custom", "dataset.format is not custom"),
    (("dataset.mcq",), lambda d: d.value("dataset.format") != "mcq", "dataset.format is not mcq"),
    (
        ("checkpoint.steps",),
        lambda d: d.value("checkpoint.strategy", "steps") != "steps",
        "checkpoints are not made every so many steps",
    ),
    (
        ("evaluation.steps",),
        lambda d: d.value("evaluation.strategy", "steps") != "steps",
        "evaluation does not happen every so many steps",
    ),
    (("output.hub",), lambda d: not d.value("output.hub.push"), "nothing is pushed to a hub"),
    (("tracking.mlflow",), _tracked(Tracker.MLFLOW), "the tracker is not mlflow"),
    (("tracking.wandb",), _tracked(Tracker.WANDB), "the tracker is not wandb"),
    (("tracking.mongodb",), _tracked(Tracker.MONGODB), "the tracker is not mongodb"),
    (("distributed.deepspeed",), lambda d: d.value("distributed.strategy") != "deepspeed", "DeepSpeed is not used"),
    (("distributed.fsdp",), lambda d: d.value("distributed.strategy") != "fsdp", "FSDP is not used"),
    (
        ("evaluation.judge.inputPrice", "evaluation.judge.outputPrice", "evaluation.judge.embedding"),
        lambda d: not d.has("evaluation.judge.model"),
        "no judge is named",
    ),
    (("output.layout",), lambda d: not d.has("output.dir"), "no output folder is named"),
)


def prune(draft: Draft) -> None:
    """Apply the table; the order matters only within one group."""
    if draft.value("output.hub.push") is False:
        draft.values.pop("output.hub.push", None)
    for prefixes, has_no_effect, why in RULES:
        if has_no_effect(draft):
            for prefix in prefixes:
                draft.drop(prefix, why)
