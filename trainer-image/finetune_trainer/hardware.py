"""Chooses the device, precision and attention implementation of this rank."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from finetune_api.errors import ConfigError, FineTuneError
from finetune_api.pod import RunConfig
from finetune_api.rules import given_bits, trains_base_weights
from finetune_api.spec.enums import AttentionImplementation, Device, MixedPrecision, WeightDtype

from finetune_trainer.failure import installation_error, node_driver_error

if TYPE_CHECKING:
    import torch

FLASH_ATTENTION = "flash_attention_2"


@dataclass(frozen=True)
class Hardware:
    """The device, number formats and attention implementation of this rank."""

    device: torch.device
    name: str
    dtype: torch.dtype | str
    """Number format of the loaded weights; `auto` is the format of the weight files."""
    computes_in_bf16: bool
    """Whether training computes in bf16 (mixed precision)."""
    computes_in_fp16: bool
    """Whether training computes in fp16 (mixed precision)."""
    attention: str
    """transformers' name of the attention implementation. The final choice also depends on the model (`attention.choose_attention`)."""

    @property
    def is_cpu(self) -> bool:
        """Whether this rank trains without an accelerator."""
        return self.device.type == "cpu"


class _ComputePrecision(NamedTuple):
    """The 16-bit format in which the forward pass computes. Both fields are False if the forward pass computes in 32 bits."""

    computes_in_bf16: bool
    computes_in_fp16: bool


def detect_hardware(run: RunConfig, local_rank: int) -> Hardware:
    """Choose device, precision and attention for this rank.

    Errors: ConfigError DeviceAbsent (cuda without a requested GPU, or mps on another machine), PrecisionUnavailable (the device cannot compute in
    fp16 or bf16), AttentionPrecision (flash attention without 16 bits); InstallationBrokenError GpuDriverMissing; PeerError NodeDriverUnusable.
    """
    import torch

    device = _choose_device(run, local_rank)
    precision = _choose_precision(run, device)
    attention = _choose_attention(run, device)
    dtype = _choose_dtype(run, device, precision.computes_in_bf16)
    if attention == FLASH_ATTENTION and dtype is torch.float32 and not any(precision):
        raise ConfigError(
            "AttentionPrecision", "model.attention flashAttention2 computes in 16 bits only, but training.mixedPrecision is no (32 bits)",
            hint="write mixedPrecision bf16, or attention sdpa",
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Hardware(device, _get_device_name(device), dtype, precision.computes_in_bf16, precision.computes_in_fp16, attention)


def trains_on_quantized_base(run: RunConfig) -> bool:
    """Whether the run trains some modules of the base model in full and quantises all other modules (spectrum on a 4-bit base model)."""
    return trains_base_weights(run.spec) and given_bits(run.spec) is not None


def uses_gpu(run: RunConfig) -> bool:
    """Whether the run trains on a CUDA device."""
    requested_device = run.spec.training.device or Device.AUTO
    return requested_device is Device.CUDA or (requested_device is Device.AUTO and run.world.gpus_per_node > 0)


def _choose_device(run: RunConfig, local_rank: int) -> torch.device:
    import torch

    requested_device = run.spec.training.device or Device.AUTO
    if requested_device is Device.MPS:
        if not torch.backends.mps.is_available():
            raise ConfigError(
                "DeviceAbsent", "training.device is mps, but this machine has no MPS device", hint="write auto"
            )
        return torch.device("mps")
    if not uses_gpu(run):
        return torch.device("cpu")
    if not torch.cuda.is_available() and run.world.gpus_per_node == 0:
        raise ConfigError(
            "DeviceAbsent",
            "training.device is cuda, but the job requests no GPU",
            hint="write auto, or set resources.gpusPerNode",
        )
    if not torch.cuda.is_available():
        raise _missing_gpu_error(run.world.gpus_per_node)
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _missing_gpu_error(gpus_per_node: int) -> FineTuneError:
    """Return the failure of a pod in which torch finds no GPU.

    If the pod has no driver, every attempt would fail. If it has a driver, an attempt on another node may succeed.
    """
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # torch raises RuntimeError or AssertionError; only the message contains the driver's reason.
        installation_problem = installation_error(error)
        if installation_problem is not None:
            return installation_problem
        reason = str(error).strip().partition("\n")[0]
    else:
        reason = "the driver reports no GPU"
    return node_driver_error(f"the job requests GPUs (per node: {gpus_per_node}), but torch finds none: {reason}")


def _choose_precision(run: RunConfig, device: torch.device) -> _ComputePrecision:
    """Choose the number format in which the forward pass computes. Errors: ConfigError PrecisionUnavailable."""
    import torch

    requested_precision = run.spec.training.mixed_precision or MixedPrecision.AUTO
    supports_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if requested_precision is MixedPrecision.AUTO and trains_on_quantized_base(run):
        return _ComputePrecision(True, False)  # Autocast converts the inputs of 16-bit modules that follow 4-bit modules.
    if requested_precision is MixedPrecision.AUTO:
        uses_cuda = device.type == "cuda"
        return _ComputePrecision(uses_cuda and supports_bf16, uses_cuda and not supports_bf16)
    if requested_precision is MixedPrecision.FP16 and device.type != "cuda":
        raise ConfigError(
            "PrecisionUnavailable", "training.mixedPrecision is fp16, but fp16 needs a GPU", hint="write bf16, no or auto"
        )
    if requested_precision is MixedPrecision.BF16 and not supports_bf16:
        raise ConfigError("PrecisionUnavailable", f"{_get_device_name(device)} cannot compute in bf16", hint="write fp16 or auto")
    return _ComputePrecision(requested_precision is MixedPrecision.BF16, requested_precision is MixedPrecision.FP16)


def _choose_dtype(run: RunConfig, device: torch.device, computes_in_bf16: bool) -> torch.dtype | str:
    """Choose the dtype of the weights. Trained base weights default to 32 bits, because 16-bit weights lose small updates."""
    import torch

    requested_dtype = run.spec.model.dtype or WeightDtype.AUTO
    if requested_dtype is not WeightDtype.AUTO:
        return {WeightDtype.FLOAT16: torch.float16, WeightDtype.BFLOAT16: torch.bfloat16, WeightDtype.FLOAT32: torch.float32}[requested_dtype]
    if trains_on_quantized_base(run):
        return torch.bfloat16
    if device.type == "cpu" or trains_base_weights(run.spec):
        return torch.float32
    return "auto" if device.type == "cuda" and not computes_in_bf16 else torch.bfloat16 if computes_in_bf16 else "auto"


def _choose_attention(run: RunConfig, device: torch.device) -> str:
    """Return transformers' name of the attention implementation for runs that do not use variable-length attention."""
    requested_attention = run.spec.model.attention or AttentionImplementation.AUTO
    if requested_attention is AttentionImplementation.FLASH_ATTENTION_2 and device.type == "cuda" and find_spec("flash_attn") is not None:
        return FLASH_ATTENTION
    return "eager" if requested_attention is AttentionImplementation.EAGER else "sdpa"


def _get_device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
