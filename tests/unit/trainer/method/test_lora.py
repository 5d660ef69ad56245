"""The initialisations of LoRA adapters. If a model does not support an initialisation, the run is refused before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError

from tests.support.learning import create_method_for_run, make_run


def make_llama_model(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, **options,
        )
    )  # fmt: skip


def make_gpt2_model() -> Any:
    """Return a model whose linear weights are transposed (inputs first)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def apply_lora(folder: Path, model: Any, **options: Any) -> Any:
    """Apply LoRA adapters with these options of `method.lora` to the model."""
    run, inputs = make_run(folder, folder / "model", {"method": {"lora": options}})
    return create_method_for_run(run, inputs).apply(model)


@pytest.mark.parametrize(
    ("make_model", "options", "message_part"),
    [
        (make_llama_model, {"init": "pissa", "rank": 20}, "rank 20 on model.layers.0.self_attn.k_proj (Linear, 32 x 16)"),
        (make_llama_model, {"init": "olora", "rank": 20}, "rank 20 on model.layers.0.self_attn.k_proj (Linear, 32 x 16)"),
        (make_llama_model, {"init": "pissa", "rank": 4, "targetModules": ["embed_tokens", "q_proj"]}, "embed_tokens (Embedding, "),
        (make_gpt2_model, {"init": "olora", "rank": 4}, "transformer.h.0.attn.c_attn (Conv1D, 32 x 96)"),
        (
            make_gpt2_model,
            {"init": "olora", "rank": 4, "targetModules": ["attn.c_proj"]},
            "transformer.h.0.attn.c_proj (Conv1D, 32 x 32)",
        ),
    ],
)
def test_a_layer_that_the_initialisation_does_not_support_is_refused(
    make_model: Any, options: dict[str, Any], message_part: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_lora(tmp_path, make_model(), **options)
    assert caught.value.code == "InitUnavailable"
    assert message_part in caught.value.message


def test_an_initialisation_that_changes_base_weights_is_refused_for_a_quantised_model(tmp_path: Path) -> None:
    model = make_llama_model()
    model.is_quantized = True
    with pytest.raises(ConfigError) as caught:
        apply_lora(tmp_path, model, init="olora", rank=4)
    assert (caught.value.code, "stored quantised" in caught.value.message) == ("InitUnavailable", True)


@pytest.mark.parametrize(("make_model", "init"), [(make_llama_model, "pissa"), (make_llama_model, "olora"), (make_gpt2_model, "pissa")])
def test_the_initial_adapter_is_saved(make_model: Any, init: str, tmp_path: Path) -> None:
    trainable_model = apply_lora(tmp_path, make_model(), init=init, rank=16)
    assert trainable_model.initial_adapter is not None
    assert (trainable_model.initial_adapter / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("make_model", "init"), [(make_llama_model, "pissa"), (make_llama_model, "olora"), (make_gpt2_model, "pissa")])
def test_the_initialised_adapter_does_not_change_the_outputs(make_model: Any, init: str, tmp_path: Path) -> None:
    """The layers are square, so the shape of a weight does not show whether it is transposed."""
    base_model, token_ids = make_model().eval(), torch.arange(8)[None]
    with torch.no_grad():
        logits_before = base_model(token_ids).logits
        target_modules = ["attn.c_proj"] if make_model is make_gpt2_model else ["q_proj", "o_proj"]
        logits_after = apply_lora(tmp_path, base_model, init=init, rank=4, targetModules=target_modules).model.eval()(token_ids).logits
    assert torch.allclose(logits_before, logits_after, atol=1e-5)
