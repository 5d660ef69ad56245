"""Estimates how much GPU memory a model needs, and decides whether its layers must be spread over several GPUs."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer.verification.weight_files import BYTES_BY_FORMAT, DamagedFileError, read_folder

MEMORY_FACTOR = 1.2
"""Memory that a model needs to compute short rows, divided by the size of its weights."""


def estimate_needed_bytes(folder: Path, bytes_per_value: int) -> int | None:
    """Return how many bytes of memory the model in a folder needs. None if its files cannot be read. `bytes_per_value`: bytes of one weight."""
    try:
        tensors = read_folder(folder)
    except (DamagedFileError, OSError):
        return None
    value_count = sum(tensor.size // BYTES_BY_FORMAT.get(tensor.dtype, 1) for tensor in tensors.values())
    return int(value_count * bytes_per_value * MEMORY_FACTOR)


def must_be_spread(folder: Path, bytes_per_value: int, free_bytes: list[int]) -> bool:
    """Whether the model is too large for the first GPU, but fits on all GPUs together. `free_bytes`: bytes of free memory of each GPU."""
    needed_bytes = estimate_needed_bytes(folder, bytes_per_value)
    return needed_bytes is not None and free_bytes[0] < needed_bytes <= sum(free_bytes)


def free_gpu_bytes() -> list[int]:
    """Return the free memory of each GPU of the pod in bytes."""
    import torch

    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
