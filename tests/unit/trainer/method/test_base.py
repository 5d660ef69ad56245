"""The checks that all methods share, and the registration of methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError, InternalError
from finetune_api.spec.enums import MethodType
from finetune_trainer.method.base import METHOD_CLASSES, Method, TrainableModel
from finetune_trainer.method.full import Full
from finetune_trainer.method.registry import all_methods

from tests.support.learning import create_method_for_run, make_run


def make_llama_model(*, is_tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, tie_word_embeddings=is_tied,
        )
    )  # fmt: skip


def make_lora_with_saved_module(folder: Path, *, is_tied: bool, uses_fsdp: bool, saved_module: str = "embed_tokens") -> TrainableModel:
    """Return a small model with LoRA adapters and one module that is trained in full."""
    run, inputs = make_run(folder, folder / "model", {"method": {"lora": {"rank": 2, "modulesToSave": [saved_module]}}})
    trainable_model: TrainableModel = create_method_for_run(run, inputs, fsdp=uses_fsdp).make_trainable(make_llama_model(is_tied=is_tied))
    return trainable_model


def test_every_method_of_the_api_has_one_class() -> None:
    assert set(all_methods()) == set(MethodType)


def test_a_second_class_for_the_same_method_is_refused() -> None:
    all_methods()
    with pytest.raises(AssertionError, match="Full and Copy both implement method.type full"):
        type("Copy", (Method,), {}, types=(MethodType.FULL,))
    assert METHOD_CLASSES[MethodType.FULL] is Full


def test_a_method_that_trains_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def freeze_all(self: Full, model: Any) -> TrainableModel:
        return TrainableModel(model.requires_grad_(False), None)  # type: ignore[arg-type] # not read

    monkeypatch.setattr(Full, "apply", freeze_all)
    run, inputs = make_run(tmp_path, tmp_path / "model", {"method": {"type": "full"}})
    with pytest.raises(InternalError) as caught:
        create_method_for_run(run, inputs).make_trainable(make_llama_model())
    assert caught.value.code == "NothingTrainable"


def test_fsdp_refuses_a_saved_module_that_shares_its_weight(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_lora_with_saved_module(tmp_path, is_tied=True, uses_fsdp=True)
    assert caught.value.code == "StrategyAndMethod"
    assert "modulesToSave names embed_tokens, but this module shares its weight with another module" in caught.value.message


@pytest.mark.parametrize(
    ("is_tied", "uses_fsdp", "saved_module"), [(True, False, "embed_tokens"), (False, True, "embed_tokens"), (True, True, "norm")]
)
def test_saved_modules_with_their_own_weight_or_without_fsdp_are_trained(
    is_tied: bool, uses_fsdp: bool, saved_module: str, tmp_path: Path
) -> None:
    assert make_lora_with_saved_module(tmp_path, is_tied=is_tied, uses_fsdp=uses_fsdp, saved_module=saved_module).trainable_count > 0
