"""Describes the training step of a job for the replay: its weights, batch, optimizer and kernels, derived from the spec."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune_api.errors import ConfigError
from finetune_api.memory import optimizers
from finetune_api.memory.architecture import DENSE_MODEL_TYPES, EAGER_ONLY_MODEL_TYPES, ModelShape
from finetune_api.memory.heads import LossHead
from finetune_api.memory.layers import Batch, Kernels, TrainedWeights, map_linear_layer_sizes
from finetune_api.memory.optimizers import Optimizer
from finetune_api.memory.replay import Reference, Step
from finetune_api.objectives import OBJECTIVES
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
LOSS_HEADS = {
    TrainerType.SFT: LossHead.TILES, TrainerType.DPO: LossHead.TILES, TrainerType.KTO: LossHead.TILES, TrainerType.ORPO: LossHead.PAIR_LOGITS,
    TrainerType.REWARD: LossHead.SCORE,
}  # fmt: skip
"""How each objective that the plan supports computes its loss."""
METHODS_CHECKED_WITH_PREFERENCES = (MethodType.FULL, MethodType.LORA, MethodType.QLORA)
"""Methods whose planned peaks with dpo, orpo, kto and reward were compared with measured peaks, on a CPU."""
IA3_LAYERS, IA3_INPUT_LAYERS = frozenset({"k_proj", "v_proj", "down_proj"}), frozenset({"down_proj"})
"""Names of all linear layers that IA3 scales, and names of the layers whose inputs IA3 scales.

Of the layers that are only in the first set, IA3 scales the outputs.
"""
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch_fused": optimizers.ADAMW_FUSED, "adamw_torch": optimizers.ADAMW_FOREACH, "adamw_hf": optimizers.ADAMW_FOREACH,
    "adamw_8bit": optimizers.ADAMW_8BIT, "adamw_bnb_8bit": optimizers.ADAMW_8BIT, "paged_adamw_8bit": optimizers.PAGED_ADAMW_8BIT,
    "paged_adamw_32bit": optimizers.PAGED_ADAMW, "paged_adamw": optimizers.PAGED_ADAMW, "adafactor": optimizers.ADAFACTOR, "sgd": optimizers.SGD,
    "lion_32bit": optimizers.LION, "lion_8bit": optimizers.LION_8BIT, "paged_lion_32bit": optimizers.PAGED_ADAMW, "paged_lion_8bit": optimizers.PAGED_ADAMW,
    "rmsprop": optimizers.ONE_MOMENT_FOREACH, "adagrad": optimizers.ONE_MOMENT_FOREACH, "rmsprop_bnb": optimizers.ONE_MOMENT,
    "rmsprop_bnb_32bit": optimizers.ONE_MOMENT, "rmsprop_bnb_8bit": optimizers.ONE_MOMENT_8BIT, "ademamix": optimizers.ADEMAMIX,
    "ademamix_8bit": optimizers.ADEMAMIX_8BIT, "paged_ademamix_32bit": optimizers.PAGED_ADAMW, "paged_ademamix_8bit": optimizers.PAGED_ADAMW,
}  # fmt: skip
"""The optimizers that the plan supports, by their name in `training.optimizer`."""
UNCHECKED_OPTIMIZERS = ("rmsprop", "adagrad", "ademamix")
"""Prefixes of optimizer names. Planned peaks with these optimizers were not compared with measured peaks."""
DOUBLE_QUANTIZED_SCALE_BYTES, QUANTIZED_SCALE_BYTES = 1 / 64 + 4 / 64 / 256, 4 / 64
"""Bytes of the scales per 4-bit value: with double quantisation, which also quantises the scales, and without double quantisation."""


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that its spec does not contain. None: the fact is not known yet, and the plan makes an assumption."""

    longest_tokens: int | None = None
    """Number of tokens in the longest row."""
    attention: str | None = None
    """The attention implementation that the run uses."""
    uses_liger: bool | None = None
    recomputed_layer_count: int | None = None
    """Number of layers that recompute their activations."""


@dataclass(frozen=True)
class StepDescription:
    """A training step, and the assumptions that its memory plan makes."""

    step: Step
    assumptions: tuple[str, ...]
    """One sentence for each assumption."""
    is_checked: bool
    """Whether planned peaks of steps of this kind were compared with measured peaks."""


def describe_step(spec: FineTuneJobSpec, shape: ModelShape, facts: RunFacts | None = None) -> StepDescription:
    """Return the training step of a resolved spec, with the assumptions of its memory plan.

    Errors: ConfigError ObjectiveNotPlanned, MethodNotPlanned, OptimizerNotPlanned, TargetNotPlanned.
    """
    facts = facts or RunFacts()
    _require_supported(spec)
    is_gpu = _uses_gpu(spec)
    weights = _describe_weights(spec, shape, is_gpu)
    attention = facts.attention or _choose_attention(spec, shape, is_gpu)
    uses_liger = facts.uses_liger
    if uses_liger is None:
        uses_liger = is_gpu and spec.model.liger_kernels is not False and shape.model_type in DENSE_MODEL_TYPES
    batch, assumptions = _describe_largest_batch(spec, facts, attention, weights.prompt_tokens)
    objective, reference = trainer_type_of(spec), _choose_reference(spec)
    step = Step(
        shape, weights, batch, _find_optimizer(spec), Kernels(is_gpu=is_gpu, uses_liger=uses_liger, attention=attention), _get_autocast_bytes(spec, is_gpu),
        quantized_compute_bytes=2 if is_gpu else 4, loss_head=LOSS_HEADS[objective], reference=reference,
        accumulation=spec.training.gradient_accumulation_steps or 4,
        recomputed_layer_count=_count_recomputed_layers(spec, shape) if facts.recomputed_layer_count is None else facts.recomputed_layer_count,
        offloads_layer_inputs=spec.training.gradient_checkpointing is GradientCheckpointing.UNSLOTH,
    )  # fmt: skip
    step, is_sharded = _apply_strategy(spec, step)
    if not is_gpu:
        assumptions.append("the run has no GPU, so the plan counts the host memory that torch allocates, without Python and libraries")
    if is_sharded:
        assumptions.append(
            f"the planned memory of {spec.distributed.strategy} with {world_size(spec)} ranks was not compared with measured peaks"
        )
    if spec.trainer.backend is TrainerBackend.UNSLOTH:
        assumptions.append("unless the spec sets them, trainer.backend unsloth chooses an optimizer and a recomputation that need less memory than planned")
    if reference is Reference.MODEL and spec.trainer.dpo is not None and spec.trainer.dpo.reference_model is not None:
        assumptions.append("the model of trainer.dpo.referenceModel has the same size as that of model.source")
    is_objective_checked = _is_objective_checked(spec, is_gpu)
    if not is_objective_checked:
        device = "a GPU" if is_gpu else "a CPU"
        assumptions.append(
            f"the planned memory of trainer.type {objective} with method.type {method_type_of(spec)} was not compared with measured peaks on {device}"
        )
    optimizer_name = str(value_or_default(spec.training, "optimizer")).removeprefix("paged_")
    if optimizer_name.startswith(UNCHECKED_OPTIMIZERS):
        assumptions.append(f"the planned memory of training.optimizer {optimizer_name} was not compared with measured peaks")
        return StepDescription(step, tuple(assumptions), is_checked=False)
    return StepDescription(step, tuple(assumptions), not is_sharded and shape.is_checked and is_objective_checked)


def _require_supported(spec: FineTuneJobSpec) -> None:
    method, objective = method_type_of(spec), trainer_type_of(spec)
    if objective not in LOSS_HEADS:
        raise ConfigError(
            "ObjectiveNotPlanned", f"trainer.type is {objective}, but the memory plan supports only {', '.join(LOSS_HEADS)}",
            hint="plan the job with `trainer: {type: sft}`; grpo needs more memory than that; the job itself records its measured peak",
        )  # fmt: skip
    if (spec.distributed.context_parallel_size or 1) > 1:
        raise ConfigError(
            "MethodNotPlanned", f"distributed.contextParallelSize is {spec.distributed.context_parallel_size}, but the memory plan does not support "
            "sequences that are split over several ranks",
            hint="plan the job without contextParallelSize: the job needs at most that much; the job itself still records its measured peak",
        )  # fmt: skip
    lora = spec.method.lora
    if method not in PLANNED_METHODS:
        raise ConfigError(
            "MethodNotPlanned", f"method.type is {method}, but the memory plan supports only {', '.join(PLANNED_METHODS)}",
            hint="plan one of these methods; the job itself still records its measured peak",
        )  # fmt: skip
    if lora is not None and (lora.target_parameters or lora.modules_to_save):
        unsupported_field = "targetParameters" if lora.target_parameters else "modulesToSave"
        raise ConfigError(
            "MethodNotPlanned", f"method.lora.{unsupported_field} is set, but the memory plan does not support it",
            hint=f"plan the job without {unsupported_field}: the job needs more than that",
        )  # fmt: skip


def _is_objective_checked(spec: FineTuneJobSpec, is_gpu: bool) -> bool:
    """Whether planned peaks of the objective were compared with measured peaks. On a GPU, only the planned peaks of sft were compared."""
    return trainer_type_of(spec) is TrainerType.SFT or (not is_gpu and method_type_of(spec) in METHODS_CHECKED_WITH_PREFERENCES)


def _choose_reference(spec: FineTuneJobSpec) -> Reference:
    """Return the reference model of the objective. The choice is the same as in `finetune_trainer.objective.reference_model`."""
    if OBJECTIVES[trainer_type_of(spec)].passes_without_gradients == 0:
        return Reference.NONE
    has_own_model = spec.trainer.dpo is not None and spec.trainer.dpo.reference_model is not None
    return Reference.MODEL if has_own_model or trains_base_weights(spec) else Reference.ADAPTER


def _uses_gpu(spec: FineTuneJobSpec) -> bool:
    return spec.training.device is Device.CUDA or (spec.training.device is not Device.CPU and gpus_per_node(spec) > 0)


def _get_autocast_bytes(spec: FineTuneJobSpec, is_gpu: bool) -> int | None:
    precision = spec.training.mixed_precision or MixedPrecision.AUTO
    return 2 if precision in (MixedPrecision.BF16, MixedPrecision.FP16) or (precision is MixedPrecision.AUTO and is_gpu) else None


def _describe_weights(spec: FineTuneJobSpec, shape: ModelShape, is_gpu: bool) -> TrainedWeights:
    """Return the weights that the job trains, and the precision of all weights.

    The choices are those of `finetune_trainer.hardware` and `finetune_trainer.method`.
    """
    weights = _describe_method_weights(spec, shape, is_gpu)
    if trainer_type_of(spec) is TrainerType.SFT:
        return weights
    # TRL turns off dropout for all these objectives.
    return replace(weights, has_dropout=False, has_score_head=trainer_type_of(spec) is TrainerType.REWARD)


def _describe_method_weights(spec: FineTuneJobSpec, shape: ModelShape, is_gpu: bool) -> TrainedWeights:
    trains_full_weights, lora, bits = trains_base_weights(spec), spec.method.lora, base_bits(spec)
    requested_value_bytes = {WeightDtype.FLOAT32: 4, WeightDtype.FLOAT16: 2, WeightDtype.BFLOAT16: 2}.get(spec.model.dtype or WeightDtype.AUTO)
    autocast_bytes = _get_autocast_bytes(spec, is_gpu)
    unquantized_value_bytes = requested_value_bytes or (4 if not is_gpu or trains_full_weights else 2 if autocast_bytes else shape.stored_value_bytes)
    if trains_full_weights:
        return TrainedWeights(unquantized_value_bytes, unquantized_value_bytes, True)
    quantization = spec.model.quantization
    is_single_quantized = quantization is not None and quantization.double_quant is False
    scale_bytes = QUANTIZED_SCALE_BYTES if is_single_quantized else DOUBLE_QUANTIZED_SCALE_BYTES
    base_value_bytes = {4: 0.5 + scale_bytes, 8: 1.0}.get(bits or 0, unquantized_value_bytes)
    has_dropout, is_dora = bool(lora and lora.dropout), method_type_of(spec) is MethodType.DORA or bool(lora and lora.use_dora)
    method, virtual_token_count = method_type_of(spec), int(value_or_default(spec.method, "prompt_length"))
    if method is MethodType.IA3:
        return TrainedWeights(base_value_bytes, unquantized_value_bytes, False, ia3_layers=IA3_LAYERS, ia3_input_layers=IA3_INPUT_LAYERS)
    if method in PROMPT_METHODS:
        prompt_tokens, prefix_tokens = (virtual_token_count, 0) if method is MethodType.PROMPT_TUNING else (0, virtual_token_count)
        return TrainedWeights(base_value_bytes, unquantized_value_bytes, False, prompt_tokens=prompt_tokens, prefix_tokens=prefix_tokens)
    return TrainedWeights(
        base_value_bytes, unquantized_value_bytes, False, lora_rank=(lora.rank if lora else None) or 16, target_layers=_find_target_layers(spec, shape),
        has_dropout=has_dropout, is_dora=is_dora, casts_inputs=autocast_bytes is None or is_dora,
    )  # fmt: skip


def _find_target_layers(spec: FineTuneJobSpec, shape: ModelShape) -> frozenset[str]:
    """Return the names of the linear layers that have an adapter. Errors: ConfigError TargetNotPlanned."""
    known_layers = {name for layer in range(shape.layer_count) for name in map_linear_layer_sizes(shape, layer)}
    requested_layers = (spec.method.lora.target_modules if spec.method.lora else None) or ["all-linear"]
    if requested_layers == ["all-linear"]:
        return frozenset(known_layers)
    unknown_layers = sorted(set(requested_layers) - known_layers)
    if unknown_layers:
        raise ConfigError(
            "TargetNotPlanned", f"method.lora.targetModules names {', '.join(unknown_layers)}, but a model of type {shape.model_type} has the layers "
            f"{', '.join(sorted(known_layers))}",
            hint="name some of these layers, or remove targetModules",
        )  # fmt: skip
    return frozenset(requested_layers)


def _find_optimizer(spec: FineTuneJobSpec) -> Optimizer:
    name = str(value_or_default(spec.training, "optimizer"))
    if name not in OPTIMIZERS:
        raise ConfigError(
            "OptimizerNotPlanned", f"training.optimizer is {name}, but the memory plan supports only {', '.join(OPTIMIZERS)}",
            hint="plan with adamw_torch_fused, which keeps two numbers for each trained parameter; other optimizers may keep more",
        )  # fmt: skip
    return OPTIMIZERS[name]


def _choose_attention(spec: FineTuneJobSpec, shape: ModelShape, is_gpu: bool) -> str:
    requested_attention = spec.model.attention or AttentionImplementation.AUTO
    if requested_attention is AttentionImplementation.EAGER or shape.model_type in EAGER_ONLY_MODEL_TYPES:
        return "eager"
    is_padded = (
        requested_attention is AttentionImplementation.SDPA or method_type_of(spec) in PROMPT_METHODS or trainer_type_of(spec) is not TrainerType.SFT
    )
    return "varlen" if is_gpu and not is_padded else "sdpa"


def _describe_largest_batch(spec: FineTuneJobSpec, facts: RunFacts, attention: str, prompt_tokens: int) -> tuple[Batch, list[str]]:
    """Return the micro-batch with the most tokens, and the assumptions about it. For eager attention, transformers builds a mask even for a single row."""
    if trainer_type_of(spec) is not TrainerType.SFT:
        return _describe_largest_preference_batch(spec, facts, attention, prompt_tokens)
    row_count, max_tokens = spec.training.batch_size_per_device or 4, spec.dataset.max_sequence_length or 2048
    is_packed, assumptions = spec.dataset.packing is True, []
    tokens_per_row = max_tokens if is_packed else min(max_tokens, facts.longest_tokens or max_tokens)
    if not is_packed and facts.longest_tokens is None:
        assumptions.append(f"each row of the largest micro-batch has {max_tokens} tokens (dataset.maxSequenceLength); shorter rows need less")
    tokens_per_row += prompt_tokens
    if attention == "varlen":  # with varlen attention, all rows are concatenated to one row
        return Batch(1, row_count * tokens_per_row), assumptions
    return Batch(row_count, tokens_per_row, has_mask=is_packed or row_count > 1 or attention == "eager"), assumptions


def _describe_largest_preference_batch(spec: FineTuneJobSpec, facts: RunFacts, attention: str, prompt_tokens: int) -> tuple[Batch, list[str]]:
    """Return the micro-batch with the most tokens, for objectives on pairs or labelled answers. All sequences are padded to the longest sequence."""
    max_tokens, max_answer_tokens = spec.dataset.max_sequence_length or 2048, spec.trainer.max_completion_length
    sequence_count = OBJECTIVES[trainer_type_of(spec)].sequences_per_row * (spec.training.batch_size_per_device or 4)
    assumptions = []
    if facts.longest_tokens is None:
        assumptions.append(
            f"in the largest micro-batch, a prompt and one of its answers together have {max_tokens} tokens (dataset.maxSequenceLength), and all "
            "sequences are padded to this length; shorter rows need less"
        )
    tokens_per_row = min(max_tokens, facts.longest_tokens or max_tokens) + prompt_tokens
    return Batch(sequence_count, tokens_per_row, has_mask=sequence_count > 1 or attention == "eager", trained_tokens_per_row=max_answer_tokens), assumptions


def _count_recomputed_layers(spec: FineTuneJobSpec, shape: ModelShape) -> int:
    if (spec.training.gradient_checkpointing or GradientCheckpointing.ENABLED) is GradientCheckpointing.DISABLED:
        return 0
    return shape.layer_count // (spec.training.checkpoint_every_n_layers or 1)


def _apply_strategy(spec: FineTuneJobSpec, step: Step) -> tuple[Step, bool]:
    """Return the step of one rank under the distributed strategy, and whether the strategy is DeepSpeed, or FSDP with sharding."""
    rank_count, strategy = world_size(spec), spec.distributed.strategy
    if rank_count == 1 and strategy is not StrategyType.DEEPSPEED:
        return step, False
    if strategy is StrategyType.FSDP:
        sharding = (spec.distributed.fsdp.sharding if spec.distributed.fsdp else None) or FsdpSharding.FULL_SHARD
        if sharding is not FsdpSharding.NO_SHARD:
            return _shard_step(step, rank_count, shards_weights=True), True
    if strategy is StrategyType.DEEPSPEED:
        deepspeed = spec.distributed.deepspeed
        zero_stage = 2 if deepspeed is None or deepspeed.zero_stage is None else deepspeed.zero_stage
        sharded_step = replace(step, optimizer_shards=rank_count if zero_stage >= 1 else 1)
        if zero_stage >= 2:
            sharded_step = _shard_step(sharded_step, rank_count, shards_weights=zero_stage == 3)
        else:
            sharded_step = replace(sharded_step, has_gradient_buckets=True)
        offloads_optimizer = deepspeed is not None and deepspeed.offload_optimizer is True
        return replace(sharded_step, optimizer=replace(step.optimizer, is_on_host=offloads_optimizer or step.optimizer.is_on_host)), True
    return replace(step, has_gradient_buckets=True), False


def _shard_step(step: Step, rank_count: int, *, shards_weights: bool) -> Step:
    weights = replace(step.weights, weight_shards=rank_count if shards_weights else 1, gradient_shards=rank_count)
    return replace(step, weights=weights, optimizer_shards=rank_count, gathers_weights=shards_weights)
