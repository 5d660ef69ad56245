"""The space that a checkpoint needs on the pod's disk, and in host memory while it is written in the background.

The size of the first checkpoint is estimated. Whether a checkpoint fits is decided for all ranks together, because each rank
must do the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_trainer.disk import free_bytes
from finetune_trainer.host_memory import available_bytes

DISK_RESERVE_BYTES = 32 * 1024 * 1024
MEMORY_RESERVE_BYTES = 256 * 1024 * 1024
OPTIMIZER_BYTES = 8
"""Bytes of optimizer state per trained parameter (Adam's two moments), to estimate the size of the first checkpoint."""
COPIES_OF_SHARDED = 2
"""FSDP gathers weights and state in host memory before they are copied. DeepSpeed also copies the state, and saves its own 32-bit weights."""


@dataclass(frozen=True)
class CopySpace:
    """Host memory of the pod with the least free memory, in bytes."""

    needed: int
    """For the copies of all ranks of this pod."""
    available: int

    @property
    def fits(self) -> bool:
        return self.needed + MEMORY_RESERVE_BYTES <= self.available


def has_disk_space(args: Any, world_size: int, last_size: int, model: Any) -> bool:
    """Whether the disks of all ranks can hold another checkpoint. The result is the same on all ranks. `last_size`: 0 for the first checkpoint."""
    has_space = free_bytes(Path(str(args.output_dir)).parent) > (last_size or estimated_size(model)) + DISK_RESERVE_BYTES
    return min(_share_with_ranks(int(has_space), world_size, args.device)) == 1


def space_for_copies(trainer: Any, world_size: int) -> CopySpace:
    """Compare the host memory that the copies of the training state need with the available memory. The result is the same on all ranks."""
    device, ranks_per_pod = trainer.args.device, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    needed = _share_with_ranks(copy_bytes(trainer), world_size, device)
    available = _share_with_ranks(available_bytes(), world_size, device)
    pods = [slice(first, first + ranks_per_pod) for first in range(0, world_size, ranks_per_pod)]
    return min((CopySpace(sum(needed[pod]), min(available[pod])) for pod in pods), key=lambda space: space.available - space.needed)


def copy_bytes(trainer: Any) -> int:
    """Bytes that this rank copies for a checkpoint: the weights on the rank that writes them, and the part of the optimizer's state that it writes."""
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = sum(_bytes_of(weight) for weight in _written_weights(trainer.model)) if trainer.args.should_save else 0
    moments = 0
    if is_sharded or trainer.args.should_save:  # without sharding, only this rank writes the state, which all ranks have
        moments = sum(_bytes_of(getattr(value, "_local_tensor", value)) for value in _state_tensors(trainer.optimizer))
    return (weights + moments) * (COPIES_OF_SHARDED if is_sharded else 1)


def estimated_size(model: Any) -> int:
    """Estimated bytes of the first checkpoint: written weights, and the optimizer's moments of the trained weights."""
    trained_numbers = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) if model is not None else 0
    return sum(_bytes_of(weight) for weight in _written_weights(model)) + trained_numbers * OPTIMIZER_BYTES


def _written_weights(model: Any) -> list[Any]:
    """The weights in a checkpoint: those of the adapter, or all weights of a model without an adapter."""
    if model is None:
        return []
    has_adapter = hasattr(model, "peft_config") or hasattr(getattr(model, "module", None), "peft_config")
    return [parameter for parameter in model.parameters() if parameter.requires_grad or not has_adapter]


def _state_tensors(optimizer: Any) -> Iterator[Any]:
    for state in (getattr(optimizer, "state", None) or {}).values():
        values = state.values() if isinstance(state, dict) else ()
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _bytes_of(tensor: Any) -> int:
    """Bytes of the unsharded tensor."""
    return int(getattr(tensor, "ds_numel", None) or tensor.numel()) * int(tensor.element_size())


def _share_with_ranks(number: int, world_size: int, device: Any) -> list[int]:
    """Return the numbers of all ranks, in their order. A collective: every rank must call it."""
    if world_size == 1:
        return [number]
    numbers = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    torch.distributed.all_gather(numbers, torch.tensor([number], dtype=torch.int64, device=device))
    return [int(one) for one in numbers]
