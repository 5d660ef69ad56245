"""Recomputes the activations of large micro-batches only.

The layers of transformers read `gradient_checkpointing` in each forward pass (`GradientCheckpointingLayer`, v5.23). So the trainer enables gradient
checkpointing for the whole run, and changes this flag between two micro-batches. Recomputed activations are equal to kept ones: torch restores the
random state for dropout and the precision of autocast.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class RecomputationPerBatch:
    """Decides for each micro-batch whether the layers of a model recompute their activations.

    The decision depends only on the number of tokens, so a resumed run decides as the interrupted run did.
    """

    def __init__(self, model: nn.Module, max_kept_tokens: int) -> None:
        """`model`: a model with gradient checkpointing enabled. `max_kept_tokens`: largest micro-batch that keeps its activations."""
        self._max_kept_tokens = max_kept_tokens
        self._modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        self._recomputes = True

    def prepare(self, batch: dict[str, Any]) -> None:
        """Set the flag of all layers for a micro-batch. Its token ids include padding."""
        recomputes = batch["input_ids"].numel() > self._max_kept_tokens
        if recomputes is self._recomputes:
            return
        for module in self._modules:
            module.gradient_checkpointing = recomputes
        self._recomputes = recomputes
