"""FLOPs per token, utilisation and throughput agree with published figures and with counted parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.speed import (
    ModelShape,
    SpeedMeter,
    attention_flops,
    flops_per_token,
    peak_flops_of,
    trained_parameters,
)

from tests.support.learning import run_training
from tests.support.tiny import make_tiny_model

LLAMA_3_8B = ModelShape(matrix_parameters=7_504_924_672, layers=32, heads=32, head_size=128)
"""Llama 3 8B: 8.03 billion parameters, minus the embedding table of 128,256 x 4,096."""
VOCABULARY_SIZE, HIDDEN_SIZE, MLP_SIZE, LAYER_COUNT = 48, 16, 32, 2
EMBEDDING_PARAMETERS = VOCABULARY_SIZE * HIDDEN_SIZE
LAYER_PARAMETERS = 4 * HIDDEN_SIZE * HIDDEN_SIZE + 3 * HIDDEN_SIZE * MLP_SIZE + 2 * HIDDEN_SIZE
"""Parameters of a layer: attention, the three matrices of the MLP, two norms."""
BODY_PARAMETERS = LAYER_COUNT * LAYER_PARAMETERS + HIDDEN_SIZE
"""Parameters of all layers and of the norm before the head."""


def test_published_throughputs_give_the_published_utilisation() -> None:
    # Published for a LoRA run of an 8B model with 4096 tokens and causal attention: 12,473 tokens/s, 402 TFLOP/s.
    lora_flops_per_second = 12_473 * flops_per_token(LLAMA_3_8B, 4096, frozen_base=True)
    assert lora_flops_per_second / 1e12 == pytest.approx(402, rel=0.05)
    # Published for full training with 8192 tokens: 5,762 tokens/s, 33.7 % of 989 TFLOP/s. This figure ignores that attention is causal.
    full_training_flops_per_second = 5_762 * flops_per_token(LLAMA_3_8B, 8192, frozen_base=False, is_causal=False)
    assert full_training_flops_per_second / 989e12 == pytest.approx(0.337, abs=0.003)


def test_a_frozen_base_needs_two_thirds_of_the_matrix_flops() -> None:
    assert flops_per_token(LLAMA_3_8B, 0, frozen_base=True) == 4 * LLAMA_3_8B.matrix_parameters
    assert flops_per_token(LLAMA_3_8B, 0, frozen_base=False) == 6 * LLAMA_3_8B.matrix_parameters
    assert attention_flops(LLAMA_3_8B, 100, is_causal=False) == 2 * attention_flops(LLAMA_3_8B, 100)


def test_peak_flops_are_known_by_device_name_and_none_otherwise() -> None:
    assert peak_flops_of("NVIDIA H100 80GB HBM3") == peak_flops_of("NVIDIA H200") == 989e12
    assert peak_flops_of("NVIDIA H100 PCIe") == 756e12
    assert peak_flops_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert (peak_flops_of("NVIDIA L40"), peak_flops_of("NVIDIA L40S"), peak_flops_of("NVIDIA L4")) == (181e12, 362e12, 121e12)
    assert peak_flops_of("NVIDIA H100 NVL") == peak_flops_of("NVIDIA H200 NVL") == 835e12
    assert peak_flops_of("NVIDIA GH200 480GB") == 989e12
    for unknown_device in (
        "cpu",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA RTX A1000",
        "NVIDIA T400 4GB",
        "NVIDIA GB200",
        "NVIDIA H20",
    ):
        assert peak_flops_of(unknown_device) is None, unknown_device
    assert peak_flops_of("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops_of("NVIDIA GeForce RTX 4090 Laptop GPU") is peak_flops_of("NVIDIA GeForce RTX 4090 D") is None


def test_meter_measures_throughput_between_log_lines() -> None:
    meter = SpeedMeter(flops_of_token=2.0, peak_flops=100.0, rank_count=2)
    assert meter.read(10, now=1.0) == {}
    meter.waited_seconds = 0.5
    assert meter.read(60, now=3.0) == {"tokens_per_second": 25.0, "data_wait_share": 0.25, "mfu": 0.25}
    assert meter.read(60, now=4.0) == {}
    assert "mfu" not in (SpeedMeter(flops_of_token=1, peak_flops=None, rank_count=1).read(1, now=1.0) | {})


def make_llama_model(*, is_tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=MLP_SIZE, num_hidden_layers=LAYER_COUNT, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=is_tied,
        )
    )  # fmt: skip


def add_lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    ).get_base_model()


def count_matrix_and_trained_parameters(model: Any) -> tuple[int, int]:
    return ModelShape.of(model).matrix_parameters, trained_parameters(model)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    ("options", "trained_count"),
    [
        ({}, 0),
        ({"modules_to_save": ["lm_head"]}, EMBEDDING_PARAMETERS),
        ({"modules_to_save": ["embed_tokens"]}, 0),
        (
            {"modules_to_save": ["norm"]},
            (2 * LAYER_COUNT + 1) * HIDDEN_SIZE,
        ),  # PEFT selects every module whose name ends with this text
    ],
)
def test_a_module_saved_in_full_is_counted_once(options: dict[str, Any], trained_count: int, is_tied: bool) -> None:
    model = add_lora(make_llama_model(is_tied=is_tied), **options)
    assert count_matrix_and_trained_parameters(model) == (BODY_PARAMETERS + EMBEDDING_PARAMETERS, trained_count)


def test_trained_embedding_rows_do_not_hide_the_head() -> None:
    matrix_count, trained_count = count_matrix_and_trained_parameters(
        add_lora(make_llama_model(), trainable_token_indices={"embed_tokens": [1], "lm_head": [1]})
    )
    assert (matrix_count - BODY_PARAMETERS - EMBEDDING_PARAMETERS, trained_count) == (HIDDEN_SIZE, HIDDEN_SIZE)


@pytest.mark.parametrize("is_tied", [False, True])
def test_modules_that_are_trained_in_full_need_additional_gradient_flops(is_tied: bool) -> None:
    model = make_llama_model(is_tied=is_tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name or "embed_tokens" in name or "lm_head" in name)
    trained_count = 3 * HIDDEN_SIZE * MLP_SIZE + EMBEDDING_PARAMETERS  # the embedding lookup is not a matrix product
    assert count_matrix_and_trained_parameters(model) == (BODY_PARAMETERS + EMBEDDING_PARAMETERS, trained_count)
    flops = flops_per_token(ModelShape.of(model), 0, frozen_base=True, trained_count=trained_parameters(model))
    assert flops == 4 * (BODY_PARAMETERS + EMBEDDING_PARAMETERS) + 2 * trained_count


def test_flops_with_every_parameter_trained_equal_those_of_full_training() -> None:
    shape = ModelShape.of(make_llama_model())
    flops_with_all_trained = flops_per_token(shape, 8, frozen_base=True, trained_count=trained_parameters(make_llama_model()))
    assert flops_with_all_trained == flops_per_token(shape, 8, frozen_base=False)


def test_only_the_experts_to_which_a_token_is_routed_are_counted() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY_SIZE, hidden_size=HIDDEN_SIZE, intermediate_size=MLP_SIZE, num_hidden_layers=LAYER_COUNT, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, num_local_experts=8, num_experts_per_tok=2,
        )
    )  # fmt: skip
    attention, router, expert, norms = 4 * HIDDEN_SIZE * HIDDEN_SIZE, 8 * HIDDEN_SIZE, 3 * HIDDEN_SIZE * MLP_SIZE, 2 * HIDDEN_SIZE
    layer_parameters = LAYER_COUNT * (attention + router + 2 * expert + norms)
    assert count_matrix_and_trained_parameters(model) == (layer_parameters + HIDDEN_SIZE + EMBEDDING_PARAMETERS,) * 2


def test_reported_utilisation_counts_the_trained_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.objective import sft

    monkeypatch.setattr(sft, "peak_flops_of", lambda name: 1e12)
    method = {"type": "spectrum", "spectrum": {"layers": [1]}}
    outcome = run_training(
        tmp_path, make_tiny_model(tmp_path / "tiny"), {"method": method, "training": {"maxSteps": 2}}
    )
    report = outcome.extra["data"]["tokens"]["train"]
    matrix_count, trained_count = count_matrix_and_trained_parameters(outcome.model)
    assert 0 < trained_count < matrix_count
    flops = flops_per_token(
        ModelShape.of(outcome.model), report["tokens"] / report["rows"], frozen_base=True, trained_count=trained_count
    )
    (line,) = [line for line in outcome.logs if "mfu" in line]
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e12, rel=1e-9)
