"""Rules for methods, their options, and the base model that they train."""

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
    Dtype,
    GradientCheckpointing,
    LoraBias,
    LoraInit,
    MethodType,
    MixedPrecision,
    Strategy,
    TrainerType,
)


@rule(
    "QloraNeedsFourBits",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'qlora') || !has(self.model.quantization) || !has(self.model.quantization.bits) || self.model.quantization.bits == 4",
    message="method.type qlora means 4 bit: remove model.quantization.bits or write 4; for 8 bit write method.type lora",
)
def qlora_bits(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    bits = given_bits(spec)
    if method_type_of(spec) is MethodType.QLORA and bits not in (None, 4):
        yield (
            "model.quantization.bits",
            f"{bits}, but method qlora means 4 bit",
            "remove bits, or write `method: {type: lora}` to train adapters on an 8-bit base",
        )


@rule(
    "FullNeedsWholeWeights",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'full') || !has(self.model.quantization) || !has(self.model.quantization.bits)",
    message="method.type full trains all weights, and quantised weights cannot be trained: remove model.quantization, or write method.type qlora",
)
def full_bits(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    bits = given_bits(spec)
    if method_type_of(spec) is MethodType.FULL and bits:
        yield (
            "model.quantization.bits",
            f"{bits}, but method full trains all weights and quantised weights cannot be trained",
            "remove model.quantization, or write `method: {type: qlora}`",
        )
    if method_type_of(spec) is MethodType.SPECTRUM and bits == 8:
        yield (
            "model.quantization.bits",
            "8, but spectrum trains its modules in 16 bit on a plain or a 4-bit base",
            "remove bits or write 4",
        )


@rule("QuantizationWithoutBits")
def quantization_without_bits(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    quantization = spec.model.quantization
    if quantization is None or method_type_of(spec) is MethodType.QLORA:
        return
    given = [name for name in ("type", "compute_dtype", "double_quant") if getattr(quantization, name) is not None]
    if given and quantization.bits is None:
        yield (
            "model.quantization.bits",
            "without bits nothing is quantised, and the other fields of model.quantization have no effect",
            "write `bits: 4`, or remove model.quantization",
        )
    elif quantization.bits == 8 and given:
        wire = ", ".join(type(quantization).model_fields[name].alias or name for name in given)
        yield "model.quantization", f"{wire} have an effect only with 4 bits, and bits is 8", f"remove {wire}, or write `bits: 4`"


@rule(
    "AdapterSourceMissing",
    cel="!(has(self.method) && has(self.method.type) && self.method.type == 'adapter') || (has(self.method.adapter) && has(self.method.adapter.source))",
    message="method.type adapter continues an existing adapter: write method.adapter.source",
)
def adapter_source(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    source = spec.method.adapter.source if spec.method.adapter else None
    if method_type_of(spec) is MethodType.ADAPTER and not source:
        yield (
            "method.adapter.source",
            "method adapter continues an existing adapter, and none is given",
            "write for example `adapter: {source: s3://models/my-adapter}`",
        )
    if method_type_of(spec) is not MethodType.ADAPTER and spec.method.adapter is not None:
        yield (
            "method.adapter",
            f"it is only read with method adapter, and the method is {method_type_of(spec)}",
            "remove it, or write `type: adapter`",
        )


@rule("OptionOfAnotherMethod")
def options_of_another_method(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    method = method_type_of(spec)
    if spec.method.lora is not None and method not in LORA_METHODS:
        yield (
            "method.lora",
            f"it is only read with methods lora, qlora, dora and adapter, and the method is {method}",
            "remove it, or change method.type",
        )
    if spec.method.spectrum is not None and method is not MethodType.SPECTRUM:
        yield (
            "method.spectrum",
            f"it is only read with method spectrum, and the method is {method}",
            "remove it, or write `type: spectrum`",
        )
    if spec.method.prompt_length is not None and method not in PROMPT_METHODS:
        yield (
            "method.promptLength",
            f"it is only read with prefixTuning and promptTuning, and the method is {method}",
            "remove it",
        )
    if spec.method.vision is not None and spec.model.modality != "visionLanguage":
        yield "method.vision", "it is only read with `model.modality: visionLanguage`", "remove it, or set the modality"
    if method is MethodType.DORA and spec.method.lora is not None and spec.method.lora.use_dora is False:
        yield "method.lora.useDora", "false, but the method is dora", "remove it, or write `type: lora`"
    if method is MethodType.ADAPTER and spec.method.lora is not None:
        given = [name for name in type(spec.method.lora).model_fields if getattr(spec.method.lora, name) is not None]
        for name in given:
            if name != "plus_ratio":
                yield (
                    f"method.lora.{type(spec.method.lora).model_fields[name].alias or name}",
                    "the existing adapter defines it; with method adapter only plusRatio is read",
                    "remove it, or write `type: lora` for a new adapter",
                )


@rule(
    "LoraOnHead",
    cel="!has(self.method) || !has(self.method.lora) || !has(self.method.lora.targetModules) || !self.method.lora.targetModules.exists(m, m == 'lm_head' || m == 'embed_out')",
    message="method.lora.targetModules must not name the head (lm_head): put it into method.lora.modulesToSave",
)
def lora_on_head(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    for module in (spec.method.lora and spec.method.lora.target_modules) or []:
        if module in OUTPUT_HEADS:
            yield (
                "method.lora.targetModules",
                f"{module!r} is the output head, whose low-rank update is not saved and merged reliably",
                f"remove it; to train the head write `modulesToSave: [{module}]`",
            )


@rule("LoraInitialisation")
def lora_initialisation(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    lora = spec.method.lora
    if lora is None:
        return
    if lora.loftq is not None and lora.init not in (None, LoraInit.LOFTQ):
        yield (
            "method.lora.init",
            f"{lora.init}, but method.lora.loftq is given, which implies `init: loftq`",
            "remove one of the two",
        )
    bits = given_bits(spec)
    conflicts = list(_incompatible_with_changed_base(spec)) if lora.init in INITS_CHANGING_BASE else []
    if conflicts:
        yield (
            "method.lora.init",
            f"{lora.init} moves a part of the base into the adapter, and the final adapter is converted back for the original base; "
            f"the conversion does not support {' and '.join(conflicts)}",
            "remove init, or the conflicting options",
        )
    if lora.init is LoraInit.EVA and spec.dataset.packing:
        yield (
            "dataset.packing",
            "true, but `method.lora.init: eva` reads rows one by one",
            "write `packing: false`, or another init",
        )
    if lora.init is LoraInit.EVA and trainer_type_of(spec) is not TrainerType.SFT:
        yield (
            "method.lora.init",
            f"eva reads the rows of sft, and the objective is {trainer_type_of(spec)}",
            "remove it",
        )
    if uses_loftq(spec):
        if bits == 8:
            yield (
                "model.quantization.bits",
                "8, but LoftQ corrects the error of a 4-bit base",
                "remove model.quantization: the base is then quantised to 4 bits",
            )
        if lora.use_dora or method_type_of(spec) is MethodType.DORA:
            yield (
                "method.lora.init",
                "loftq, but DoRA computes its directions from the base before LoftQ initialises the adapter",
                "write `method: {type: lora}` without useDora, or remove init",
            )


def _incompatible_with_changed_base(spec: FineTuneJobSpec) -> Iterator[str]:
    """Yield the options that conflict with an initialisation that moves a part of the base into the adapter.

    The final adapter is the difference of two low-rank updates. It cannot contain other trained weights, it needs unquantised
    weights and the plain LoRA scale, and a second adapter with the same initialisation would remove the same part again.
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
        yield "trainer.type reward, which trains a head"
    if keeps_reference_adapter(spec):
        yield f"trainer.type {objective}, which keeps a frozen copy of the initial adapter as the reference"


def keeps_reference_adapter(spec: FineTuneJobSpec) -> bool:
    """Whether the objective needs the model before training as a reference. With adapters, the reference is a second, frozen adapter."""
    match trainer_type_of(spec):
        case TrainerType.DPO | TrainerType.KTO:
            return spec.trainer.dpo is None or spec.trainer.dpo.reference_model is None
        case TrainerType.GRPO:
            return spec.trainer.grpo is not None and bool(spec.trainer.grpo.beta)
        case _:
            return False


@rule("BiasBesideReference")
def bias_beside_reference(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    bias = spec.method.lora.bias if spec.method.lora else None
    if bias not in (None, LoraBias.NONE) and keeps_reference_adapter(spec):
        yield (
            "method.lora.bias",
            f"{bias}, but {trainer_type_of(spec)} keeps a frozen copy of the initial adapter as the reference, and both would share the biases",
            "remove it",
        )


@rule("NewTokensUntrained")
def new_tokens(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    """The method must train the embeddings of new tokens, and the strategy must allow adding rows to the embeddings."""
    tokens, method = spec.model.new_tokens or [], method_type_of(spec)
    if not tokens:
        return
    path = "model.newTokens"
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        yield path, f"{twice} is named twice", "name each token once"
    if method in (MethodType.IA3, *PROMPT_METHODS):
        yield (
            path,
            f"method {method} trains no embeddings, so the embeddings of new tokens would stay untrained",
            "write method lora or full",
        )
    if method is MethodType.SPECTRUM and spec.model.quantization and spec.model.quantization.bits:
        yield (
            path,
            "spectrum on a quantised base freezes the embeddings, so the embeddings of new tokens would stay untrained",
            "remove model.quantization, or write method qlora",
        )
    strategy, deepspeed = spec.distributed.strategy, spec.distributed.deepspeed
    if strategy is Strategy.FSDP and method in LORA_METHODS:
        yield (
            path,
            "an adapter trains single rows of the embeddings, which FSDP cannot shard",
            "write `distributed: {strategy: ddp}`, or method full",
        )
    if strategy is Strategy.DEEPSPEED and deepspeed and deepspeed.zero_stage == 3:
        yield (
            path,
            "the embeddings must be enlarged, and with ZeRO stage 3 no rank holds the whole embeddings",
            "write zeroStage 2, or fsdp with method full",
        )


@rule("HalfWeights")
def half_weights(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    """Half-precision weights cannot be trained with loss scaling.

    DeepSpeed is exempt, because it keeps a 32-bit copy of the weights. Spectrum on a quantised base is exempt, because it trains 32-bit
    weights there.
    """
    trains_weights = method_type_of(spec) is MethodType.FULL or (
        method_type_of(spec) is MethodType.SPECTRUM and not given_bits(spec)
    )
    is_half_precision = spec.model.dtype is Dtype.FLOAT16 and spec.training.mixed_precision is MixedPrecision.FP16
    if trains_weights and is_half_precision and spec.distributed.strategy is not Strategy.DEEPSPEED:
        yield (
            "model.dtype",
            f"float16, but method {method_type_of(spec)} trains these weights, and the loss scaling of mixedPrecision fp16 needs them in 32 bits",
            "remove it, or write `mixedPrecision: bf16`",
        )


@rule("SpectrumLayers")
def spectrum_layers(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    spectrum = spec.method.spectrum
    if spectrum is None or spectrum.layers is None:
        return
    twice = sorted({layer for layer in spectrum.layers if spectrum.layers.count(layer) > 1})
    if twice:
        yield "method.spectrum.layers", f"{', '.join(map(str, twice))} is named more than once", "name each layer once"
    for name in ("snr_threshold", "metric"):
        if getattr(spectrum, name) is not None:
            wire = type(spectrum).model_fields[name].alias or name
            yield (
                f"method.spectrum.{wire}",
                "it only has an effect on the scan of the layers, and with `layers` there is no scan",
                "remove one of the two",
            )


@rule("PromptTuning")
def prompt_tuning(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    method = method_type_of(spec)
    checkpointing = spec.training.gradient_checkpointing
    if method is MethodType.PREFIX_TUNING and checkpointing not in (None, GradientCheckpointing.DISABLED):
        yield (
            "training.gradientCheckpointing",
            f"{checkpointing}, but prefix tuning passes its prefix as a key-value cache, which recomputation discards",
            "write `gradientCheckpointing: disabled`",
        )
    if method in PROMPT_METHODS and spec.dataset.packing:
        yield (
            "dataset.packing",
            f"true, but {method} inserts its virtual tokens before the first row of a sequence only",
            "write `packing: false`",
        )
