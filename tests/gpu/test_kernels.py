"""Liger's kernels compute what the model's own layers compute, for every type of model for which the trainer chooses them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
COMPARISON_SCRIPT = """
import sys
from tests.support.kernels import compare_kernels

print(*compare_kernels(sys.argv[1], sys.argv[2], "cuda"))
"""


@pytest.mark.parametrize("kind", ["causal", "reward"])
def test_kernels_compute_the_outputs_and_gradients_of_the_models_layers(kind: str) -> None:
    """Each type runs in its own process, because Liger replaces functions of transformers."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("liger_kernel", reason="liger-kernel is only published for x86-64")
    from finetune_trainer.kernels import COMPARED_TYPES, TYPES_WITHOUT_REWARD_KERNELS

    root = Path(__file__).parents[2]
    for model_type in sorted(COMPARED_TYPES - (TYPES_WITHOUT_REWARD_KERNELS if kind == "reward" else set())):
        command = [sys.executable, "-c", COMPARISON_SCRIPT, model_type, kind]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, (model_type, result.stderr[-2000:])
        output_error, gradient_error = map(float, result.stdout.split()[-2:])
        assert output_error < 1e-4 and gradient_error < 1e-3, (model_type, output_error, gradient_error)
