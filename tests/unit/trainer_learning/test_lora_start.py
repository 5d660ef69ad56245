"""Ways to start an adapter that the model itself does not allow: refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.method import lora

from tests.support.learning import go, make_run
from tests.support.tiny import make_tiny_model


def llama(**options: Any) -> Any:
    """Two small layers, in memory alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, **options,
        )
    )  # fmt: skip


def gpt2() -> Any:
    """A model whose layers keep their weights the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def start(folder: Path, model: Any, **options: Any) -> Any:
    """Adapters with these options of `method.lora`."""
    run, inputs = make_run(folder, folder / "model", {"method": {"lora": options}})
    return lora.apply(run, inputs, model)


@pytest.mark.parametrize(
    ("model", "options", "named"),
    [
        (llama, {"init": "pissa", "rank": 20}, "rank 20 on model.layers.0.self_attn.k_proj, a Linear of 32 x 16"),
        (llama, {"init": "olora", "rank": 20}, "rank 20 on model.layers.0.self_attn.k_proj, a Linear of 32 x 16"),
        (llama, {"init": "pissa", "rank": 4, "targetModules": ["embed_tokens", "q_proj"]}, "embed_tokens, a Embedding"),
        (gpt2, {"init": "olora", "rank": 4}, "transformer.h.0.attn.c_attn, a Conv1D of 32 x 96"),
        (
            gpt2,
            {"init": "olora", "rank": 4, "targetModules": ["attn.c_proj"]},
            "transformer.h.0.attn.c_proj, a Conv1D of 32 x 32",
        ),
    ],
)
def test_a_layer_that_the_start_cannot_split_is_refused(
    model: Any, options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, model(), **options)
    assert caught.value.code == "InitUnavailable"
    assert named in caught.value.message


def test_a_base_that_is_stored_quantised_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.is_quantized = True
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, model, init="olora", rank=4)
    assert (caught.value.code, "stored quantised" in caught.value.message) == ("InitUnavailable", True)


@pytest.mark.parametrize(("model", "init"), [(llama, "pissa"), (llama, "olora"), (gpt2, "pissa")])
def test_what_can_be_split_keeps_its_start_on_disk(model: Any, init: str, tmp_path: Path) -> None:
    applied = start(tmp_path, model(), init=init, rank=16)
    assert applied.initial_adapter is not None
    assert (applied.initial_adapter / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(("model", "init"), [(llama, "pissa"), (llama, "olora"), (gpt2, "pissa")])
def test_a_start_says_what_the_base_says(model: Any, init: str, tmp_path: Path) -> None:
    """Square layers, of which no shape tells the way round."""
    whole, ids = model().eval(), torch.arange(8)[None]
    with torch.no_grad():
        before = whole(ids).logits
        asked = ["attn.c_proj"] if model is gpt2 else ["q_proj", "o_proj"]
        after = start(tmp_path, whole, init=init, rank=4, targetModules=asked).model.eval()(ids).logits
    assert torch.allclose(before, after, atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "raw")


def eva(rank: int, batch: int) -> dict[str, Any]:
    lora = {"init": "eva", "rank": rank, "targetModules": ["q_proj"]}
    return {"method": {"lora": lora}, "training": {"maxSteps": 1, "batchSizePerDevice": batch}}


def test_directions_are_found_in_batches_that_hold_them(model: Path, tmp_path: Path) -> None:
    assert len(go(tmp_path, model, eva(24, 2)).losses) == 1


@pytest.mark.parametrize(
    ("rank", "batch", "told"),
    [(32, 1, "looks for 32 directions (method.lora.rank) in batches of which none has more than 18 tokens"), (65, 8, "a layer is given 64 numbers")],
)  # fmt: skip
def test_more_directions_than_there_can_be_are_refused(
    rank: int, batch: int, told: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        go(tmp_path, model, eva(rank, batch))
    assert (caught.value.code, told in caught.value.message) == ("InitUnavailable", True)


def test_directions_that_do_not_settle_are_given_up(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "EVA_BATCHES", 2)  # one batch finds them, and it takes another two to see that they stay
    with pytest.raises(ConfigError) as caught:
        go(tmp_path, model, eva(24, 2))
    assert (caught.value.code, "in 2 batches" in caught.value.message) == ("InitUnavailable", True)
