"""Types of GPUs with their memory, peak speed of dense 16-bit matrix products, and memory bandwidth, from the vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class GpuType:
    """A type of GPU, such as the H100 with 80 GB."""

    memory_bytes: int
    """Memory as `nvidia-smi` reports it."""
    peak_flops: float
    """Floating-point operations per second of dense bf16 (or fp16) matrix products."""
    bandwidth_bytes_per_second: float
    """Bytes per second that the GPU can read from its memory."""
    device_name_words: str
    """Words in the driver's device name by which the type is recognised, such as `RTX 4090`."""


def _make_gpu(memory_mebibytes: int, peak_teraflops: float, bandwidth_gigabytes_per_second: float, device_name_words: str) -> GpuType:
    return GpuType(memory_mebibytes * MEBIBYTE, peak_teraflops * 1e12, bandwidth_gigabytes_per_second * 1e9, device_name_words)


GPU_TYPES = {
    "t4-16gb": _make_gpu(15360, 65, 320, "T4"), "v100-16gb": _make_gpu(16384, 125, 900, "V100"), "v100-32gb": _make_gpu(32768, 125, 900, "V100"),
    "a10-24gb": _make_gpu(23028, 125, 600, "A10"), "l4-24gb": _make_gpu(23034, 121, 300, "L4"), "rtx4090-24gb": _make_gpu(24564, 165, 1008, "RTX 4090"),
    "a100-40gb": _make_gpu(40960, 312, 1555, "A100"), "a40-48gb": _make_gpu(46068, 150, 696, "A40"), "l40s-48gb": _make_gpu(46068, 362, 864, "L40S"),
    "a100-80gb": _make_gpu(81920, 312, 2039, "A100"), "h100-80gb": _make_gpu(81559, 989, 3350, "H100"), "gh200-96gb": _make_gpu(97871, 989, 4000, "GH200"),
    "h200-141gb": _make_gpu(143771, 989, 4800, "H200"), "b200-180gb": _make_gpu(183359, 2250, 8000, "B200"),
}  # fmt: skip
"""Common types of GPUs, by the names that `finetune plan --gpu` and `nodePools[].gpuType` accept."""

SLOWER_DEVICE_PATTERN = re.compile(r"\b(MIG|RTX A\d+|Laptop|Max-Q|4090 D|H100 PCIe|H100 NVL|H200 NVL|A10G)\b")
"""Matches device names that contain the words of a type in GPU_TYPES, but belong to a slower GPU."""


def find_gpu_type(device_name: str) -> GpuType | None:
    """Return the type of a GPU, or None if it is not known. `device_name`: the name that the driver reports, such as `NVIDIA H100 80GB HBM3`."""
    if SLOWER_DEVICE_PATTERN.search(device_name):
        return None
    candidates = {name: gpu for name, gpu in GPU_TYPES.items() if re.search(rf"\b{gpu.device_name_words}\b", device_name)}
    size_match = re.search(r"\b(\d+)\s?GB\b", device_name)  # A100 and V100 exist with two memory sizes
    candidates_of_size = [gpu for name, gpu in candidates.items() if size_match is not None and name.endswith(f"-{size_match[1]}gb")]
    return next(iter([*candidates_of_size, *candidates.values()]), None)
