"""A module that is trained in full beside an adapter, while its weight is another module's, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_trainer import method

from tests.support.learning import make_run


def applied(folder: Path, *, tied: bool, fsdp: bool, saved: str = "embed_tokens") -> Any:
    """LoRA on two small layers, with a module of its own beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    run, inputs = make_run(folder, folder / "model", {"method": {"lora": {"rank": 2, "modulesToSave": [saved]}}})
    return method.apply(run, inputs, model, fsdp=fsdp)


def test_fsdp_cannot_shard_a_shared_weight_beside_its_copy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        applied(tmp_path, tied=True, fsdp=True)
    assert caught.value.code == "StrategyAndMethod"
    assert "embed_tokens is trained in full beside the adapter" in caught.value.message


@pytest.mark.parametrize(
    ("tied", "fsdp", "saved"), [(True, False, "embed_tokens"), (False, True, "embed_tokens"), (True, True, "norm")]
)
def test_what_is_apart_or_whole_is_trained(tied: bool, fsdp: bool, saved: str, tmp_path: Path) -> None:
    assert applied(tmp_path, tied=tied, fsdp=fsdp, saved=saved).trainable > 0
