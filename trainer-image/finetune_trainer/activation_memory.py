"""Decides whether a run recomputes activations, if the spec leaves this to the trainer.

Recomputing (gradient checkpointing) saves memory and costs a second forward pass. It is left out if all activations certainly fit.

The estimate is an upper bound for decoder-only transformers with dense layers. Per token and layer, training keeps about 9 values for each
hidden unit and 6 for each unit of the feed-forward layer; the measured peaks of Llama 1B and 8B are 10 to 25 % lower (benchmarks/results).
If an attempt runs out of memory nevertheless, the next one has a smaller micro-batch and recomputes, because then the spec has an adaptation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.rules import base_bits, trainer_type_of, trains_base_weights
from finetune_api.spec.enums import GradientCheckpointing, TrainerBackend, TrainerType

from finetune_trainer.arguments import CHECKPOINTING_PATH
from finetune_trainer.hardware import Hardware
from finetune_trainer.speed import EXPERT_COUNT_FIELDS

VALUES_PER_HIDDEN_UNIT = 9
VALUES_PER_FEED_FORWARD_UNIT = 6
DROPOUT_VALUES_PER_HIDDEN_UNIT, DROPOUT_VALUES_PER_FEED_FORWARD_UNIT = 2, 1
"""Additional values if adapters use dropout: their masked inputs."""
FIXED_BYTES = 3 * 10**9
"""CUDA context, workspaces and a part of the logits."""
USABLE_SHARE = 0.85
"""Share of the GPU's memory that the estimate may reach. The rest is for fragmentation."""
UNSHARDED_STRATEGIES = ("single", "ddp")


@dataclass(frozen=True)
class MemoryEstimate:
    """Upper bounds in bytes."""

    state_bytes: int
    """Weights, gradients and optimizer state."""
    activation_bytes: int
    """Activations of one micro-batch, if none are recomputed."""

    @property
    def total_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + FIXED_BYTES


def keeps_all_activations(
    run: RunConfig, hardware: Hardware, strategy_name: str, config: Any, *, batch_tokens: int, gpu_bytes: int
) -> str | None:
    """Return a note for the status if the run need not recompute activations, otherwise None.

    `config`: the model's configuration. `batch_tokens`: tokens of the largest micro-batch, with padding. `gpu_bytes`: memory of the GPU,
    also if another program uses a part of it, so that all ranks and all attempts on GPUs of one type make the same choice.
    """
    if not _is_choice_of_trainer(run) or hardware.device.type != "cuda" or strategy_name not in UNSHARDED_STRATEGIES:
        return None
    estimate = estimate_memory(run, hardware, config, batch_tokens)
    if estimate is None or estimate.total_bytes > USABLE_SHARE * gpu_bytes:
        return None
    return (
        f"activations are not recomputed, because the run needs at most {estimate.total_bytes / 1e9:.0f} GB of {gpu_bytes / 1e9:.0f} GB "
        "of GPU memory (training.gradientCheckpointing: enabled would save memory)"
    )


def _is_choice_of_trainer(run: RunConfig) -> bool:
    """Whether the spec leaves the choice open, and an attempt that runs out of memory could be followed by a smaller one."""
    training, lora = run.spec.training, run.spec.method.lora
    return (
        training.gradient_checkpointing is GradientCheckpointing.ENABLED
        and CHECKPOINTING_PATH in run.defaults
        and not run.before_adaptation
        and (training.batch_size_per_device or 1) > 1
        and trainer_type_of(run.spec) is TrainerType.SFT
        and run.spec.trainer.backend is not TrainerBackend.UNSLOTH
        # The estimate does not know the sizes of modules that are trained in full beside an adapter.
        and not (lora is not None and lora.modules_to_save)
    )


def estimate_memory(run: RunConfig, hardware: Hardware, config: Any, batch_tokens: int) -> MemoryEstimate | None:
    """Estimate the memory of a run. None for models whose layers the estimate does not describe (experts, unknown sizes)."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")]
    if text is not config or not all(isinstance(size, int) for size in sizes):
        return None
    if any(getattr(text, name, None) for name in EXPERT_COUNT_FIELDS):
        return None
    hidden, feed_forward, layers, vocabulary = sizes
    layer_parameters = layers * (4 * hidden**2 + 3 * hidden * feed_forward)
    embedding_parameters = 2 * vocabulary * hidden
    values = VALUES_PER_HIDDEN_UNIT * hidden + VALUES_PER_FEED_FORWARD_UNIT * feed_forward
    lora = run.spec.method.lora
    if lora is not None and lora.dropout:
        values += DROPOUT_VALUES_PER_HIDDEN_UNIT * hidden + DROPOUT_VALUES_PER_FEED_FORWARD_UNIT * feed_forward
    value_bytes = 2 if hardware.bf16 or hardware.fp16 else 4
    state_bytes = _state_bytes(run, hardware, layer_parameters, embedding_parameters, layers * 7 * (hidden + feed_forward))
    return MemoryEstimate(state_bytes, value_bytes * values * layers * batch_tokens)


def _state_bytes(run: RunConfig, hardware: Hardware, layer_parameters: int, embedding_parameters: int, adapter_units: int) -> int:
    """Bytes of weights, gradients and optimizer state. `adapter_units`: sum of the input and output sizes of all linear layers."""
    import torch

    weight_bytes = 4 if hardware.dtype in (torch.float32, "auto") else 2
    if trains_base_weights(run.spec):
        # Weights, gradients and two moments have one data type. Autocast adds a 16-bit copy of 32-bit weights.
        return (layer_parameters + embedding_parameters) * (4 * weight_bytes + (2 if weight_bytes == 4 else 0))
    lora = run.spec.method.lora
    rank = (lora.rank if lora is not None else None) or 16
    adapter_bytes = 16 * rank * adapter_units
    bits = base_bits(run.spec)
    base_bytes = layer_parameters * (weight_bytes if bits is None else 1.2 * bits / 8) + embedding_parameters * weight_bytes
    return int(base_bytes) + adapter_bytes
