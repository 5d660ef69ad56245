"""Computes the space that a checkpoint needs on the pod's disk, and in host memory while it is written in the background.

The size of the first checkpoint is estimated. All ranks get the same result, because either all ranks or none must save a checkpoint.
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
OPTIMIZER_BYTES_PER_PARAMETER = 8
"""Bytes of optimizer state for each trained parameter (Adam's two moments), to estimate the size of the first checkpoint."""
SHARDED_MEMORY_FACTOR = 2
"""Host memory that a checkpoint of sharded training needs, divided by the size of the copied state. With FSDP, weights and optimizer state are
gathered in host memory before they are copied. With DeepSpeed, the optimizer state is copied too, and DeepSpeed's own 32-bit weights are saved."""


@dataclass(frozen=True)
class CopySpace:
    """Needed and available host memory in bytes, in the pod that would have the least memory left after copying."""

    needed_bytes: int
    """Bytes that the copies of all ranks of the pod need together."""
    available_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the copies fit into the available memory."""
        return self.needed_bytes + MEMORY_RESERVE_BYTES <= self.available_bytes


def has_disk_space(training_arguments: Any, world_size: int, last_size_bytes: int, model: Any) -> bool:
    """Whether the disks of all ranks can hold another checkpoint.

    All ranks get the same result. `last_size_bytes`: size of the last checkpoint, or 0 before the first.
    """
    needed_bytes = last_size_bytes or estimate_first_checkpoint_bytes(model)
    has_local_space = free_bytes(Path(str(training_arguments.output_dir)).parent) > needed_bytes + DISK_RESERVE_BYTES
    return min(_gather_from_ranks(int(has_local_space), world_size, training_arguments.device)) == 1


def measure_copy_space(trainer: Any, world_size: int) -> CopySpace:
    """Return the host memory that the copies of the training state need, and the available memory. The result is the same on all ranks."""
    device, ranks_per_pod = trainer.args.device, int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    needed_bytes_by_rank = _gather_from_ranks(count_copied_bytes(trainer), world_size, device)
    available_bytes_by_rank = _gather_from_ranks(available_bytes(), world_size, device)
    ranks_of_pods = [slice(first, first + ranks_per_pod) for first in range(0, world_size, ranks_per_pod)]
    pod_spaces = (CopySpace(sum(needed_bytes_by_rank[pod_ranks]), min(available_bytes_by_rank[pod_ranks])) for pod_ranks in ranks_of_pods)
    return min(pod_spaces, key=lambda space: space.available_bytes - space.needed_bytes)


def count_copied_bytes(trainer: Any) -> int:
    """Return how many bytes this rank copies for a checkpoint: the weights if this rank writes them, and the part of the optimizer's state that it writes."""
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weight_bytes = sum(_count_bytes(weight) for weight in _list_written_weights(trainer.model)) if trainer.args.should_save else 0
    optimizer_bytes = 0
    if is_sharded or trainer.args.should_save:  # Without sharding, every rank has the whole state, and one rank writes it.
        optimizer_bytes = sum(_count_bytes(getattr(value, "_local_tensor", value)) for value in _list_state_tensors(trainer.optimizer))
    return (weight_bytes + optimizer_bytes) * (SHARDED_MEMORY_FACTOR if is_sharded else 1)


def estimate_first_checkpoint_bytes(model: Any) -> int:
    """Return the estimated bytes of the first checkpoint: the written weights, and the optimizer's moments of the trained weights."""
    trained_parameter_count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) if model is not None else 0
    return sum(_count_bytes(weight) for weight in _list_written_weights(model)) + trained_parameter_count * OPTIMIZER_BYTES_PER_PARAMETER


def _list_written_weights(model: Any) -> list[Any]:
    """Return the weights that a checkpoint contains: the trained weights of a model with an adapter, or all weights of a model without an adapter."""
    if model is None:
        return []
    has_adapter = hasattr(model, "peft_config") or hasattr(getattr(model, "module", None), "peft_config")
    return [parameter for parameter in model.parameters() if parameter.requires_grad or not has_adapter]


def _list_state_tensors(optimizer: Any) -> Iterator[Any]:
    for state in (getattr(optimizer, "state", None) or {}).values():
        values = state.values() if isinstance(state, dict) else ()
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _count_bytes(tensor: Any) -> int:
    """Return the size of a tensor in bytes. For a shard of DeepSpeed, return the size of the whole tensor."""
    return int(getattr(tensor, "ds_numel", None) or tensor.numel()) * int(tensor.element_size())


def _gather_from_ranks(value_of_this_rank: int, world_size: int, device: Any) -> list[int]:
    """Return the values of all ranks, in the order of the ranks. A collective: every rank must call this function."""
    if world_size == 1:
        return [value_of_this_rank]
    values_by_rank = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    torch.distributed.all_gather(values_by_rank, torch.tensor([value_of_this_rank], dtype=torch.int64, device=device))
    return [int(value) for value in values_by_rank]
