"""Loads the committed model or adapter in a fresh process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_api import rules
from finetune_api.errors import NotFoundError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind

from finetune_trainer import model as models
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs
from finetune_trainer.stages.files import StageTask
from finetune_trainer.stages.placement import free_gpu_bytes, must_be_spread

ATTENTION_FOR_PADDED_BATCHES = ("sdpa", "eager")
"""Attention implementations that accept padded batches."""


def load_tokenizer(run: RunConfig, inputs: Inputs, task: StageTask) -> Any:
    """Load the tokenizer that was saved with the model."""
    tokenizer_folder = task.model if (task.model / "tokenizer_config.json").exists() else inputs.tokenizer or inputs.model
    tokenizer, _ = models.load_tokenizer(_remove_new_tokens(run), inputs.model_copy(update={"tokenizer": tokenizer_folder}))
    return tokenizer


def load_final_model(run: RunConfig, inputs: Inputs, task: StageTask, hardware: Hardware, tokenizer: Any) -> Any:
    """Load the model in evaluation mode. An adapter is loaded together with its base model. Errors: NotFoundError ModelUnreadable."""
    is_adapter = task.kind is OutputKind.ADAPTER
    base_model = load_base_model(run, inputs if is_adapter else inputs.model_copy(update={"model": task.model}), hardware, quantizes=is_adapter)
    if not is_adapter:
        return base_model
    from peft import PeftModel

    if run.spec.model.new_tokens and base_model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        base_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    try:
        return PeftModel.from_pretrained(base_model, task.model).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise NotFoundError("ModelUnreadable", f"the adapter {task.uri} cannot be loaded: {error}") from error


def load_base_model(run: RunConfig, inputs: Inputs, hardware: Hardware, *, quantizes: bool = True) -> Any:
    """Load a model in evaluation mode on the device of `hardware`. If the model does not fit on one GPU, load it on all GPUs of the pod."""
    from finetune_trainer.attention import require_supported_attention

    attention_name = hardware.attention if hardware.attention in ATTENTION_FOR_PADDED_BATCHES else "sdpa"
    attention, _ = require_supported_attention(run, models.load_config(run, inputs), attention_name)
    is_quantized = quantizes and rules.base_bits(run.spec) is not None
    is_spread = hardware.device.type == "cuda" and not is_quantized and must_be_spread(inputs.model, _compute_bytes_per_value(hardware), free_gpu_bytes())
    model, _ = models.load_model(run, inputs, replace(hardware, attention=attention), quantize=quantizes, is_spread=is_spread)
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(hardware.device)
    return model.eval()


def _compute_bytes_per_value(hardware: Hardware) -> int:
    """Return how many bytes one weight needs in memory. If the model keeps the format of its files (`auto`), return the largest possible value: 4."""
    import torch

    dtype = hardware.dtype if isinstance(hardware.dtype, torch.dtype) else getattr(torch, str(hardware.dtype), torch.float32)
    return int(dtype.itemsize)


def _remove_new_tokens(run: RunConfig) -> RunConfig:
    """Return a copy of the run configuration without `model.newTokens`, because the saved tokenizer already has these tokens."""
    model = run.spec.model.model_copy(update={"new_tokens": None})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"model": model})})
