"""State and temporary tensors of optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from finetune_api.memory.tape import Parameter

SMALLEST_QUANTIZED = 4096
"""bitsandbytes keeps the state of smaller tensors in 32 bits."""
BLOCK_VALUES = 256
"""Values that share one 32-bit scale in the 8-bit state of bitsandbytes."""


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps for each trained tensor."""

    moments: int = 2
    """Tensors of state with the size of the weight."""
    moment_bytes: float | None = None
    """Bytes of each value of the state; None: those of the weight. 1: bitsandbytes' 8 bits."""
    is_factored: bool = False
    """Adafactor: one row and one column instead of a moment."""
    temporary_copies: float = 0
    """Temporary tensors of the optimizer step, as copies of the largest weight."""
    temporary_of_all: float = 0
    """Temporary tensors of the optimizer step, as copies of all weights."""
    is_on_host: bool = False
    """Whether the state is in host memory, or is moved there when GPU memory runs out."""

    def state_bytes(self, parameters: Sequence[Parameter], shards: int) -> list[float]:
        """Bytes of each tensor of the state."""
        return [] if self.is_on_host else [count / shards for one in parameters for count in self._state_of(one)]

    def _state_of(self, weight: Parameter) -> list[float]:
        if self.is_factored:
            if len(weight.shape) < 2:
                return [weight.values * 4]
            rows = prod(weight.shape[:-1])
            return [rows * 4, weight.values / weight.shape[-2] * 4]
        if self.moment_bytes == 1 and weight.values >= SMALLEST_QUANTIZED:
            return [weight.values + weight.values / BLOCK_VALUES * 4] * self.moments
        item = 4 if self.moment_bytes == 1 else self.moment_bytes or weight.item_bytes
        return [weight.values * item] * self.moments

    def temporary_bytes(self, parameters: Sequence[Parameter], shards: int) -> float:
        """Bytes of the temporary tensors of one optimizer step."""
        if self.is_factored:
            return self._temporary_of_adafactor(parameters, shards)
        sizes = [one.values * one.item_bytes / shards for one in parameters] or [0]
        return self.temporary_copies * max(sizes) + self.temporary_of_all * sum(sizes)

    def _temporary_of_adafactor(self, parameters: Sequence[Parameter], shards: int) -> float:
        """The update of the weight before, and the squares of this weight's gradient, all in 32 bits. 16-bit weights and gradients are converted."""
        largest = before = 0
        for one in parameters:
            largest = max(largest, before + one.values * (2 if one.item_bytes == 4 else 4))
            before = one.values
        return largest * 4 / shards


ADAMW_FUSED, ADAMW_FOREACH = Optimizer(), Optimizer(temporary_of_all=1)
ADAMW_8BIT, PAGED_ADAMW_8BIT = Optimizer(moment_bytes=1), Optimizer(moment_bytes=1, is_on_host=True)
PAGED_ADAMW = Optimizer(is_on_host=True)
SGD, ADAFACTOR = Optimizer(moments=0), Optimizer(moments=0, is_factored=True)
ONE_MOMENT_FOREACH = Optimizer(moments=1, temporary_of_all=1)
"""rmsprop and adagrad of torch: the mean or sum of squared gradients, and its square root in the step."""
ONE_MOMENT, ONE_MOMENT_8BIT = Optimizer(moments=1), Optimizer(moments=1, moment_bytes=1)
"""rmsprop of bitsandbytes."""
ADEMAMIX, ADEMAMIX_8BIT = Optimizer(moments=3), Optimizer(moments=3, moment_bytes=1)
"""Two means of gradients, and one of squared gradients."""
LION, LION_8BIT = Optimizer(moments=1, temporary_copies=1), Optimizer(moments=1, moment_bytes=1)
