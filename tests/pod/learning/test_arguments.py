"""The TrainingArguments of runs on a GPU. These tests need no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError

from tests.support.learning import make_run

pytestmark = pytest.mark.pod


def build_gpu_arguments(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Return the TrainingArguments of a run on one GPU."""
    import torch
    from finetune_trainer.arguments import shared_arguments
    from finetune_trainer.distributed import DistributedStrategy
    from finetune_trainer.hardware import Hardware

    run, inputs = make_run(folder, Path("/models/tiny"), {"resources": {"gpusPerNode": 1}, **spec})
    hardware = Hardware(torch.device("cuda", 0), "NVIDIA H100", torch.bfloat16, True, False, "sdpa")
    strategy = DistributedStrategy(run, hardware, 1)
    return {**shared_arguments(run, inputs, hardware, strategy, has_validation_data=False), "notes": strategy.notes}


def test_backend_unsloth_changes_defaults(tmp_path: Path) -> None:
    arguments = build_gpu_arguments(tmp_path, {"trainer": {"backend": "unsloth"}})
    assert (arguments["optim"], arguments["use_liger_kernel"]) == ("paged_adamw_8bit", True)
    assert arguments["activation_checkpointing_kwargs"] == {"use_reentrant": False, "offload": True}
    assert "trainer.backend unsloth selects options that save GPU memory" in arguments["notes"][0]


def test_backend_unsloth_keeps_the_values_of_the_spec(tmp_path: Path) -> None:
    training = {"optimizer": "adamw_torch", "gradientCheckpointing": "disabled", "maxSteps": 4}
    arguments = build_gpu_arguments(
        tmp_path, {"trainer": {"backend": "unsloth"}, "training": training, "model": {"ligerKernels": False}}
    )
    assert (arguments["optim"], arguments["activation_checkpointing"], arguments["use_liger_kernel"]) == (
        "adamw_torch",
        False,
        False,
    )


def test_backend_transformers_changes_no_default(tmp_path: Path) -> None:
    arguments = build_gpu_arguments(tmp_path, {})
    assert (arguments["optim"], arguments["notes"]) == ("adamw_torch_fused", [])
    assert arguments["activation_checkpointing_kwargs"] == {"use_reentrant": False}
    assert (arguments["bf16"], arguments["use_cpu"], arguments["logging_nan_inf_filter"]) == (True, False, False)


def test_backend_unsloth_needs_a_gpu(tmp_path: Path) -> None:
    import torch
    from finetune_trainer.arguments import MemorySavers
    from finetune_trainer.hardware import Hardware

    run, _ = make_run(tmp_path, Path("/models/tiny"), {"trainer": {"backend": "unsloth"}})
    with pytest.raises(ConfigError, match="BackendNeedsGpu"):
        MemorySavers.choose(run, Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa"))


@pytest.mark.parametrize(
    ("text", "is_memory_error"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:1970, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
            True,
        ),
        ("HIP out of memory. Tried to allocate 2.00 GiB", True),
        ("NCCL error: unhandled system error, Connection reset by peer", False),
        ("the reward function ran out of memory cells", False),
    ],
)
def test_out_of_memory_messages_of_every_library_are_recognised(text: str, is_memory_error: bool) -> None:
    from finetune_trainer.train import to_finetune_error

    assert to_finetune_error(RuntimeError(text)).exit_code == (71 if is_memory_error else 70)
