"""Prefix and prompt tuning: train virtual tokens that precede every row, and freeze the model."""

from __future__ import annotations

from typing import Any

from finetune_api.rules import value_or_default
from finetune_api.spec.enums import MethodType, OutputKind

from finetune_trainer.method.base import TrainableModel
from finetune_trainer.method.peft_method import PeftMethod, peft_task_type


class PromptLearning(PeftMethod, types=(MethodType.PREFIX_TUNING, MethodType.PROMPT_TUNING)):
    """Trains `method.promptLength` virtual tokens: before the input (prompt tuning), or before every layer's keys and values (prefix tuning)."""

    def apply(self, model: Any) -> TrainableModel:
        """Wrap the frozen model with PEFT, which adds the virtual tokens."""
        from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

        method = self.context.run.spec.method
        config_class = PrefixTuningConfig if method.type is MethodType.PREFIX_TUNING else PromptTuningConfig
        prompt_length = int(value_or_default(method, "prompt_length"))
        peft_model = get_peft_model(model, config_class(task_type=peft_task_type(model), num_virtual_tokens=prompt_length))
        return TrainableModel(peft_model, OutputKind.ADAPTER)
