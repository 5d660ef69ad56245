"""Skips GPU tests on machines without a CUDA device. With REHEARSE_ON_CPU=1, the tests run on the CPU instead, which finds mistakes in the tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

IS_REHEARSAL = os.environ.get("REHEARSE_ON_CPU") == "1"
GPU_COUNT = 0 if IS_REHEARSAL else 1
ONE_GPU: dict[str, Any] = {"resources": {"gpusPerNode": GPU_COUNT, "processesPerNode": 1}}


def require_cuda() -> None:
    """Skip the test if there is no CUDA device, even in a rehearsal on the CPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def require_gpu() -> None:
    """Skip the test if there is no CUDA device, except in a rehearsal on the CPU."""
    if not IS_REHEARSAL:
        require_cuda()
