"""Rules for vision-language models (`model.modality: visionLanguage`)."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    benchmarks_after_training,
    is_vision_language,
    method_type_of,
    metrics_after_training,
    prompts_to_compare,
    trainer_type_of,
    uses_loftq,
    value_or_default,
    writes_predictions,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import LoraBias, LoraInit, MethodType, StrategyType, TrainerType
from finetune_api.spec.method import Vision

VISION_METHODS = (MethodType.LORA, MethodType.QLORA, MethodType.DORA, MethodType.FULL)
"""Methods that support vision-language models."""
VISION_TRAINERS = (TrainerType.SFT, TrainerType.DPO)
"""Objectives that support rows with images."""


@rule(
    "VisionPacking",
    cel="!(has(self.model.modality) && self.model.modality == 'visionLanguage') || !(has(self.dataset) && has(self.dataset.packing) && self.dataset.packing)",
    message="dataset.packing cannot be combined with model.modality visionLanguage: write packing: false",
)
def check_vision_packing(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if is_vision_language(spec) and spec.dataset.packing:
        yield (
            "dataset.packing",
            "true, but rows with images cannot be packed: the positions and the attention of image tokens depend on the row",
            "write `packing: false`",
        )


@rule("VisionUnsupported")
def check_vision_support(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if not is_vision_language(spec):
        return
    method, trainer, strategy = method_type_of(spec), trainer_type_of(spec), spec.distributed.strategy
    suffix = "with model.modality visionLanguage"
    if method not in VISION_METHODS:
        yield "method.type", f"{method} is not supported {suffix}", f"write one of {', '.join(VISION_METHODS)}"
    if trainer not in VISION_TRAINERS:
        yield "trainer.type", f"{trainer} is not supported {suffix}", f"write one of {', '.join(VISION_TRAINERS)}"
    if strategy in (StrategyType.FSDP, StrategyType.DEEPSPEED):
        yield (
            "distributed.strategy",
            f"{strategy} is not supported {suffix}: a rank whose rows have no images skips the vision layers, and the other ranks would wait for it",
            "write `strategy: ddp`",
        )
    for path, value, hint in _find_unsupported_options(spec):
        yield path, f"{value} is not supported {suffix}", hint


def _find_unsupported_options(spec: FineTuneJobSpec) -> Iterator[tuple[str, str, str]]:
    """Yield (path, value, hint) for each option that vision-language models do not support."""
    lora = spec.method.lora
    if uses_loftq(spec) or (lora is not None and lora.init not in (None, LoraInit.DEFAULT, LoraInit.GAUSSIAN)):
        yield "method.lora.init", "loftq" if uses_loftq(spec) else str(lora and lora.init), "remove init"
    if lora is not None and lora.bias not in (None, LoraBias.NONE):
        yield "method.lora.bias", str(lora.bias), "remove bias, because this option would also train biases of frozen layers"
    if spec.model.new_tokens:
        yield "model.newTokens", "a larger vocabulary", "remove newTokens"
    if spec.dataset.use_chat_template is False:
        yield "dataset.useChatTemplate", "false", "remove useChatTemplate, because the chat template writes the placeholders of the images"
    if metrics_after_training(spec):
        yield "evaluation.metrics", "an evaluation that generates answers", "remove metrics; the job still measures the loss and the token accuracy on validation and test rows"
    if benchmarks_after_training(spec):
        yield "evaluation.benchmarks", "a benchmark", "remove benchmarks"
    if prompts_to_compare(spec) is not None:
        yield "evaluation.comparison", "a comparison of answers", "remove comparison"
    if spec.output.serving:
        yield "output.serving", "a manifest for a server", "remove serving, and write the manifest for your server yourself"
    if writes_predictions(spec):
        yield "phases.infer", "true", "write `infer: false`"


@rule("VisionOptionWithoutEffect")
def check_vision_options(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if not is_vision_language(spec):
        column_groups = [("dataset.columns", spec.dataset.columns)]
        column_groups += [(f"dataset.mixture[{i}].columns", item.columns) for i, item in enumerate(spec.dataset.mixture or [])]
        image_column_paths = [f"{path}.images" for path, columns in column_groups if columns is not None and columns.images is not None]
        for path in ["dataset.images"] * (spec.dataset.images is not None) + image_column_paths:
            yield path, f"{path} has no effect without `model.modality: visionLanguage`", f"remove {path}, or write `model: {{modality: visionLanguage}}`"
        return
    vision = spec.method.vision or Vision()
    if not value_or_default(vision, "vision_layers") and not value_or_default(vision, "language_layers"):
        yield "method.vision.languageLayers", "false, but visionLayers is false, too, so the job would train nothing", "write `visionLayers: true`, or remove languageLayers"
    if method_type_of(spec) is not MethodType.FULL and vision.attention_modules is False and vision.mlp_modules is False:
        yield (
            "method.vision.mlpModules",
            "false, but attentionModules is false, too, so no module would have an adapter",
            "remove mlpModules or attentionModules",
        )
