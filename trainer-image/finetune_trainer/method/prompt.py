"""Prefix and prompt tuning: learned virtual tokens before every row; the model itself is frozen."""

from __future__ import annotations

from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.rules import value_or_default
from finetune_api.spec.enums import MethodType, OutputKind

from finetune_trainer.method.base import Applied
from finetune_trainer.method.lora import task_of


def apply(run: RunConfig, model: Any) -> Applied:
    """Put `method.promptLength` virtual tokens before the input (prompt) or before every layer's keys and values (prefix)."""
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    length = int(value_or_default(run.spec.method, "prompt_length"))
    if run.spec.method.type is MethodType.PREFIX_TUNING:
        config = PrefixTuningConfig(task_type=task_of(model), num_virtual_tokens=length)
    else:
        config = PromptTuningConfig(task_type=task_of(model), num_virtual_tokens=length)
    return Applied(get_peft_model(model, config), OutputKind.ADAPTER)
