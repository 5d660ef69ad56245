"""What this rank runs on, and what follows from it: device, precision, attention."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import Attention, Device, Dtype, MethodType, MixedPrecision

if TYPE_CHECKING:
    import torch

FULL_METHODS = (MethodType.FULL, MethodType.SPECTRUM)
FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Hardware:
    """Device and number formats of this rank."""

    device: torch.device
    name: str
    dtype: torch.dtype | str
    """Of the weights as loaded; `auto`: as they were saved."""
    bf16: bool
    fp16: bool
    attention: str
    notes: tuple[str, ...] = ()

    @property
    def cpu(self) -> bool:
        """No accelerator takes part."""
        return self.device.type == "cpu"


def detect(run: RunConfig, local_rank: int) -> Hardware:
    """Settle device, precision and attention for this rank.

    Errors: ConfigError DeviceAbsent (cuda or mps asked for and not there), PrecisionUnavailable (fp16 or bf16 the device cannot do).
    """
    import torch

    device = _device(run, local_rank)
    bf16, fp16 = _precision(run, device)
    attention, notes = _attention(run, device)
    dtype = _dtype(run, device, bf16)
    if attention == FLASH and dtype is torch.float32 and not (bf16 or fp16):
        raise ConfigError(
            "AttentionPrecision", "model.attention flashAttention2 computes in 16 bits only, and training.mixedPrecision no leaves 32",
            hint="write mixedPrecision bf16, or attention sdpa",
        )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return Hardware(device, _name(device), dtype, bf16, fp16, attention, tuple(notes))


def selects_on_quantized(run: RunConfig) -> bool:
    """Spectrum on a 4-bit base: some modules are trained in full between frozen 4-bit ones."""
    quantization = run.spec.model.quantization
    return run.spec.method.type is MethodType.SPECTRUM and quantization is not None and quantization.bits is not None


def wants_gpu(run: RunConfig) -> bool:
    """Whether the run is to train on a CUDA device."""
    asked = run.spec.training.device or Device.AUTO
    return asked is Device.CUDA or (asked is Device.AUTO and run.world.gpus_per_node > 0)


def _device(run: RunConfig, local_rank: int) -> torch.device:
    import torch

    asked = run.spec.training.device or Device.AUTO
    if asked is Device.MPS:
        if not torch.backends.mps.is_available():
            raise ConfigError("DeviceAbsent", "training.device is mps, and this machine has none", hint="write auto")
        return torch.device("mps")
    if not wants_gpu(run):
        return torch.device("cpu")
    if not torch.cuda.is_available() and run.world.gpus_per_node == 0:
        raise ConfigError(
            "DeviceAbsent",
            "training.device is cuda, and the job asks for no GPU",
            hint="write auto, or set resources.gpusPerNode",
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "DeviceAbsent", f"the job asks for {run.world.gpus_per_node} GPUs a node, and torch sees none",
            hint="set resources.gpusPerNode: 0 for a CPU run, or check driver and resources.gpuResource",
        )  # fmt: skip
    return torch.device("cuda", local_rank % torch.cuda.device_count())


def _precision(run: RunConfig, device: torch.device) -> tuple[bool, bool]:
    """(bf16, fp16) of the forward pass."""
    import torch

    asked = run.spec.training.mixed_precision or MixedPrecision.AUTO
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked is MixedPrecision.AUTO and selects_on_quantized(run):
        return True, False  # 16-bit modules between 4-bit ones: autocast brings their inputs together
    if asked is MixedPrecision.AUTO:
        return (False, False) if device.type != "cuda" else (able, not able)
    if asked is MixedPrecision.FP16 and device.type != "cuda":
        raise ConfigError(
            "PrecisionUnavailable", "training.mixedPrecision is fp16, which needs a GPU", hint="write bf16, no or auto"
        )
    if asked is MixedPrecision.BF16 and not able:
        raise ConfigError("PrecisionUnavailable", f"{_name(device)} cannot compute in bf16", hint="write fp16 or auto")
    return asked is MixedPrecision.BF16, asked is MixedPrecision.FP16


def _dtype(run: RunConfig, device: torch.device, bf16: bool) -> torch.dtype | str:
    """Weights that are trained themselves keep 32 bits unless told otherwise: small updates vanish in 16."""
    import torch

    asked = run.spec.model.dtype or Dtype.AUTO
    if asked is not Dtype.AUTO:
        return {Dtype.FLOAT16: torch.float16, Dtype.BFLOAT16: torch.bfloat16, Dtype.FLOAT32: torch.float32}[asked]
    if selects_on_quantized(run):
        return torch.bfloat16
    if device.type == "cpu" or run.spec.method.type in FULL_METHODS:
        return torch.float32
    return "auto" if device.type == "cuda" and not bf16 else torch.bfloat16 if bf16 else "auto"


def _attention(run: RunConfig, device: torch.device) -> tuple[str, list[str]]:
    asked = run.spec.model.attention or Attention.AUTO
    if asked is Attention.FLASH_ATTENTION_2:
        if device.type == "cuda" and find_spec("flash_attn") is not None:
            return FLASH, []
        why = "flash-attn is not installed" if device.type == "cuda" else "there is no GPU"
        return "sdpa", [f"model.attention flashAttention2 is not available ({why}): sdpa is used"]
    return {Attention.AUTO: "sdpa", Attention.SDPA: "sdpa", Attention.EAGER: "eager"}[asked], []


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
