"""Context parallelism: the parts of sequences, and the models whose attention several ranks can share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.attention import require_divisible_attention
from finetune_trainer.distributed.context_parallel import PartCollator, SequencePart, gradient_factor


def make_model_config(**config_values: Any) -> Any:
    text_config = SimpleNamespace(**config_values)
    return SimpleNamespace(model_type="tiny", get_text_config=lambda: text_config)


def make_attention_heads(query_heads: int, key_value_heads: int) -> dict[str, Any]:
    return {"num_attention_heads": query_heads, "num_key_value_heads": key_value_heads}


def test_the_label_of_the_last_token_of_a_part_is_the_first_token_of_the_next_part() -> None:
    batch = {"input_ids": torch.arange(1, 7)[None], "labels": torch.tensor([[-100, 2, 3, 4, 5, 6]]), "position_ids": torch.arange(6)[None]}
    parts = [PartCollator(lambda rows: batch, SequencePart(index, 3))(["row"]) for index in range(3)]
    assert [part["input_ids"].tolist() for part in parts] == [[[1, 2]], [[3, 4]], [[5, 6]]]
    assert [part["shift_labels"].tolist() for part in parts] == [[[2, 3]], [[4, 5]], [[6, -100]]]
    assert [part["position_ids"].tolist() for part in parts] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert set(parts[0]) == {"input_ids", "labels", "shift_labels", "position_ids"} and "shift_labels" not in batch


@pytest.mark.parametrize(("query_heads", "key_value_heads", "rank_count"), [(8, 8, 2), (8, 2, 2), (8, 2, 4), (6, 3, 3)])
def test_ranks_can_share_a_divisible_number_of_attention_heads(query_heads: int, key_value_heads: int, rank_count: int) -> None:
    model_config = make_model_config(num_attention_heads=query_heads, num_key_value_heads=key_value_heads, layer_types=["full_attention"] * 2)
    require_divisible_attention(model_config, rank_count)


@pytest.mark.parametrize(
    ("config_values", "rank_count", "problem", "hint"),
    [
        (make_attention_heads(8, 2), 3, "8 attention heads and 2 key-value heads, which 3 ranks cannot share", "write one of 2, 4, 8, or 1"),
        (make_attention_heads(6, 3), 2, "6 attention heads and 3 key-value heads", "write one of 3, 6, or 1"),
        (make_attention_heads(1, 1), 2, "1 attention heads", "write `contextParallelSize: 1`"),
        (make_attention_heads(4, 4) | {"layer_types": ["full_attention", "sliding_attention"]}, 2, "sliding_attention", "of another type than tiny"),
        (make_attention_heads(4, 4) | {"sliding_window": 32}, 2, "a sliding window of 32 tokens", "of another type than tiny"),
        ({}, 2, "models of type tiny have no attention heads", "of another type than tiny"),
    ],
)  # fmt: skip
def test_models_whose_attention_cannot_be_shared_are_refused(config_values: dict[str, Any], rank_count: int, problem: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_divisible_attention(make_model_config(**config_values), rank_count)
    assert caught.value.code == "ContextParallelUnsupported" and problem in caught.value.message and hint in (caught.value.hint or "")


def test_deepspeed_adds_up_gradients_within_a_group_up_to_stage_2() -> None:
    assert [gradient_factor(4, stage, {"zero_optimization": {"stage": stage}}) for stage in (0, 1, 2, 3)] == [4, 4, 4, 1]
    with pytest.raises(ConfigError) as caught:
        gradient_factor(2, 3, {"zero_optimization": {"stage": 3, "reduce_scatter": False}})
    assert caught.value.code == "ContextParallelUnsupported" and "turns off reduce_scatter" in caught.value.message
