"""FLOPs and paces, against published figures."""

from __future__ import annotations

import pytest
from finetune_trainer.speed import Meter, Shape, attention_flops, flops_per_token, peak_of

LLAMA_3_8B = Shape(matrix_parameters=7_504_924_672, layers=32, heads=32, head_size=128)
"""8.03 billion parameters less the embedding table of 128,256 x 4,096."""


def test_published_figures_come_out() -> None:
    # A LoRA run of an 8B model at 4096 tokens, reported at 12,473 tokens/s and 402 TFLOP/s with causal attention.
    lora = 12_473 * flops_per_token(LLAMA_3_8B, 4096, frozen_base=True)
    assert lora / 1e12 == pytest.approx(402, rel=0.05)
    # Full training at 8192 tokens, 5,762 tokens/s: 33.7 % of 989 TFLOP/s when attention is counted as not causal.
    full = 5_762 * flops_per_token(LLAMA_3_8B, 8192, frozen_base=False, causal=False)
    assert full / 989e12 == pytest.approx(0.337, abs=0.003)


def test_adapters_cost_two_thirds_of_the_matrix_work() -> None:
    assert flops_per_token(LLAMA_3_8B, 0, frozen_base=True) == 4 * LLAMA_3_8B.matrix_parameters
    assert flops_per_token(LLAMA_3_8B, 0, frozen_base=False) == 6 * LLAMA_3_8B.matrix_parameters
    assert attention_flops(LLAMA_3_8B, 100, causal=False) == 2 * attention_flops(LLAMA_3_8B, 100)


def test_peaks_are_found_by_name_and_unknown_ones_are_not_made_up() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == peak_of("NVIDIA H200") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert (peak_of("NVIDIA L40"), peak_of("NVIDIA L40S"), peak_of("NVIDIA L4")) == (181e12, 362e12, 121e12)
    assert peak_of("NVIDIA H100 NVL") == peak_of("NVIDIA H200 NVL") == 835e12
    assert peak_of("NVIDIA GH200 480GB") == 989e12
    for other in (
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA RTX A1000",
        "NVIDIA T400 4GB",
        "NVIDIA GB200",
        "NVIDIA H20",
    ):
        assert peak_of(other) is None, other
    assert peak_of("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_of("NVIDIA GeForce RTX 4090 Laptop GPU") is peak_of("NVIDIA GeForce RTX 4090 D") is None


def test_meter_measures_between_lines() -> None:
    meter = Meter(flops_of_token=2.0, peak=100.0, ranks=2)
    assert meter.read(10, now=1.0) == {}
    meter.waited = 0.5
    assert meter.read(60, now=3.0) == {"tokens_per_second": 25.0, "data_wait_share": 0.25, "mfu": 0.25}
    assert meter.read(60, now=4.0) == {}
    assert "mfu" not in (Meter(flops_of_token=1, peak=None, ranks=1).read(1, now=1.0) | {})
