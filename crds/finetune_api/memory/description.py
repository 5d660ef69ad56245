"""Describes a job's training step for the replay: weights, batch, optimizer and kernels that follow from its spec."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_api.errors import ConfigError
from finetune_api.memory import optimizers
from finetune_api.memory.architecture import DENSE_TYPES, EAGER_TYPES, ModelShape
from finetune_api.memory.layers import Batch, Kernels, TrainedWeights, linear_sizes
from finetune_api.memory.optimizers import Optimizer
from finetune_api.memory.replay import Step
from finetune_api.rules import (
    PROMPT_METHODS,
    base_bits,
    gpus_per_node,
    method_type_of,
    trainer_type_of,
    trains_base_weights,
    value_or_default,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    AttentionImplementation,
    Device,
    FsdpSharding,
    GradientCheckpointing,
    MethodType,
    MixedPrecision,
    StrategyType,
    TrainerBackend,
    TrainerType,
    WeightDtype,
)

PLANNED_METHODS = (
    MethodType.FULL, MethodType.LORA, MethodType.QLORA, MethodType.DORA, MethodType.IA3, MethodType.PROMPT_TUNING, MethodType.PREFIX_TUNING,
)  # fmt: skip
SCALED_LAYERS, INPUT_SCALED_LAYERS = frozenset({"k_proj", "v_proj", "down_proj"}), frozenset({"down_proj"})
"""Linear layers to which the trainer gives IA3's scales."""
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch_fused": optimizers.ADAMW_FUSED, "adamw_torch": optimizers.ADAMW_FOREACH, "adamw_hf": optimizers.ADAMW_FOREACH,
    "adamw_8bit": optimizers.ADAMW_8BIT, "adamw_bnb_8bit": optimizers.ADAMW_8BIT, "paged_adamw_8bit": optimizers.PAGED_ADAMW_8BIT,
    "paged_adamw_32bit": optimizers.PAGED_ADAMW, "paged_adamw": optimizers.PAGED_ADAMW, "adafactor": optimizers.ADAFACTOR, "sgd": optimizers.SGD,
    "lion_32bit": optimizers.LION, "lion_8bit": optimizers.LION_8BIT, "paged_lion_32bit": optimizers.PAGED_ADAMW, "paged_lion_8bit": optimizers.PAGED_ADAMW,
    "rmsprop": optimizers.ONE_MOMENT_FOREACH, "adagrad": optimizers.ONE_MOMENT_FOREACH, "rmsprop_bnb": optimizers.ONE_MOMENT,
    "rmsprop_bnb_32bit": optimizers.ONE_MOMENT, "rmsprop_bnb_8bit": optimizers.ONE_MOMENT_8BIT, "ademamix": optimizers.ADEMAMIX,
    "ademamix_8bit": optimizers.ADEMAMIX_8BIT, "paged_ademamix_32bit": optimizers.PAGED_ADAMW, "paged_ademamix_8bit": optimizers.PAGED_ADAMW,
}  # fmt: skip
"""Optimizers of the plan, by the names in `training.optimizer`."""
UNCHECKED_OPTIMIZERS = ("rmsprop", "adagrad", "ademamix")
"""Beginnings of the names of optimizers whose plans were not compared with measured peaks."""
DOUBLE_QUANTIZED_SCALE, QUANTIZED_SCALE = 1 / 64 + 4 / 64 / 256, 4 / 64
"""Bytes of the scales for each 4-bit value, with and without quantised scales."""


@dataclass(frozen=True)
class Facts:
    """What a spec does not say. None: not known yet, so the plan makes an assumption."""

    longest_tokens: int | None = None
    """Tokens of the longest row."""
    attention: str | None = None
    """The attention implementation in use."""
    uses_liger: bool | None = None
    recomputed_layers: int | None = None
    """How many layers recompute their activations."""


@dataclass(frozen=True)
class Description:
    """A training step, and the assumptions behind it."""

    step: Step
    assumptions: tuple[str, ...]
    """Sentences about what the plan does not know."""
    is_checked: bool
    """Whether plans of such runs were compared with measured peaks."""


def describe_step(spec: FineTuneJobSpec, shape: ModelShape, facts: Facts | None = None) -> Description:
    """Describe the training step of a resolved spec.

    Errors: ConfigError ObjectiveNotPlanned, MethodNotPlanned, OptimizerNotPlanned, TargetNotPlanned.
    """
    facts = facts or Facts()
    _require_planned(spec)
    is_gpu = _uses_gpu(spec)
    weights = _weights(spec, shape, is_gpu)
    attention = facts.attention or _attention(spec, shape, is_gpu)
    liger = facts.uses_liger
    if liger is None:
        liger = is_gpu and spec.model.liger_kernels is not False and shape.model_type in DENSE_TYPES
    batch, assumptions = _batch(spec, facts, attention, weights.prompt_tokens)
    step = Step(
        shape, weights, batch, _optimizer(spec), Kernels(is_gpu=is_gpu, uses_liger=liger, attention=attention), _autocast_bytes(spec, is_gpu),
        quantized_compute_bytes=2 if is_gpu else 4, accumulation=spec.training.gradient_accumulation_steps or 4,
        recomputed_layers=_recomputed_layers(spec, shape) if facts.recomputed_layers is None else facts.recomputed_layers,
        offloads_layer_inputs=spec.training.gradient_checkpointing is GradientCheckpointing.UNSLOTH,
    )  # fmt: skip
    step, is_sharded = _shard(spec, step)
    if not is_gpu:
        assumptions.append("the run has no GPU, so the plan is about host memory that torch allocates, without Python and libraries")
    if is_sharded:
        assumptions.append(
            f"memory of {spec.distributed.strategy} with {world_size(spec)} ranks is computed, and was not compared with measured peaks"
        )
    if spec.trainer.backend is TrainerBackend.UNSLOTH:
        assumptions.append("trainer.backend unsloth chooses an optimizer and a recomputation that need less memory, unless the spec names others")
    optimizer_name = str(value_or_default(spec.training, "optimizer")).removeprefix("paged_")
    if optimizer_name.startswith(UNCHECKED_OPTIMIZERS):
        assumptions.append(f"memory of training.optimizer {optimizer_name} is computed, and was not compared with measured peaks")
        return Description(step, tuple(assumptions), is_checked=False)
    return Description(step, tuple(assumptions), not is_sharded and shape.is_checked)


def _require_planned(spec: FineTuneJobSpec) -> None:
    method, objective = method_type_of(spec), trainer_type_of(spec)
    if objective is not TrainerType.SFT:
        raise ConfigError(
            "ObjectiveNotPlanned", f"trainer.type is {objective}, but the memory plan knows supervised fine-tuning only",
            hint="plan a job with `trainer: {type: sft}`; the job itself still records its measured peak",
        )  # fmt: skip
    if (spec.distributed.context_parallel_size or 1) > 1:
        raise ConfigError(
            "MethodNotPlanned", f"distributed.contextParallelSize is {spec.distributed.context_parallel_size}, but the memory plan does not know how much "
            "memory a part of a sequence needs",
            hint="plan the job without contextParallelSize, as an upper limit; the job itself still records its measured peak",
        )  # fmt: skip
    lora = spec.method.lora
    if method not in PLANNED_METHODS:
        raise ConfigError(
            "MethodNotPlanned", f"method.type is {method}, but the memory plan knows {', '.join(PLANNED_METHODS)} only",
            hint="plan one of these methods; the job itself still records its measured peak",
        )  # fmt: skip
    if lora is not None and (lora.target_parameters or lora.modules_to_save):
        field = "targetParameters" if lora.target_parameters else "modulesToSave"
        raise ConfigError(
            "MethodNotPlanned", f"method.lora.{field} is set, but the memory plan does not know how much memory it needs",
            hint=f"plan the job without {field}, as a lower limit",
        )  # fmt: skip


def _uses_gpu(spec: FineTuneJobSpec) -> bool:
    return spec.training.device is Device.CUDA or (spec.training.device is not Device.CPU and gpus_per_node(spec) > 0)


def _autocast_bytes(spec: FineTuneJobSpec, is_gpu: bool) -> int | None:
    precision = spec.training.mixed_precision or MixedPrecision.AUTO
    return 2 if precision in (MixedPrecision.BF16, MixedPrecision.FP16) or (precision is MixedPrecision.AUTO and is_gpu) else None


def _weights(spec: FineTuneJobSpec, shape: ModelShape, is_gpu: bool) -> TrainedWeights:
    """Precision and adapters, as `finetune_trainer.hardware` and `finetune_trainer.method` choose them."""
    is_full, lora, bits = trains_base_weights(spec), spec.method.lora, base_bits(spec)
    given = {WeightDtype.FLOAT32: 4, WeightDtype.FLOAT16: 2, WeightDtype.BFLOAT16: 2}.get(spec.model.dtype or WeightDtype.AUTO)
    autocast = _autocast_bytes(spec, is_gpu)
    other = given or (4 if not is_gpu or is_full else 2 if autocast else shape.stored_bytes)
    if is_full:
        return TrainedWeights(other, other, True)
    quantization = spec.model.quantization
    scales = QUANTIZED_SCALE if quantization is not None and quantization.double_quant is False else DOUBLE_QUANTIZED_SCALE
    base = {4: 0.5 + scales, 8: 1.0}.get(bits or 0, other)
    dropout, is_dora = bool(lora and lora.dropout), method_type_of(spec) is MethodType.DORA or bool(lora and lora.use_dora)
    method, length = method_type_of(spec), int(value_or_default(spec.method, "prompt_length"))
    if method is MethodType.IA3:
        return TrainedWeights(base, other, False, scaled=SCALED_LAYERS, input_scaled=INPUT_SCALED_LAYERS)
    if method in PROMPT_METHODS:
        prompt, prefix = (length, 0) if method is MethodType.PROMPT_TUNING else (0, length)
        return TrainedWeights(base, other, False, prompt_tokens=prompt, prefix_tokens=prefix)
    return TrainedWeights(
        base, other, False, rank=(lora.rank if lora else None) or 16, targets=_targets(spec, shape), dropout=dropout, is_dora=is_dora,
        casts_inputs=autocast is None or is_dora,
    )  # fmt: skip


def _targets(spec: FineTuneJobSpec, shape: ModelShape) -> frozenset[str]:
    """The linear layers with an adapter. Errors: ConfigError TargetNotPlanned."""
    known = {name for layer in range(shape.layers) for name in linear_sizes(shape, layer)}
    wanted = (spec.method.lora.target_modules if spec.method.lora else None) or ["all-linear"]
    if wanted == ["all-linear"]:
        return frozenset(known)
    unknown = sorted(set(wanted) - known)
    if unknown:
        raise ConfigError(
            "TargetNotPlanned", f"method.lora.targetModules names {', '.join(unknown)}, but a model of type {shape.model_type} has the layers "
            f"{', '.join(sorted(known))}",
            hint="name some of these layers, or remove targetModules",
        )  # fmt: skip
    return frozenset(wanted)


def _optimizer(spec: FineTuneJobSpec) -> Optimizer:
    name = str(value_or_default(spec.training, "optimizer"))
    if name not in OPTIMIZERS:
        raise ConfigError(
            "OptimizerNotPlanned", f"training.optimizer is {name}, but the memory plan knows {', '.join(OPTIMIZERS)} only",
            hint="plan with adamw_torch_fused, which keeps two numbers for each trained parameter; optimizers of other packages may keep more",
        )  # fmt: skip
    return OPTIMIZERS[name]


def _attention(spec: FineTuneJobSpec, shape: ModelShape, is_gpu: bool) -> str:
    requested = spec.model.attention or AttentionImplementation.AUTO
    if requested is AttentionImplementation.EAGER or shape.model_type in EAGER_TYPES:
        return "eager"
    is_padded = requested is AttentionImplementation.SDPA or method_type_of(spec) in PROMPT_METHODS
    return "varlen" if is_gpu and not is_padded else "sdpa"


def _batch(spec: FineTuneJobSpec, facts: Facts, attention: str, prompt_tokens: int) -> tuple[Batch, list[str]]:
    rows, limit = spec.training.batch_size_per_device or 4, spec.dataset.max_sequence_length or 2048
    is_packed, assumptions = spec.dataset.packing is True, []
    tokens = limit if is_packed else min(limit, facts.longest_tokens or limit)
    if not is_packed and facts.longest_tokens is None:
        assumptions.append(f"each row of the largest micro-batch has {limit} tokens (dataset.maxSequenceLength); shorter rows need less")
    tokens += prompt_tokens
    if attention == "varlen":  # all rows are concatenated
        return Batch(1, rows * tokens), assumptions
    return Batch(rows, tokens, has_mask=is_packed or rows > 1), assumptions


def _recomputed_layers(spec: FineTuneJobSpec, shape: ModelShape) -> int:
    if (spec.training.gradient_checkpointing or GradientCheckpointing.ENABLED) is GradientCheckpointing.DISABLED:
        return 0
    return shape.layers // (spec.training.checkpoint_every_n_layers or 1)


def _shard(spec: FineTuneJobSpec, step: Step) -> tuple[Step, bool]:
    """Apply the distributed strategy. Returns the step of one rank, and whether something is sharded."""
    ranks, strategy = world_size(spec), spec.distributed.strategy
    if ranks == 1 and strategy is not StrategyType.DEEPSPEED:
        return step, False
    if strategy is StrategyType.FSDP:
        sharding = (spec.distributed.fsdp.sharding if spec.distributed.fsdp else None) or FsdpSharding.FULL_SHARD
        if sharding is not FsdpSharding.NO_SHARD:
            return _sharded(step, ranks, shards_weights=True), True
    if strategy is StrategyType.DEEPSPEED:
        deepspeed = spec.distributed.deepspeed
        stage = 2 if deepspeed is None or deepspeed.zero_stage is None else deepspeed.zero_stage
        sharded = replace(step, optimizer_shards=ranks if stage >= 1 else 1)
        sharded = _sharded(sharded, ranks, shards_weights=stage == 3) if stage >= 2 else replace(sharded, has_gradient_buckets=True)
        offloads = deepspeed is not None and deepspeed.offload_optimizer is True
        return replace(sharded, optimizer=replace(step.optimizer, is_on_host=offloads or step.optimizer.is_on_host)), True
    return replace(step, has_gradient_buckets=True), False


def _sharded(step: Step, ranks: int, *, shards_weights: bool) -> Step:
    weights = replace(step.weights, weight_shards=ranks if shards_weights else 1, gradient_shards=ranks)
    return replace(step, weights=weights, optimizer_shards=ranks, gathers_weights=shards_weights)
