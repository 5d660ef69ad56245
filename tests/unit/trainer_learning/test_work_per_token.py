"""Which of a model's parameters cost work for every token, and which of those are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.speed import Shape, flops_per_token, trained_parameters

from tests.support.learning import go
from tests.support.tiny import make_tiny_model

WORDS, WIDE, INNER, LAYERS = 48, 16, 32, 2
TABLE = WORDS * WIDE
LAYER = 4 * WIDE * WIDE + 3 * WIDE * INNER + 2 * WIDE
"""Attention, the three matrices of the MLP, two norms."""
BODY = LAYERS * LAYER + WIDE
"""With the norm before the head."""


def llama(*, tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDE, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def with_adapter(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **options)
    ).get_base_model()


def work(model: Any) -> tuple[int, int]:
    return Shape.of(model).matrix_parameters, trained_parameters(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, 0),
        ({"modules_to_save": ["lm_head"]}, TABLE),
        ({"modules_to_save": ["embed_tokens"]}, 0),
        ({"modules_to_save": ["norm"]}, (2 * LAYERS + 1) * WIDE),  # whatever ends so
    ],
)
def test_a_copy_that_is_trained_stands_for_its_original(options: dict[str, Any], trained: int, tied: bool) -> None:
    assert work(with_adapter(llama(tied=tied), **options)) == (BODY + TABLE, trained)


def test_rows_of_new_tokens_leave_the_head_where_it_is() -> None:
    matrices, trained = work(with_adapter(llama(), trainable_token_indices={"embed_tokens": [1], "lm_head": [1]}))
    assert (matrices - BODY - TABLE, trained) == (WIDE, WIDE)


@pytest.mark.parametrize("tied", [False, True])
def test_what_spectrum_trains_costs_gradients_of_its_own(tied: bool) -> None:
    model = llama(tied=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name or "embed_tokens" in name or "lm_head" in name)
    learned = 3 * WIDE * INNER + TABLE  # the lookup itself is no product
    assert work(model) == (BODY + TABLE, learned)
    flops = flops_per_token(Shape.of(model), 0, frozen_base=True, trained=trained_parameters(model))
    assert flops == 4 * (BODY + TABLE) + 2 * learned


def test_what_is_all_trained_costs_six_a_parameter() -> None:
    shape = Shape.of(llama())
    whole = flops_per_token(shape, 8, frozen_base=True, trained=trained_parameters(llama()))
    assert whole == flops_per_token(shape, 8, frozen_base=False)


def test_a_token_is_multiplied_with_its_experts_alone() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=WORDS, hidden_size=WIDE, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, num_local_experts=8, num_experts_per_tok=2,
        )
    )  # fmt: skip
    attention, router, expert, norms = 4 * WIDE * WIDE, 8 * WIDE, 3 * WIDE * INNER, 2 * WIDE
    layers = LAYERS * (attention + router + 2 * expert + norms)
    assert work(model) == (layers + WIDE + TABLE,) * 2


def test_a_run_counts_what_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.objective import sft

    monkeypatch.setattr(sft, "peak_of", lambda name: 1e12)
    method = {"type": "spectrum", "spectrum": {"layers": [1]}}
    outcome = go(tmp_path, make_tiny_model(tmp_path / "tiny"), {"method": method, "training": {"maxSteps": 2}})
    report = outcome.extra["data"]["tokens"]["train"]
    matrices, trained = work(outcome.model)
    assert 0 < trained < matrices
    flops = flops_per_token(
        Shape.of(outcome.model), report["tokens"] / report["rows"], frozen_base=True, trained=trained
    )
    (line,) = [line for line in outcome.logs if "mfu" in line]
    assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e12, rel=1e-9)
