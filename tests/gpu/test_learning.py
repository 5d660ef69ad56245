"""Features of the trainer that need a CUDA device: 16-bit training, fused kernels, paged optimizers, activations in host memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu import require_cuda
from tests.support.learning import TEN_ROWS, RunOutcome, merge_mappings, run_training
from tests.support.tiny import make_tiny_model

pytestmark = pytest.mark.gpu
SIXTY_STEPS = {
    "training": {"maxSteps": 60, "batchSizePerDevice": 10, "scheduler": "constant"},
    "resources": {"gpusPerNode": 1, "processesPerNode": 1},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes the kernels support. Without a CUDA device, the tests of this file are skipped."""
    require_cuda()
    import bitsandbytes  # noqa: F401  it must be imported before a run hides the package

    return make_tiny_model(tmp_path_factory.mktemp("models") / "gpu", hidden=256)


RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": {"type": "full"}},
    "lora": {"method": {"lora": {"dropout": 0}}, "training": {"learningRate": 2e-3}},
    "qlora": {"method": {"type": "qlora", "lora": {"dropout": 0}}, "training": {"learningRate": 2e-3}},
    "loftq": {"method": {"lora": {"dropout": 0, "init": "loftq"}}, "training": {"learningRate": 2e-3}},
    "new tokens": {
        "model": {"newTokens": ["<new>"]},
        "method": {"lora": {"dropout": 0}},
        "training": {"learningRate": 2e-3},
    },
    "packed": {"method": {"type": "full"}, "dataset": {"packing": True}},
    "offloaded activations": {"method": {"type": "full"}, "training": {"gradientCheckpointing": "unsloth"}},
    "liger": {"method": {"type": "full"}, "model": {"ligerKernels": True}},
    "backend unsloth": {"method": {"type": "full"}, "trainer": {"backend": "unsloth"}},
}


def run_feature(name: str, model: Path, folder: Path) -> RunOutcome:
    if name in ("liger", "backend unsloth") and importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is only published for x86-64")
    return run_training(folder, model, merge_mappings(SIXTY_STEPS, RUNS[name]))


@pytest.mark.parametrize("name", RUNS)
def test_every_feature_learns_on_a_gpu(name: str, model: Path, tmp_path: Path) -> None:
    outcome = run_feature(name, model, tmp_path)
    assert outcome.losses[-1] < 0.5 * outcome.losses[0]
    assert outcome.resolved["device"] not in ("cpu", None)
    assert outcome.logs[-2]["peak_memory_gb"] > 0
    if name == "backend unsloth":
        assert any("paged_adamw_8bit" in note and "liger kernels True" in note for note in outcome.notes)


def test_a_reward_model_trains_32_bit_weights_on_a_16_bit_base(model: Path, tmp_path: Path) -> None:
    import torch

    from tests.support.preferences import PREFERENCE_PAIRS

    spec = {"method": {"lora": {"dropout": 0}}, "trainer": {"type": "reward"}, "training": {"maxSteps": 2}}
    outcome = run_training(tmp_path, model, merge_mappings(SIXTY_STEPS, spec), PREFERENCE_PAIRS)
    parameter_types = {(parameter.requires_grad, parameter.dtype) for parameter in outcome.model.parameters()}
    assert parameter_types == {(True, torch.float32), (False, torch.bfloat16)}


def test_full_training_stores_weights_in_32_bits_during_training(model: Path, tmp_path: Path) -> None:
    import torch

    outcome = run_training(tmp_path, model, merge_mappings(SIXTY_STEPS, {"method": {"type": "full"}, "training": {"maxSteps": 2}}))
    assert {p.dtype for p in outcome.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", [{"type": "full"}, {"lora": {"dropout": 0}}], ids=["full", "lora"])
def test_packed_sequences_have_the_losses_of_sdpa(method: dict[str, Any], model: Path, tmp_path: Path) -> None:
    spec = {"method": method, "dataset": {"packing": True}, "training": {"maxSteps": 5, "learningRate": 1e-3}}
    outcomes = {
        name: run_training(tmp_path / name, model, merge_mappings(SIXTY_STEPS, {**spec, "model": {"attention": name}}))
        for name in ("auto", "sdpa")
    }
    assert {name: outcome.resolved["attention"] for name, outcome in outcomes.items()} == {"auto": "varlen", "sdpa": "sdpa"}
    assert outcomes["auto"].losses == pytest.approx(outcomes["sdpa"].losses, abs=0.02)
    assert outcomes["auto"].grad_norms == pytest.approx(outcomes["sdpa"].grad_norms, rel=0.1)


@pytest.mark.parametrize("method", [{"type": "full"}, {"lora": {"dropout": 0}}], ids=["full", "lora"])
def test_a_padding_free_run_has_the_losses_of_a_padded_run(method: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Batches have four rows. The last batch of an evaluation of ten rows has only two rows."""
    rows = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "red " * (1 + 17 * i % 50)}]}
        for i, row in enumerate(TEN_ROWS)
    ]
    spec = {
        "method": method, "training": {"maxSteps": 5, "batchSizePerDevice": 4, "gradientAccumulationSteps": 2, "learningRate": 1e-3},
        "evaluation": {"strategy": "steps", "steps": 5},
    }  # fmt: skip
    padding_free_outcome, padded_outcome = (
        run_training(tmp_path / name, model, merge_mappings(SIXTY_STEPS, {**spec, "model": {"attention": name}}), rows, validation=rows)
        for name in ("auto", "sdpa")
    )
    assert [outcome.resolved["attention"] for outcome in (padding_free_outcome, padded_outcome)] == ["varlen", "sdpa"]
    assert padding_free_outcome.losses == pytest.approx(padded_outcome.losses, rel=2e-2)
    assert padding_free_outcome.grad_norms == pytest.approx(padded_outcome.grad_norms, rel=0.1)
    assert padding_free_outcome.eval_losses == pytest.approx(padded_outcome.eval_losses, rel=2e-2) and len(padded_outcome.eval_losses) == 1
    token_counts, expected_token_counts = (
        [line["num_tokens"] for line in outcome.logs if "loss" in line] for outcome in (padding_free_outcome, padded_outcome)
    )
    assert token_counts == expected_token_counts
    assert {line["padding_share"] for line in padding_free_outcome.logs if "loss" in line} == {0.0}
    assert any("concatenated instead of padded" in note for note in padding_free_outcome.notes)


@pytest.mark.parametrize("head_size", [64, 256])
@pytest.mark.parametrize("window", [None, 1, 5, 64], ids=lambda window: f"window {window}")
def test_the_kernel_computes_the_same_as_sdpa_with_a_mask(window: int | None, head_size: int, model: Path) -> None:
    """Compares the forward and the backward pass of one layer with grouped key heads. As in transformers, a window includes the token itself."""
    from types import SimpleNamespace

    import torch
    from finetune_trainer.attention import compute_varlen_attention

    lengths = [7, 1, 40, 200, 64]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    positions = torch.arange(sum(lengths), device="cuda")
    distances = positions[:, None] - positions[None, :]
    mask = (distances >= 0) & (documents[:, None] == documents[None, :])
    mask &= distances < (window or len(positions))
    layer: Any = SimpleNamespace(num_key_value_groups=4, is_causal=True, training=True)
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, len(positions), head_size, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]
    weights = torch.randn(1, len(positions), 8, head_size, device="cuda", dtype=torch.bfloat16)

    def compute_output_and_gradients(attention_mask: torch.Tensor | None, **options: Any) -> list[torch.Tensor]:
        query, key, value = (tensor.clone().requires_grad_() for tensor in inputs)
        output, _ = compute_varlen_attention(layer, query, key, value, attention_mask, scaling=0.1, sliding_window=window, **options)
        output.backward(weights)
        gradients = [tensor.grad for tensor in (query, key, value)]
        return [output, *(gradient for gradient in gradients if gradient is not None)]

    tensors_with_boundaries = compute_output_and_gradients(None, cu_seq_lens_q=starts, max_length_q=max(lengths))
    for tensor, tensor_with_mask in zip(tensors_with_boundaries, compute_output_and_gradients(mask[None, None]), strict=True):
        torch.testing.assert_close(tensor.float(), tensor_with_mask.float(), atol=0.1, rtol=0.05)
