"""For every type of model for which the trainer chooses Liger's kernels, they compute the same as the model's own layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from finetune_trainer.kernels import COMPARED_MODEL_TYPES, MODEL_TYPES_WITHOUT_REWARD_KERNELS

from tests.support.gpu import require_cuda

pytestmark = pytest.mark.gpu
COMPARISON_SCRIPT = """
import sys
from tests.support.kernels import compare_kernels

print(*(compare_kernels(sys.argv[1], sys.argv[2], "cuda") or ["missing"]))
"""


@pytest.mark.parametrize("kind", ["causal", "reward"])
@pytest.mark.parametrize("model_type", sorted(COMPARED_MODEL_TYPES))
def test_kernels_compute_the_outputs_and_gradients_of_the_models_layers(model_type: str, kind: str) -> None:
    """Each type of model runs in its own process, because Liger replaces functions of transformers."""
    require_cuda()
    pytest.importorskip("liger_kernel", reason="liger-kernel is only published for x86-64")
    if kind == "reward" and model_type in MODEL_TYPES_WITHOUT_REWARD_KERNELS:
        pytest.skip("Liger refuses a score head for this type")
    command = [sys.executable, "-c", COMPARISON_SCRIPT, model_type, kind]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    if result.stdout.split()[-1] == "missing":
        pytest.skip("transformers has no such model with this kind of head")
    output_error, gradient_error = map(float, result.stdout.split()[-2:])
    assert output_error < 1e-4 and gradient_error < 1e-3
