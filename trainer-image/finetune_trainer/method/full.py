"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind

from finetune_trainer.method.base import Applied


def apply(run: RunConfig, model: Any) -> Applied:
    """Make every floating-point parameter trainable."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    notes = []
    if str(next(model.parameters()).dtype) != "torch.float32":
        notes.append(
            f"weights are trained in {str(next(model.parameters()).dtype).removeprefix('torch.')}, as model.dtype says"
        )
    return Applied(model, OutputKind.MODEL, notes=notes)
