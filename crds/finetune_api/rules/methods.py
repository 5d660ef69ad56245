"""Rules for `spec.method`, and for the options of `spec.model` that depend on the method."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    INITS_CHANGING_BASE,
    LORA_METHODS,
    OUTPUT_HEADS,
    PROMPT_METHODS,
    given_bits,
    method_type_of,
    trainer_type_of,
    uses_loftq,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    GradientCheckpointing,
    LoraBias,
    LoraInit,
    MethodType,
    MixedPrecision,
    StrategyType,
    TrainerType,
    WeightDtype,
)


@rule(
    "QloraNeedsFourBits",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'qlora') || !has(self.model.quantization) || !has(self.model.quantization.bits) || self.model.quantization.bits == 4",
    message="method.type qlora requires 4 bits: remove model.quantization.bits or write 4; for 8 bits write method.type lora",
)
def check_qlora_bits(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    bits = given_bits(spec)
    if method_type_of(spec) is MethodType.QLORA and bits not in (None, 4):
        yield (
            "model.quantization.bits",
            f"{bits}, but method qlora requires 4 bits",
            "remove bits, or write `method: {type: lora}` to train an adapter on an 8-bit base model",
        )


@rule(
    "FullNeedsWholeWeights",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'full') || !has(self.model.quantization) || !has(self.model.quantization.bits)",
    message="method.type full cannot train quantised weights: remove model.quantization, or write method.type qlora",
)
def check_bits_of_trained_weights(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    bits = given_bits(spec)
    if method_type_of(spec) is MethodType.FULL and bits:
        yield (
            "model.quantization.bits",
            f"{bits}, but method full cannot train quantised weights",
            "remove model.quantization, or write `method: {type: qlora}`",
        )
    if method_type_of(spec) is MethodType.SPECTRUM and bits == 8:
        yield (
            "model.quantization.bits",
            "8, but method spectrum supports only 4-bit and unquantised base models",
            "remove bits, or write 4",
        )


@rule("QuantizationWithoutBits")
def check_quantization_without_bits(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    quantization = spec.model.quantization
    if quantization is None or method_type_of(spec) is MethodType.QLORA:
        return
    user_options = [name for name in ("type", "compute_dtype", "double_quant") if getattr(quantization, name) is not None]
    if user_options and quantization.bits is None:
        yield (
            "model.quantization.bits",
            "bits is missing, so the base model is not quantised and the other fields of model.quantization have no effect",
            "write `bits: 4`, or remove model.quantization",
        )
    elif quantization.bits == 8 and user_options:
        wire_names = ", ".join(type(quantization).model_fields[name].alias or name for name in user_options)
        yield "model.quantization", f"without effect, because bits is 8: {wire_names}", f"remove {wire_names}, or write `bits: 4`"


@rule(
    "AdapterSourceMissing",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'adapter') || (has(self.method.adapter) && has(self.method.adapter.source))",
    message="method.type adapter trains an existing adapter: write method.adapter.source",
)
def check_adapter_source(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    source = spec.method.adapter.source if spec.method.adapter else None
    if method_type_of(spec) is MethodType.ADAPTER and not source:
        yield (
            "method.adapter.source",
            "method adapter trains an existing adapter, but method.adapter.source is missing",
            "write for example `adapter: {source: s3://models/my-adapter}`",
        )
    if method_type_of(spec) is not MethodType.ADAPTER and spec.method.adapter is not None:
        yield (
            "method.adapter",
            f"method.adapter has no effect, because method.type is {method_type_of(spec)}",
            "remove method.adapter, or write `type: adapter`",
        )


@rule("OptionOfAnotherMethod")
def check_options_of_another_method(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    method = method_type_of(spec)
    if spec.method.lora is not None and method not in LORA_METHODS:
        yield (
            "method.lora",
            f"method.lora has no effect, because method.type is {method}",
            "remove method.lora, or write method.type lora, qlora, dora or adapter",
        )
    methods_with_own_group = set(MethodType) - {method, MethodType.LORA, MethodType.ADAPTER}  # `check_adapter_source` checks method.adapter
    for name, info in type(spec.method).model_fields.items():
        wire_name = info.alias or name
        if wire_name in methods_with_own_group and getattr(spec.method, name) is not None:
            yield (
                f"method.{wire_name}",
                f"method.{wire_name} has no effect, because method.type is {method}",
                f"remove method.{wire_name}, or write `type: {wire_name}`",
            )
    if spec.method.prompt_length is not None and method not in PROMPT_METHODS:
        yield (
            "method.promptLength",
            f"promptLength has no effect, because method.type is {method}",
            "remove promptLength, or write `type: prefixTuning` or `type: promptTuning`",
        )
    if spec.method.vision is not None and spec.model.modality != "visionLanguage":
        yield "method.vision", "method.vision has no effect without `model.modality: visionLanguage`", "remove method.vision, or write `model: {modality: visionLanguage}`"
    if method is MethodType.DORA and spec.method.lora is not None and spec.method.lora.use_dora is False:
        yield "method.lora.useDora", "false, but method.type is dora", "remove useDora, or write `type: lora`"
    if method is MethodType.ADAPTER and spec.method.lora is not None:
        user_options = [name for name in type(spec.method.lora).model_fields if getattr(spec.method.lora, name) is not None]
        for name in user_options:
            if name != "plus_ratio":
                wire_name = type(spec.method.lora).model_fields[name].alias or name
                yield (
                    f"method.lora.{wire_name}",
                    f"{wire_name} has no effect with method adapter, because the existing adapter defines this value",
                    f"remove {wire_name}, or write `type: lora` to train a new adapter",
                )


@rule(
    "LoraOnHead",
    cel="!has(self.method) || !has(self.method.lora) || !has(self.method.lora.targetModules) || !self.method.lora.targetModules.exists(m, m == 'lm_head' || m == 'embed_out')",
    message="method.lora.targetModules must not contain the output head (lm_head): write the head into method.lora.modulesToSave",
)
def check_lora_on_head(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for module in (spec.method.lora and spec.method.lora.target_modules) or []:
        if module in OUTPUT_HEADS:
            yield (
                "method.lora.targetModules",
                f"{module!r} is the output head, and a LoRA adapter of the head cannot be saved and merged reliably",
                f"remove {module}; to train the output head write `modulesToSave: [{module}]`",
            )


@rule("LoraTargetParameters")
def check_target_parameters(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    lora = spec.method.lora
    if lora is None or not lora.target_parameters:
        return
    for path, is_set, option_text in (
        ("method.lora.dropout", bool(lora.dropout), "dropout"),
        ("method.lora.useDora", lora.use_dora is True or method_type_of(spec) is MethodType.DORA, "DoRA"),
        ("method.lora.init", lora.init not in (None, LoraInit.DEFAULT) or uses_loftq(spec), f"the initialisation {lora.init}"),
    ):
        if is_set:
            yield (
                path,
                f"adapters of method.lora.targetParameters cannot have {option_text}",
                f"remove {path}, or remove targetParameters",
            )
    if spec.distributed.strategy in (StrategyType.FSDP, StrategyType.DEEPSPEED):
        yield (
            "method.lora.targetParameters",
            f"adapters of method.lora.targetParameters are not tested with the distributed strategy {spec.distributed.strategy}",
            "write `distributed: {strategy: ddp}`, or remove targetParameters",
        )


@rule("LoraInitialisation")
def check_lora_initialisation(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    lora = spec.method.lora
    if lora is None:
        return
    if lora.loftq is not None and lora.init not in (None, LoraInit.LOFTQ):
        yield (
            "method.lora.init",
            f"{lora.init}, but method.lora.loftq requires `init: loftq`",
            "remove init or loftq",
        )
    bits = given_bits(spec)
    conflicting_options = list(_find_conflicts_with_changed_base(spec)) if lora.init in INITS_CHANGING_BASE else []
    if conflicting_options:
        yield (
            "method.lora.init",
            f"{lora.init} moves a part of the base weights into the adapter, so the trainer converts the final adapter for the original base model; "
            f"this conversion does not support {' and '.join(conflicting_options)}",
            "remove init, or remove the unsupported options",
        )
    if lora.init is LoraInit.EVA and spec.dataset.packing:
        yield (
            "dataset.packing",
            "true, but `method.lora.init: eva` cannot read packed rows",
            "write `packing: false`, or another value of method.lora.init",
        )
    if lora.init is LoraInit.EVA and trainer_type_of(spec) is not TrainerType.SFT:
        yield (
            "method.lora.init",
            f"eva, but this initialisation supports only sft and trainer.type is {trainer_type_of(spec)}",
            "remove init",
        )
    if uses_loftq(spec):
        if bits == 8:
            yield (
                "model.quantization.bits",
                "8, but LoftQ supports only a 4-bit base model",
                "remove model.quantization, because LoftQ implies 4 bits",
            )
        if lora.use_dora or method_type_of(spec) is MethodType.DORA:
            yield (
                "method.lora.init",
                "loftq cannot be combined with DoRA, because the trainer initialises DoRA before LoftQ",
                "write `method: {type: lora}` without useDora, or remove init",
            )


def _find_conflicts_with_changed_base(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield each option that cannot be combined with an initialisation in `INITS_CHANGING_BASE`.

    The trainer stores the difference between the trained and the initial low-rank update as the final adapter. This difference exists only with unquantised
    weights, the plain LoRA scale, and no other trained weights. A second adapter with the same initialisation would subtract the same values from the base
    weights again.
    """
    lora, method, objective = spec.method.lora, method_type_of(spec), trainer_type_of(spec)
    assert lora is not None, "the caller has checked method.lora.init"
    if given_bits(spec):
        yield "model.quantization.bits"
    if method is not MethodType.LORA:
        yield f"method.type {method}"
    if lora.use_dora:
        yield "method.lora.useDora"
    if lora.rank_stabilized:
        yield "method.lora.rankStabilized"
    if lora.modules_to_save:
        yield "method.lora.modulesToSave"
    if lora.bias not in (None, LoraBias.NONE):
        yield f"method.lora.bias {lora.bias}"
    if spec.model.new_tokens:
        yield "model.newTokens"
    if objective is TrainerType.REWARD:
        yield "trainer.type reward (it trains a score head)"
    if keeps_reference_adapter(spec):
        yield f"trainer.type {objective} (its reference model is a frozen copy of the initial adapter)"


def keeps_reference_adapter(spec: FineTuneJobSpec) -> bool:
    """Whether the reference model of the objective is the untrained model. With adapters, the reference model is the base model with a second, frozen adapter."""
    match trainer_type_of(spec):
        case TrainerType.DPO | TrainerType.KTO:
            return spec.trainer.dpo is None or spec.trainer.dpo.reference_model is None
        case TrainerType.GRPO:
            return spec.trainer.grpo is not None and bool(spec.trainer.grpo.beta)
        case _:
            return False


@rule("BiasBesideReference")
def check_bias_with_reference_model(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    bias = spec.method.lora.bias if spec.method.lora else None
    if bias not in (None, LoraBias.NONE) and keeps_reference_adapter(spec):
        yield (
            "method.lora.bias",
            f"{bias}, but the reference model of {trainer_type_of(spec)} is a frozen copy of the initial adapter and would share the trained biases",
            "remove bias",
        )


@rule("NewTokensUntrained")
def check_new_tokens(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    """Require a method that trains the embeddings of new tokens, and a strategy that supports larger embeddings."""
    new_tokens, method = spec.model.new_tokens or [], method_type_of(spec)
    if not new_tokens:
        return
    path = "model.newTokens"
    duplicate_token = next((token for token in new_tokens if new_tokens.count(token) > 1), None)
    if duplicate_token is not None:
        yield path, f"the list contains {duplicate_token} twice", "write each token once"
    if method in (MethodType.IA3, *PROMPT_METHODS):
        yield (
            path,
            f"method {method} does not train the embeddings of new tokens",
            "write method lora or full",
        )
    if method is MethodType.SPECTRUM and spec.model.quantization and spec.model.quantization.bits:
        yield (
            path,
            "method spectrum on a quantised base model does not train the embeddings of new tokens",
            "remove model.quantization, or write method qlora",
        )
    strategy, deepspeed = spec.distributed.strategy, spec.distributed.deepspeed
    if strategy is StrategyType.FSDP and method in LORA_METHODS:
        yield (
            path,
            "an adapter trains only the embeddings of the new tokens, but FSDP cannot shard single rows of a weight",
            "write `distributed: {strategy: ddp}`, or method full",
        )
    if strategy is StrategyType.DEEPSPEED and deepspeed and deepspeed.zero_stage == 3:
        yield (
            path,
            "new tokens enlarge the embeddings, but with ZeRO stage 3 no rank has the whole embeddings",
            "write zeroStage 2, or write strategy fsdp and method full",
        )


@rule("HalfWeights")
def check_half_weights(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    """Refuse float16 weights together with loss scaling.

    DeepSpeed is accepted, because it keeps a 32-bit copy of the weights. Spectrum on a quantised base model is accepted, because the weights that spectrum
    trains have 32 bits.
    """
    trains_weights = method_type_of(spec) is MethodType.FULL or (
        method_type_of(spec) is MethodType.SPECTRUM and not given_bits(spec)
    )
    is_half_precision = spec.model.dtype is WeightDtype.FLOAT16 and spec.training.mixed_precision is MixedPrecision.FP16
    if trains_weights and is_half_precision and spec.distributed.strategy is not StrategyType.DEEPSPEED:
        yield (
            "model.dtype",
            f"float16, but method {method_type_of(spec)} with mixedPrecision fp16 needs 32-bit weights for loss scaling",
            "remove model.dtype, or write `mixedPrecision: bf16`",
        )


@rule("SpectrumLayers")
def check_spectrum_layers(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    spectrum = spec.method.spectrum
    if spectrum is None or spectrum.layers is None:
        return
    duplicate_layers = sorted({layer for layer in spectrum.layers if spectrum.layers.count(layer) > 1})
    if duplicate_layers:
        yield "method.spectrum.layers", f"the list contains {', '.join(map(str, duplicate_layers))} more than once", "write each layer once"
    for name in ("snr_threshold", "metric"):
        if getattr(spectrum, name) is not None:
            wire_name = type(spectrum).model_fields[name].alias or name
            yield (
                f"method.spectrum.{wire_name}",
                f"{wire_name} has no effect, because the trainer trains the given layers and does not scan all layers",
                f"remove {wire_name} or layers",
            )


@rule("PromptTuning")
def check_prompt_tuning(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    method = method_type_of(spec)
    checkpointing_mode = spec.training.gradient_checkpointing
    if method is MethodType.PREFIX_TUNING and checkpointing_mode not in (None, GradientCheckpointing.DISABLED):
        yield (
            "training.gradientCheckpointing",
            f"{checkpointing_mode}, but prefix tuning passes the prefix as a key-value cache, and recomputation discards this cache",
            "write `gradientCheckpointing: disabled`",
        )
    if method in PROMPT_METHODS and spec.dataset.packing:
        yield (
            "dataset.packing",
            f"true, but {method} inserts virtual tokens only before the first row of a packed sequence",
            "write `packing: false`",
        )
