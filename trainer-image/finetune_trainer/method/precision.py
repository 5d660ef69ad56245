"""Keeps trained weights in 32 bits, because a 16-bit weight does not change if an update is smaller than its rounding step."""

from __future__ import annotations

from typing import Any

from finetune_api.errors import ConfigError


def widen_trained_weights(model: Any) -> None:
    """Convert trained 16-bit weights to 32 bits.

    PEFT converts its own layers, but no other trained weights: `modulesToSave`, the head of a reward model, and biases. Under autocast,
    layers with 32-bit weights can process 16-bit inputs.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.element_size() < 4:
            parameter.data = parameter.data.float()


def leave_conversion_to_autocast(model: Any) -> None:
    """Stop LoRA layers from converting their 16-bit inputs to 32 bits, because the conversion only costs time and memory.

    Autocast converts inputs and weights to 16 bits before each product. If PEFT first converts an input to 32 bits, which is the precision
    of the adapter's weights, the input is copied twice. Without dropout, the conversion does not change the result. DoRA keeps the conversion, because it
    also uses inputs outside of products.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False


def require_scalable_weights(model: Any) -> None:
    """Refuse trained float16 weights, because torch's gradient scaler for fp16 needs 32-bit gradients. Errors: ConfigError HalfWeights."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and str(parameter.dtype) == "torch.float16":
            raise ConfigError(
                "HalfWeights", f"{name} is trained in float16 because of model.dtype, but the loss scaling of fp16 needs 32-bit weights",
                hint="remove model.dtype, or write `training: {mixedPrecision: bf16}`",
            )  # fmt: skip


class TrainedWeightsCopy:
    """A copy of the trained weights from before the Trainer is built.

    The constructor of TRL's Trainer converts the adapter of a quantised base model to bf16. Small updates are lost in bf16, so
    `restore` sets the weights to the copies, which have the original dtype.
    """

    def __init__(self, model: Any):
        self._weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def restore(self, model: Any) -> None:
        """Set each weight whose dtype has changed to its copy."""
        for name, parameter in model.named_parameters():
            weight_before = self._weights.get(name)
            if weight_before is not None and parameter.dtype != weight_before.dtype:
                parameter.data = weight_before.to(parameter.device)
