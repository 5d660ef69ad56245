"""Checks before the first step that the requested features are active, because libraries often fall back without an error."""

from __future__ import annotations

from typing import Any

from finetune_api.errors import InternalError
from finetune_api.pod import RunConfig

from finetune_trainer import kernels
from finetune_trainer.hardware import Hardware
from finetune_trainer.library_internals import attention_implementation
from finetune_trainer.model import quantization_config


def require_attention(base_model: Any, hardware: Hardware) -> str:
    """Return the active attention implementation. Errors: InternalError AttentionSwapped if the active implementation is not the requested one."""
    active_attention = attention_implementation(base_model)
    if active_attention != hardware.attention:
        raise InternalError("AttentionSwapped", f"attention {hardware.attention} was requested, {active_attention} is active")
    return active_attention


def require_quantization(base_model: Any, run: RunConfig, hardware: Hardware) -> None:
    """Check that the requested quantisation is active. Errors: InternalError QuantizationNotActive if no layer has 4-bit or 8-bit weights."""
    requested_config = quantization_config(run, hardware)
    if requested_config is None:
        return
    is_4bit = requested_config.load_in_4bit
    class_name = "Linear4bit" if is_4bit else "Linear8bitLt"
    layers = [layer for layer in base_model.modules() if type(layer).__name__ == class_name]
    # The layer keeps the quantisation state even if FSDP has replaced its weight by a shard.
    if not any(
        getattr(layer, "quant_state", None) is not None if is_4bit else layer.weight.element_size() == 1
        for layer in layers
    ):
        bits = 4 if is_4bit else 8
        raise InternalError("QuantizationNotActive", f"{bits}-bit weights were requested, but no layer has such weights")


def verify_kernels(base_model: Any, run: RunConfig) -> list[str]:
    """Check that a layer of the model uses a kernel of Liger, because Liger silently skips unknown models. Return notes for the status.

    Errors: InternalError KernelsNotActive if no layer uses a kernel, although the user requested the kernels.
    """
    model_class_name = type(base_model).__name__
    if any(getattr(module.forward, "__module__", "").startswith("liger_kernel") for module in base_model.modules()):
        return kernels.notes_about_active_kernels(run, base_model.config.model_type)
    if not kernels.are_kernels_requested(run):
        return [f"{kernels.LIGER_PATH} is off: Liger replaced no layer of {model_class_name}"]
    raise InternalError(
        "KernelsNotActive", f"Liger's kernels were requested, but no layer of {model_class_name} uses a kernel of Liger",
        hint="set model.ligerKernels: false",
    )  # fmt: skip
