"""Token metrics on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from finetune_trainer.evaluation.token_metrics import OutputHead, TokenCounts, shifted_predictions

from tests.support.gpu import require_cuda

pytestmark = pytest.mark.gpu


def test_token_metrics_on_a_gpu_equal_those_on_the_cpu() -> None:
    """The labels may be on the CPU, and the counts of a GPU can be merged with counts on the CPU."""
    require_cuda()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 33, 16, generator=generator)
    labels = torch.randint(0, 500, (4, 33), generator=generator)
    labels[:, :5] = -100
    layer = torch.nn.Linear(16, 500)
    on_cpu, on_gpu = TokenCounts(500), TokenCounts(500, "cuda")
    on_cpu.add(shifted_predictions(hidden, labels, OutputHead(layer, 500, softcap=5.0), logits_per_chunk=20_000))
    layer.to("cuda")
    on_gpu.add(shifted_predictions(hidden.cuda(), labels, OutputHead(layer, 500, softcap=5.0), logits_per_chunk=20_000))
    assert on_gpu.label_counts.is_cuda and on_gpu.tokens == on_cpu.tokens == 4 * 28
    for name in ("loss", "perplexity", "accuracy", "precision", "f1"):
        assert getattr(on_gpu, name).value == pytest.approx(getattr(on_cpu, name).value, rel=1e-4)
    on_cpu.merge(on_gpu)
    assert on_cpu.tokens == 2 * on_gpu.tokens
