"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from typing import Any

from finetune_api.spec.enums import MethodType, OutputKind

from finetune_trainer.method.base import Method, TrainableModel
from finetune_trainer.method.vision_parts import TrainedParts


class Full(Method, types=(MethodType.FULL,)):
    """Trains every floating-point parameter. In a vision-language model, this method trains only the parameters of the parts that `method.vision` selects."""

    def apply(self, model: Any) -> TrainableModel:
        """Unfreeze the parameters, and add a note if their dtype is not float32."""
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        parts = TrainedParts.of(self.context.run)
        if parts is not None:
            parts.freeze(model)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        notes = [f"weights are trained in {dtype} because of model.dtype"] if dtype != "float32" else []
        notes += [] if parts is None else parts.describe_frozen_parts(model)
        return TrainableModel(model, OutputKind.MODEL, notes=notes)
