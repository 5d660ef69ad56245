"""Decides which layers recompute their activations, if the spec leaves this choice to the trainer.

Recomputing (gradient checkpointing) saves memory and costs a second forward pass. A run does not recompute if the estimated memory of its
largest micro-batch fits into the GPU. Otherwise, in each micro-batch, as many of the last layers as possible keep their activations. The
estimate covers dense decoders with LoRA or full training. For each token and layer, the estimate counts the values that the layer keeps for each
hidden unit, each unit of the attention heads and each unit of the feed-forward layer (`KeptValues`). These counts depend on the kernels.
Measured peaks of memory are lower than the estimate: by 11 to 33 % with Liger's kernels, and by more without them
(benchmarks/results/gpu_cells*.json). If an attempt still runs out of memory, the operator adapts the spec: the next attempt has a smaller
micro-batch and recomputes all activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.rules import base_bits, method_type_of, trainer_type_of, trains_base_weights, value_or_default
from finetune_api.spec.enums import GradientCheckpointing, MethodType, OnOutOfMemory, TrainerBackend, TrainerType

from finetune_trainer.arguments import CHECKPOINTING_PATH
from finetune_trainer.hardware import Hardware
from finetune_trainer.kernels import COMPARED_MODEL_TYPES
from finetune_trainer.recomputation import count_kept_layers

ESTIMATED_MODEL_TYPES = COMPARED_MODEL_TYPES - {"falcon_h1"}
"""Model types for which the estimate is valid: each layer has attention and a gated feed-forward layer, but no experts or state space."""
ESTIMATED_METHODS = (MethodType.FULL, MethodType.LORA, MethodType.QLORA)
FIXED_OVERHEAD_BYTES = 3 * 10**9
"""Memory for the CUDA context, workspaces and some of the logits."""
USABLE_GPU_MEMORY_SHARE = 0.9
"""Largest allowed ratio of the estimate to the GPU's memory. The rest of the memory is for fragmentation."""
UNSHARDED_STRATEGIES = ("single", "ddp")
"""Strategies with which each GPU holds the whole model."""


@dataclass(frozen=True)
class KeptValues:
    """How many values a layer keeps per token for the backward pass: for each hidden unit, attention unit and feed-forward unit."""

    per_hidden_unit: int
    per_attention_unit: int
    per_feed_forward_unit: int


VALUES_KEPT_WITH_TORCH_KERNELS, VALUES_KEPT_WITH_LIGER_KERNELS = KeptValues(5, 8, 6), KeptValues(4, 6, 4)
ADDITIONAL_VALUES_KEPT_WITH_DROPOUT = KeptValues(4, 0, 2)
"""Additional values that a layer keeps if its adapters use dropout: the masked inputs of the adapters."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The estimated memory of one GPU, in bytes."""

    state_bytes: int
    """Bytes of weights, gradients and optimizer state at the end of the forward pass."""
    activation_bytes: int
    """Bytes of the activations of one micro-batch if no layer recomputes them."""

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + FIXED_OVERHEAD_BYTES


@dataclass(frozen=True)
class ActivationChoice:
    """Which activations are kept. All other activations are recomputed."""

    kept_layer_tokens: int | None
    """Upper limit of the product of two numbers: the layers that keep their activations, and the tokens of the micro-batch (with padding).
    None: all layers keep their activations."""
    note: str
    """Sentence for the status."""


def choose_kept_activations(
    run: RunConfig, hardware: Hardware, strategy_name: str, config: Any, *, batch_tokens: int, gpu_bytes: int, uses_liger: bool
) -> ActivationChoice | None:
    """Choose which activations are kept. Return None if all activations must be recomputed, or if the spec makes this choice.

    `config`: the model's configuration. `batch_tokens`: tokens of the largest micro-batch, with padding. `gpu_bytes`: total memory of the
    GPU. (The free memory is not used, so that all ranks and attempts on the same type of GPU make the same choice.) `uses_liger`: whether
    the model computes with Liger's kernels.
    """
    if not _may_trainer_choose(run) or not _is_estimate_valid(run, hardware, strategy_name, config):
        return None
    estimate = estimate_memory(run, hardware, strategy_name, config, batch_tokens, uses_liger=uses_liger)
    available_bytes = int(USABLE_GPU_MEMORY_SHARE * gpu_bytes)
    if estimate.total_bytes <= available_bytes:
        return ActivationChoice(None, (
            f"activations are not recomputed, because the run needs an estimated {estimate.total_bytes / 1e9:.0f} GB of "
            f"{gpu_bytes / 1e9:.0f} GB of GPU memory (training.gradientCheckpointing: enabled would save memory)"
        ))  # fmt: skip
    layer_count = config.num_hidden_layers
    bytes_per_layer_token = estimate.activation_bytes / (layer_count * batch_tokens)
    kept_layer_tokens = int((available_bytes - estimate.state_bytes - FIXED_OVERHEAD_BYTES) // bytes_per_layer_token)
    kept_layer_count = count_kept_layers(layer_count, batch_tokens, kept_layer_tokens)
    # All packed micro-batches have the same length. Other micro-batches have at least one token per row.
    smallest_batch_tokens = batch_tokens if run.spec.dataset.packing else run.spec.training.batch_size_per_device or 1
    if count_kept_layers(layer_count, smallest_batch_tokens, kept_layer_tokens) == 0:
        return None
    smaller_batch_note = "" if run.spec.dataset.packing else f" (no layer does in micro-batches of up to {kept_layer_tokens // layer_count} tokens)"
    return ActivationChoice(kept_layer_tokens, (
        f"{layer_count - kept_layer_count} of {layer_count} layers recompute their activations"
        f"{' in the largest micro-batch' if smaller_batch_note else ''}{smaller_batch_note}, because by the trainer's "
        f"estimate only the activations of the other layers fit into {gpu_bytes / 1e9:.0f} GB of GPU memory "
        "(with training.gradientCheckpointing: enabled, all layers recompute)"
    ))  # fmt: skip


def _may_trainer_choose(run: RunConfig) -> bool:
    """Whether the trainer may choose which activations are kept.

    It may if the spec leaves the choice open, and if the operator can retry with a smaller batch after an out-of-memory error.
    """
    training = run.spec.training
    return (
        training.gradient_checkpointing is GradientCheckpointing.ENABLED
        and CHECKPOINTING_PATH in run.defaults
        and (training.checkpoint_every_n_layers or 1) == 1
        and run.spec.trainer.backend is not TrainerBackend.UNSLOTH
        and run.spec.policy.on_out_of_memory is not OnOutOfMemory.FAIL
        and not run.before_adaptation
        and (training.batch_size_per_device or 1) > 1
    )


def _is_estimate_valid(run: RunConfig, hardware: Hardware, strategy_name: str, config: Any) -> bool:
    """Whether `estimate_memory` is valid for the run."""
    lora = run.spec.method.lora
    return (
        hardware.device.type == "cuda"
        and hardware.attention != "eager"  # Eager attention keeps the weights of all pairs of tokens.
        and strategy_name in UNSHARDED_STRATEGIES
        and config.model_type in ESTIMATED_MODEL_TYPES
        and trainer_type_of(run.spec) is TrainerType.SFT
        and method_type_of(run.spec) in ESTIMATED_METHODS
        # The estimate includes neither DoRA's copies of weights nor modules and embeddings that are trained in full.
        and not (lora is not None and (lora.use_dora or lora.modules_to_save))
        and not run.spec.model.new_tokens
    )


def estimate_memory(
    run: RunConfig, hardware: Hardware, strategy_name: str, config: Any, batch_tokens: int, *, uses_liger: bool
) -> MemoryEstimate:
    """Estimate the memory of a run that recomputes no activations. `config`: the configuration of a model of `ESTIMATED_MODEL_TYPES`."""
    hidden_size, feed_forward_size, layer_count = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head_size = getattr(config, "head_dim", None) or hidden_size // config.num_attention_heads
    attention_size = max(hidden_size, config.num_attention_heads * head_size)
    key_size = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head_size
    lora = run.spec.method.lora
    kept_value_counts = [VALUES_KEPT_WITH_LIGER_KERNELS if uses_liger else VALUES_KEPT_WITH_TORCH_KERNELS]
    if lora is not None and lora.dropout:
        kept_value_counts.append(ADDITIONAL_VALUES_KEPT_WITH_DROPOUT)
    values_per_layer_token = sum(
        counts.per_hidden_unit * hidden_size + counts.per_attention_unit * attention_size + counts.per_feed_forward_unit * feed_forward_size
        for counts in kept_value_counts
    )
    bytes_per_value = 2 if hardware.computes_in_bf16 or hardware.computes_in_fp16 else 4
    layer_parameter_count = layer_count * (2 * hidden_size * (attention_size + key_size) + 3 * hidden_size * feed_forward_size)
    lora_rank = (lora.rank if lora is not None else None) or 16
    adapter_parameter_count = lora_rank * layer_count * (4 * (hidden_size + attention_size) + 3 * (hidden_size + feed_forward_size))
    model_size = _ModelSize(layer_parameter_count, config.vocab_size * hidden_size, (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden_size)
    has_buckets = strategy_name == "ddp"
    if trains_base_weights(run.spec):
        state_bytes = _estimate_bytes_of_full_training(run, hardware, model_size, has_buckets=has_buckets)
    else:
        state_bytes = _estimate_bytes_of_adapter_training(run, hardware, model_size, adapter_parameter_count, has_buckets=has_buckets)
    return MemoryEstimate(state_bytes, bytes_per_value * values_per_layer_token * layer_count * batch_tokens)


@dataclass(frozen=True)
class _ModelSize:
    """Numbers of parameters of a model."""

    layer_parameters: int
    head_parameters: int
    embedding_parameters: int
    """Parameters of input embeddings and head together. Tied parameters count once."""


def _estimate_bytes_of_full_training(run: RunConfig, hardware: Hardware, model_size: _ModelSize, *, has_buckets: bool) -> int:
    """Return the bytes of weights, gradients and the optimizer's two moments at the end of the forward pass.

    Weights, gradients and moments have the same data type.

    Without gradient accumulation, gradients are allocated in the backward pass, which frees the activations of a layer before it computes
    the next gradients. Only the head's gradients are allocated before any activations are freed.
    `has_buckets`: whether DDP holds a second copy of all gradients.
    """
    bytes_per_weight = _count_bytes_per_weight(hardware)
    cast_bytes_per_weight = 2 if bytes_per_weight == 4 else 0  # autocast's copy of 32-bit weights
    parameter_count = model_size.layer_parameters + model_size.embedding_parameters
    keeps_gradients = has_buckets or value_or_default(run.spec.training, "gradient_accumulation_steps") > 1
    gradient_count = (parameter_count if keeps_gradients else model_size.head_parameters) + (parameter_count if has_buckets else 0)
    return parameter_count * (3 * bytes_per_weight + cast_bytes_per_weight) + gradient_count * bytes_per_weight


def _estimate_bytes_of_adapter_training(run: RunConfig, hardware: Hardware, model_size: _ModelSize, adapter_parameter_count: int, *, has_buckets: bool) -> int:
    bits_per_base_weight, bytes_per_weight = base_bits(run.spec), _count_bytes_per_weight(hardware)
    bytes_per_layer_weight = bytes_per_weight if bits_per_base_weight is None else 1.2 * bits_per_base_weight / 8
    base_bytes = model_size.layer_parameters * bytes_per_layer_weight + model_size.embedding_parameters * bytes_per_weight
    return int(base_bytes) + (20 if has_buckets else 16) * adapter_parameter_count


def _count_bytes_per_weight(hardware: Hardware) -> int:
    import torch

    return 4 if hardware.dtype in (torch.float32, "auto") else 2
