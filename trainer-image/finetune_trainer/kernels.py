"""Decides whether a run uses Liger's kernels for the layers of its model.

`model.ligerKernels: true` requests the kernels, and false turns them off. If the user sets no value, the trainer uses the kernels unless a
reason in this module excludes them. `docs/decisions/0078-liger-kernels-by-default.md` has the measurements and the reasons.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import TrainerBackend

from finetune_trainer.hardware import Hardware

LIGER_PATH = "model.ligerKernels"
LIGER_OPTIONS = {"fused_linear_cross_entropy": False, "cross_entropy": False}
"""Options of Liger that keep the computation of the loss unchanged.

Liger's fused cross entropy replaces the model's forward pass, but TRL's losses and a reward model's head need the model's own forward pass. Liger's plain
cross entropy (on by default for Granite) replaces torch's function for the whole process.
"""
SWIGLU_MODEL_TYPES = frozenset({
    "exaone4", "falcon_h1", "glm4", "granite", "hunyuan_v1_dense", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3",
})  # fmt: skip
GEGLU_MODEL_TYPES = frozenset({"gemma", "gemma2", "gemma3_text"})
COMPARED_MODEL_TYPES = SWIGLU_MODEL_TYPES | GEGLU_MODEL_TYPES
"""Types of models whose outputs and gradients with Liger's kernels were compared with those of the model's own layers.

Only these types get the kernels without a request. Types with mixtures of experts are left out: Liger replaces the layer of the experts,
and an adapter on the experts would be lost. Types with inputs other than text are also left out, because Liger requires a specific class
for each type.
"""
ACTIVATIONS = dict.fromkeys(SWIGLU_MODEL_TYPES, ("silu", "swish")) | dict.fromkeys(GEGLU_MODEL_TYPES, ("gelu_pytorch_tanh",))
"""The activation that Liger's kernel computes, by model type. Liger does not read the activation from the model's configuration."""
MODEL_TYPES_WITHOUT_REWARD_KERNELS = frozenset({"gemma3_text"})
"""Types for which Liger refuses models with a score head."""


def are_kernels_allowed(run: RunConfig) -> bool:
    """Whether the kernels may be used: the spec requests them or leaves the choice to the trainer."""
    return run.spec.model.liger_kernels is not False or _are_kernels_chosen_by_backend(run)


def are_kernels_requested(run: RunConfig) -> bool:
    """Whether the user set `model.ligerKernels: true`."""
    return run.spec.model.liger_kernels is True and LIGER_PATH not in run.defaults


def _are_kernels_chosen_by_backend(run: RunConfig) -> bool:
    """Whether `trainer.backend: unsloth` requests the kernels.

    The backend also requests the kernels if the recorded default is `false`, as in jobs of earlier releases.
    """
    return run.spec.trainer.backend is TrainerBackend.UNSLOTH and LIGER_PATH in run.defaults


def choose_kernels(args: Any, run: RunConfig, hardware: Hardware, config: Any, model_kind: str) -> list[str]:
    """Turn off the kernels in the TrainingArguments if the run cannot use them. Returns notes for the status.

    `config`: the configuration of the base model. `model_kind`: `causal` or `reward`.

    Errors: ConfigError KernelsUnavailable if the user requested the kernels.
    """
    if not args.use_liger_kernel:
        return []
    reason = _find_reason_against_kernels(hardware, config, model_kind)
    if reason is None and not are_kernels_requested(run) and not _are_kernels_chosen_by_backend(run):
        reason = _find_reason_not_to_choose_kernels(run, config)
    if reason is None:
        reason = _gather_first_reason(_run_test_kernel(hardware))
    if reason is None:
        return []
    if are_kernels_requested(run):
        raise ConfigError(
            "KernelsUnavailable", f"{LIGER_PATH} is true, but {reason}", hint="remove ligerKernels, or write `ligerKernels: false`"
        )
    args.use_liger_kernel = False
    return [f"{LIGER_PATH} is off: {reason}"] if hardware.device.type == "cuda" else []


def notes_about_active_kernels(run: RunConfig, model_type: str) -> list[str]:
    """Return a note that the run uses the kernels, with the reason; an empty list if the user requested them."""
    if are_kernels_requested(run):
        return []
    reason = f"the run uses a GPU, and Liger has kernels for models of type {model_type}"
    return [f"{LIGER_PATH} is on: {reason} ({LIGER_PATH}: false turns them off)"]


def _find_reason_against_kernels(hardware: Hardware, config: Any, model_kind: str) -> str | None:
    """Return why the kernels would fail, or would compute other results than the model's own layers. None if they work."""
    if hardware.device.type != "cuda":
        return f"the run trains on {hardware.device.type}, and Liger's kernels need a CUDA GPU"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed in this image"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        return f"liger-kernel cannot be imported: {_first_line(error)}"
    model_type = config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"Liger has no kernels for models of type {model_type}"
    if model_kind == "reward" and model_type in MODEL_TYPES_WITHOUT_REWARD_KERNELS:
        return f"Liger has no kernels for reward models of type {model_type}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATIONS.get(model_type, (activation,)):
        return f"Liger's kernel for models of type {model_type} does not compute the model's activation {activation}"
    return None


def _find_reason_not_to_choose_kernels(run: RunConfig, config: Any) -> str | None:
    """Return why the trainer uses the kernels only if the user requests them. None if the trainer also uses the kernels without a request."""
    import torch

    if torch.version.hip is not None:
        return "this release was not tested with Liger's kernels on AMD GPUs"
    if run.spec.model.trust_remote_code and getattr(config, "auto_map", None):
        return "the model runs code from its repository (model.trustRemoteCode)"
    if config.model_type not in COMPARED_MODEL_TYPES:
        return f"this release was not tested with Liger's kernels for models of type {config.model_type}"
    return None


def _run_test_kernel(hardware: Hardware) -> str | None:
    """Run one small kernel. Returns why it fails, with the first line of the error; None if it runs.

    Triton compiles a kernel when it first runs. Triton needs a C compiler, a folder that it can write to, and a GPU that it supports.
    """
    import torch
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    dtype = torch.bfloat16 if hardware.computes_in_bf16 else torch.float16 if hardware.computes_in_fp16 else torch.float32
    try:
        LigerRMSNorm(32).to(hardware.device, dtype)(torch.ones(1, 32, device=hardware.device, dtype=dtype)).sum().item()
    except Exception as error:  # Triton raises exceptions of many types
        return f"Liger's kernels do not run on {hardware.name}: {_first_line(error)}"
    return None


def _gather_first_reason(reason: str | None) -> str | None:
    """Return the reason of the first rank that has a reason, so that all ranks make the same choice."""
    from accelerate.utils import gather_object

    return next((rank_reason for rank_reason in gather_object([reason]) if rank_reason is not None), None)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]
