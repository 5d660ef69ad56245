"""Recomputes the activations of as few layers as possible in each micro-batch.

The layers of transformers read their flag `gradient_checkpointing` in each forward pass (`GradientCheckpointingLayer`, v5.23). So the trainer
enables gradient checkpointing for the whole run, and changes the flags between two micro-batches. Recomputed activations equal kept
activations, because torch restores the random state for dropout and the precision of autocast.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def count_kept_layers(layer_count: int, token_count: int, layer_tokens: int) -> int:
    """Return how many of `layer_count` layers keep their activations in a micro-batch with `token_count` tokens.

    `layer_tokens`: the largest product (number of layers times number of tokens) whose activations fit into memory. If some layers recompute, the
    number of layers that keep their activations is one less than this product permits, because the layer that is being recomputed needs memory too.
    """
    return layer_count if layer_count * token_count <= layer_tokens else max(0, layer_tokens // token_count - 1)


class RecomputationPerBatch:
    """Decides for each micro-batch which layers of a model recompute their activations.

    The last layers keep their activations, because the backward pass frees the activations of these layers first, before the gradients of the
    other layers need memory. The decision depends only on the number of tokens, so a resumed run makes the same decisions.
    """

    def __init__(self, model: nn.Module, kept_layer_tokens: int) -> None:
        """`model`: a model with gradient checkpointing enabled. `kept_layer_tokens`: see `layer_tokens` of `count_kept_layers`."""
        self._kept_layer_tokens = kept_layer_tokens
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing]
        self._kept_layer_count = 0

    def prepare(self, batch: dict[str, Any]) -> None:
        """Set the flags of all layers for the micro-batch `batch`. Padding counts as tokens."""
        kept_layer_count = count_kept_layers(len(self._layers), batch["input_ids"].numel(), self._kept_layer_tokens)
        if kept_layer_count == self._kept_layer_count:
            return
        for number, layer in enumerate(self._layers):
            layer.gradient_checkpointing = number < len(self._layers) - kept_layer_count
        self._kept_layer_count = kept_layer_count
