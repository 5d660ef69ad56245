"""What of the spec becomes which argument, where no run on this machine can show it; and what is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError

from tests.support.learning import make_run

pytestmark = pytest.mark.pod


def gpu_arguments(folder: Path, spec: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a run on one GPU."""
    import torch
    from finetune_trainer.arguments import common
    from finetune_trainer.distributed import Plan
    from finetune_trainer.hardware import Hardware

    run, inputs = make_run(folder, Path("/models/tiny"), {"resources": {"gpusPerNode": 1}, **spec})
    hardware = Hardware(torch.device("cuda", 0), "NVIDIA H100", torch.bfloat16, True, False, "sdpa")
    plan = Plan(run, hardware, 1)
    return {**common(run, inputs, hardware, plan, evaluates=False), "notes": plan.notes}


def test_backend_unsloth_fills_what_nobody_set(tmp_path: Path) -> None:
    found = gpu_arguments(tmp_path, {"trainer": {"backend": "unsloth"}})
    assert (found["optim"], found["use_liger_kernel"]) == ("paged_adamw_8bit", True)
    assert found["activation_checkpointing_kwargs"] == {"use_reentrant": False, "offload": True}
    assert "backend unsloth is this trainer's own single-GPU path" in found["notes"][0]


def test_backend_unsloth_leaves_what_was_set(tmp_path: Path) -> None:
    training = {"optimizer": "adamw_torch", "gradientCheckpointing": "disabled", "maxSteps": 4}
    found = gpu_arguments(
        tmp_path, {"trainer": {"backend": "unsloth"}, "training": training, "model": {"ligerKernels": False}}
    )
    assert (found["optim"], found["activation_checkpointing"], found["use_liger_kernel"]) == (
        "adamw_torch",
        False,
        False,
    )


def test_backend_transformers_changes_nothing(tmp_path: Path) -> None:
    found = gpu_arguments(tmp_path, {"model": {"ligerKernels": True}})
    assert (found["optim"], found["use_liger_kernel"], found["notes"]) == ("adamw_torch_fused", True, [])
    assert found["activation_checkpointing_kwargs"] == {"use_reentrant": False}
    assert (found["bf16"], found["use_cpu"], found["logging_nan_inf_filter"]) == (True, False, False)


def test_backend_unsloth_needs_a_gpu(tmp_path: Path) -> None:
    import torch
    from finetune_trainer.arguments import Tuned
    from finetune_trainer.hardware import Hardware

    run, _ = make_run(tmp_path, Path("/models/tiny"), {"trainer": {"backend": "unsloth"}})
    with pytest.raises(ConfigError, match="BackendNeedsGpu"):
        Tuned.of(run, Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa"))


PRELOAD = """
import os, sys
from pathlib import Path
from tests.support.learning import make_run
from finetune_trainer import imports, train
run, _ = make_run(Path(sys.argv[1]), Path("/models/tiny"), {"dataset": {"numProc": 3}})
train.preload(run)
for name in ("bitsandbytes", "deepspeed"):
    assert sys.modules.get(name) is None, name
from peft.import_utils import is_bnb_available
assert not is_bnb_available()
assert os.environ["RAYON_NUM_THREADS"] == "3"
assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
run, _ = make_run(Path(sys.argv[1]), Path("/models/tiny"), {"method": {"type": "qlora"}})
assert imports.needs_bitsandbytes(run) and not imports.needs_deepspeed(run)
"""


def test_a_plain_job_imports_neither_bitsandbytes_nor_deepspeed(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", PRELOAD, str(tmp_path)],
        cwd=root,
        env=_env(root),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def _env(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
