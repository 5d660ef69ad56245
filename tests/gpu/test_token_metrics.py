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
    cpu_counts, gpu_counts = TokenCounts(500), TokenCounts(500, "cuda")
    cpu_counts.add(shifted_predictions(hidden, labels, OutputHead(layer, 500, softcap=5.0), logits_per_chunk=20_000))
    layer.to("cuda")
    gpu_counts.add(shifted_predictions(hidden.cuda(), labels, OutputHead(layer, 500, softcap=5.0), logits_per_chunk=20_000))
    assert gpu_counts.label_counts.is_cuda and gpu_counts.tokens == cpu_counts.tokens == 4 * 28
    for name in ("loss", "perplexity", "accuracy", "precision", "f1"):
        assert getattr(gpu_counts, name).value == pytest.approx(getattr(cpu_counts, name).value, rel=1e-4)
    cpu_counts.merge(gpu_counts)
    assert cpu_counts.tokens == 2 * gpu_counts.tokens
