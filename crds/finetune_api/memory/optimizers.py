"""Counts the bytes of the state and of the temporary tensors of optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from finetune_api.memory.tape import Parameter

MIN_QUANTIZED_VALUES = 4096
"""Smallest number of values in a tensor whose state bitsandbytes quantises. The state of smaller tensors has 32 bits."""
VALUES_PER_SCALE = 256
"""Number of values that share one 32-bit scale in the 8-bit state of bitsandbytes."""


@dataclass(frozen=True)
class Optimizer:
    """The memory that an optimizer needs for each trained tensor."""

    moment_count: int = 2
    """Number of state tensors with as many values as the weight."""
    moment_bytes: float | None = None
    """Bytes of each value of the state. None: the same number of bytes as for a value of the weight. 1: the 8-bit state of bitsandbytes."""
    is_factored: bool = False
    """Whether the state is one row and one column instead of a full moment, as in Adafactor."""
    temporary_copies_of_largest: float = 0
    """Memory of temporary tensors in the optimizer step, in copies of the largest trained weight."""
    temporary_copies_of_all: float = 0
    """Memory of temporary tensors in the optimizer step, in copies of all trained weights."""
    is_on_host: bool = False
    """Whether the state is in host memory, or moves to host memory when the GPU has no free memory."""

    def state_bytes(self, parameters: Sequence[Parameter], shard_count: int) -> list[float]:
        """Return the bytes of each state tensor on one of `shard_count` ranks."""
        return [] if self.is_on_host else [byte_count / shard_count for parameter in parameters for byte_count in self._compute_state_bytes(parameter)]

    def _compute_state_bytes(self, weight: Parameter) -> list[float]:
        if self.is_factored:
            if len(weight.shape) < 2:
                return [weight.numel * 4]
            row_count = prod(weight.shape[:-1])
            return [row_count * 4, weight.numel / weight.shape[-2] * 4]
        if self.moment_bytes == 1 and weight.numel >= MIN_QUANTIZED_VALUES:
            return [weight.numel + weight.numel / VALUES_PER_SCALE * 4] * self.moment_count
        item_bytes = 4 if self.moment_bytes == 1 else self.moment_bytes or weight.item_bytes
        return [weight.numel * item_bytes] * self.moment_count

    def temporary_bytes(self, parameters: Sequence[Parameter], shard_count: int) -> float:
        """Return the bytes of the temporary tensors of one optimizer step on one of `shard_count` ranks."""
        if self.is_factored:
            return self._compute_adafactor_temporary_bytes(parameters, shard_count)
        bytes_per_parameter = [parameter.numel * parameter.item_bytes / shard_count for parameter in parameters] or [0]
        return self.temporary_copies_of_largest * max(bytes_per_parameter) + self.temporary_copies_of_all * sum(bytes_per_parameter)

    def _compute_adafactor_temporary_bytes(self, parameters: Sequence[Parameter], shard_count: int) -> float:
        """Return the bytes of Adafactor's temporary tensors at their peak.

        These tensors are the update of the previous weight, and the update and the squared gradient of the current weight, all in 32 bits. 16-bit weights
        and gradients also need 32-bit copies.
        """
        peak_value_count = previous_value_count = 0
        for weight in parameters:
            peak_value_count = max(peak_value_count, previous_value_count + weight.numel * (2 if weight.item_bytes == 4 else 4))
            previous_value_count = weight.numel
        return peak_value_count * 4 / shard_count


ADAMW_FUSED, ADAMW_FOREACH = Optimizer(), Optimizer(temporary_copies_of_all=1)
ADAMW_8BIT, PAGED_ADAMW_8BIT = Optimizer(moment_bytes=1), Optimizer(moment_bytes=1, is_on_host=True)
PAGED_ADAMW = Optimizer(is_on_host=True)
SGD, ADAFACTOR = Optimizer(moment_count=0), Optimizer(moment_count=0, is_factored=True)
ONE_MOMENT_FOREACH = Optimizer(moment_count=1, temporary_copies_of_all=1)
"""rmsprop and adagrad of torch. The state is the mean or the sum of squared gradients. Each step temporarily allocates the square root of the state."""
ONE_MOMENT, ONE_MOMENT_8BIT = Optimizer(moment_count=1), Optimizer(moment_count=1, moment_bytes=1)
"""rmsprop of bitsandbytes."""
ADEMAMIX, ADEMAMIX_8BIT = Optimizer(moment_count=3), Optimizer(moment_count=3, moment_bytes=1)
"""AdEMAMix keeps two means of the gradients and one mean of the squared gradients."""
LION, LION_8BIT = Optimizer(moment_count=1, temporary_copies_of_largest=1), Optimizer(moment_count=1, moment_bytes=1)
