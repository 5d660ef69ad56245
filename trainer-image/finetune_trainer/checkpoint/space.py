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
COPIES_OF_DEEPSPEED = 2
"""DeepSpeed also copies the state before it saves it, and saves its own 32-bit weights."""


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
    """Bytes that this rank copies for a checkpoint: its part of the optimizer's state, and the trained weights on the rank that writes them."""
    weights = sum(_bytes_of(weight) for weight in _trained_weights(trainer.model)) if trainer.args.should_save else 0
    if trainer.is_fsdp_enabled:
        weights *= 2  # the gathered weights, and their copies
    moments = sum(_bytes_of(getattr(value, "_local_tensor", value)) for value in _state_tensors(trainer.optimizer))
    return (weights + moments) * (COPIES_OF_DEEPSPEED if trainer.is_deepspeed_enabled else 1)


def estimated_size(model: Any) -> int:
    """Estimated bytes of the first checkpoint: trained weights and the optimizer's moments."""
    return sum(_bytes_of(weight) + weight.numel() * OPTIMIZER_BYTES for weight in _trained_weights(model))


def _trained_weights(model: Any) -> list[Any]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad] if model is not None else []


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
