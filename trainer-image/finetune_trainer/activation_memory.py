"""Decides which micro-batches recompute their activations, if the spec leaves this to the trainer.

Recomputing (gradient checkpointing) saves memory and costs a second forward pass. A run does not recompute if the estimated memory of its
largest micro-batch fits into the GPU. Otherwise it recomputes only the micro-batches that do not fit. The estimate covers dense decoders with
LoRA or full training. Per token and layer it counts 5 values for each hidden unit, 8 for each unit of the attention heads and 6 for each unit
of the feed-forward layer. Measured peaks are 20 to 50 % lower (benchmarks/results/gpu_cells*.json). If an attempt runs out of memory
nevertheless, the next one has a smaller micro-batch and always recomputes, because then the spec has an adaptation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.rules import base_bits, method_type_of, trainer_type_of, trains_base_weights
from finetune_api.spec.enums import GradientCheckpointing, MethodType, OnOutOfMemory, TrainerBackend, TrainerType

from finetune_trainer.arguments import CHECKPOINTING_PATH
from finetune_trainer.hardware import Hardware
from finetune_trainer.kernels import COMPARED_TYPES

ESTIMATED_TYPES = COMPARED_TYPES - {"falcon_h1"}
"""Types of models whose layers the estimate describes: attention and a gated feed-forward layer, without experts or state-space layers."""
ESTIMATED_METHODS = (MethodType.FULL, MethodType.LORA, MethodType.QLORA)
VALUES_PER_HIDDEN_UNIT, VALUES_PER_ATTENTION_UNIT, VALUES_PER_FEED_FORWARD_UNIT = 5, 8, 6
DROPOUT_VALUES_PER_HIDDEN_UNIT, DROPOUT_VALUES_PER_FEED_FORWARD_UNIT = 4, 2
"""Additional values if adapters use dropout: their masked inputs."""
FIXED_BYTES = 3 * 10**9
"""CUDA context, workspaces and a part of the logits."""
USABLE_SHARE = 0.85
"""Share of the GPU's memory that the estimate may reach. The rest is for fragmentation."""
UNSHARDED_STRATEGIES = ("single", "ddp")


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes."""

    state_bytes: int
    """Weights, gradients and optimizer state."""
    activation_bytes: int
    """Activations of one micro-batch, if none are recomputed."""

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + FIXED_BYTES


@dataclass(frozen=True)
class ActivationChoice:
    """Which micro-batches keep their activations. The others recompute them."""

    max_kept_tokens: int | None
    """Largest number of tokens, with padding, of a micro-batch that keeps its activations; None if all micro-batches keep them."""
    note: str
    """Sentence for the status."""


def choose_kept_activations(
    run: RunConfig, hardware: Hardware, strategy_name: str, config: Any, *, batch_tokens: int, gpu_bytes: int
) -> ActivationChoice | None:
    """Choose the micro-batches that need not recompute their activations. Returns None if all must, or if the spec decides.

    `config`: the model's configuration. `batch_tokens`: tokens of the largest micro-batch, with padding. `gpu_bytes`: memory of the GPU,
    also if another program uses a part of it, so that all ranks and all attempts on GPUs of one type make the same choice.
    """
    if not _is_choice_of_trainer(run) or not _is_estimated(run, hardware, strategy_name, config):
        return None
    estimate = estimate_memory(run, hardware, strategy_name, config, batch_tokens)
    available_bytes = int(USABLE_SHARE * gpu_bytes)
    if estimate.total_bytes <= available_bytes:
        return ActivationChoice(None, (
            f"activations are not recomputed, because the run needs an estimated {estimate.total_bytes / 1e9:.0f} GB of "
            f"{gpu_bytes / 1e9:.0f} GB of GPU memory (training.gradientCheckpointing: enabled would save memory)"
        ))  # fmt: skip
    one_token = estimate_memory(run, hardware, strategy_name, config, 1)
    max_tokens = (available_bytes - one_token.state_bytes - FIXED_BYTES) // one_token.activation_bytes
    # Packed micro-batches are all as long as the longest. Other micro-batches have at least one token per row.
    if run.spec.dataset.packing or max_tokens < (run.spec.training.batch_size_per_device or 1):
        return None
    return ActivationChoice(max_tokens, (
        f"activations are recomputed only for micro-batches of more than {max_tokens} tokens, because smaller ones fit into {gpu_bytes / 1e9:.0f} GB "
        "of GPU memory by the trainer's estimate (training.gradientCheckpointing: enabled would always recompute)"
    ))  # fmt: skip


def _is_choice_of_trainer(run: RunConfig) -> bool:
    """Whether the spec leaves the choice open, and an attempt that runs out of memory would be followed by a smaller one."""
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


def _is_estimated(run: RunConfig, hardware: Hardware, strategy_name: str, config: Any) -> bool:
    """Whether the estimate describes the run."""
    lora = run.spec.method.lora
    return (
        hardware.device.type == "cuda"
        and hardware.attention != "eager"  # keeps the attention weights of all pairs of tokens
        and strategy_name in UNSHARDED_STRATEGIES
        and config.model_type in ESTIMATED_TYPES
        and trainer_type_of(run.spec) is TrainerType.SFT
        and method_type_of(run.spec) in ESTIMATED_METHODS
        # DoRA keeps further copies. Modules and embeddings that are trained in full have sizes of their own.
        and not (lora is not None and (lora.use_dora or lora.modules_to_save))
        and not run.spec.model.new_tokens
    )


def estimate_memory(run: RunConfig, hardware: Hardware, strategy_name: str, config: Any, batch_tokens: int) -> MemoryEstimate:
    """Estimate the memory of a run that recomputes no activations. `config`: the configuration of a model of `ESTIMATED_TYPES`."""
    hidden, feed_forward, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    attention = max(hidden, config.num_attention_heads * (getattr(config, "head_dim", None) or 0))
    values = VALUES_PER_HIDDEN_UNIT * hidden + VALUES_PER_ATTENTION_UNIT * attention + VALUES_PER_FEED_FORWARD_UNIT * feed_forward
    lora = run.spec.method.lora
    if lora is not None and lora.dropout:
        values += DROPOUT_VALUES_PER_HIDDEN_UNIT * hidden + DROPOUT_VALUES_PER_FEED_FORWARD_UNIT * feed_forward
    value_bytes = 2 if hardware.bf16 or hardware.fp16 else 4
    layer_parameters = layers * (4 * hidden * attention + 3 * hidden * feed_forward)
    adapter_parameters = ((lora.rank if lora is not None else None) or 16) * layers * (4 * (hidden + attention) + 3 * (hidden + feed_forward))
    state_bytes = _state_bytes(run, hardware, layer_parameters, 2 * config.vocab_size * hidden, adapter_parameters, strategy_name == "ddp")
    return MemoryEstimate(state_bytes, value_bytes * values * layers * batch_tokens)


def _state_bytes(
    run: RunConfig, hardware: Hardware, layer_parameters: int, embedding_parameters: int, adapter_parameters: int, has_buckets: bool
) -> int:
    """Bytes of weights, gradients and optimizer state. `has_buckets`: DDP holds a second copy of all gradients."""
    import torch

    weight_bytes = 4 if hardware.dtype in (torch.float32, "auto") else 2
    if trains_base_weights(run.spec):
        # Weights, gradients and two moments have one data type. Autocast adds a 16-bit copy of 32-bit weights.
        copies = 5 if has_buckets else 4
        return (layer_parameters + embedding_parameters) * (copies * weight_bytes + (2 if weight_bytes == 4 else 0))
    bits = base_bits(run.spec)
    base_bytes = layer_parameters * (weight_bytes if bits is None else 1.2 * bits / 8) + embedding_parameters * weight_bytes
    return int(base_bytes) + (20 if has_buckets else 16) * adapter_parameters
