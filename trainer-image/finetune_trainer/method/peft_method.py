"""The base class of all methods that train a PEFT adapter on a frozen base model."""

from __future__ import annotations

from typing import Any

from finetune_trainer.method.base import Method, MethodContext, TrainableModel
from finetune_trainer.method.precision import TrainedWeightsCopy, widen_trained_weights

ADAPTER_NAME = "default"
"""PEFT's name for the trained adapter."""


class PeftMethod(Method):
    """Trains a PEFT adapter. The trained weights have 32 bits where the strategy allows it, and the Trainer gets the learning-rate ratio of LoRA+."""

    def __init__(self, context: MethodContext):
        super().__init__(context)
        self._weights_before_construction: TrainedWeightsCopy | None = None

    @property
    def keeps_base_dtype(self) -> bool:
        """Whether adapters must have the dtype of the base model.

        ZeRO stage 3 requires the same dtype for all weights, because it shards weights of only one dtype.
        """
        return self.context.strategy.keeps_base_dtype

    def after_apply(self, trainable: TrainableModel) -> None:
        hardware = self.context.hardware
        if (hardware.computes_in_bf16 or hardware.computes_in_fp16) and not self.keeps_base_dtype:
            widen_trained_weights(trainable.model)
        self._weights_before_construction = TrainedWeightsCopy(trainable.model)

    def on_trainer_created(self, trainer: Any) -> None:
        assert self._weights_before_construction is not None, "after_apply runs before the Trainer is built"
        self._weights_before_construction.restore(trainer.model)
        super().on_trainer_created(trainer)
        lora = self.context.run.spec.method.lora
        if lora is not None and lora.plus_ratio is not None:
            trainer.lora_plus_ratio = lora.plus_ratio


def peft_task_type(model: Any) -> Any:
    """Return PEFT's task type for the model. With the type for a reward model (a sequence classifier), PEFT also trains and saves the head."""
    from peft import TaskType

    return TaskType.SEQ_CLS if "SequenceClassification" in type(model).__name__ else TaskType.CAUSAL_LM


def linear_layer_names(model: Any) -> list[str]:
    """Return the sorted last parts of the names of all linear layers, including 4-bit and 8-bit layers."""
    classes = ("Linear", "Linear4bit", "Linear8bitLt", "Conv1D")
    return sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if type(module).__name__ in classes})
