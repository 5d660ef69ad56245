"""Runs on a CPU with the dtypes of a GPU run: the base model and autocast use 16 bits, and trained weights have 32 bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError

from tests.support.learning import TEN_ROWS, merge_mappings, run_training
from tests.support.preferences import PREFERENCE_PAIRS, PROMPTS

SIXTEEN_BIT_SPEC: dict[str, Any] = {
    "model": {"dtype": "bfloat16"},
    "training": {"maxSteps": 2, "mixedPrecision": "bf16", "gradientCheckpointing": "enabled"},
}
FULLY_TRAINED_MODULES = {"method": {"lora": {"modulesToSave": ["lm_head"], "bias": "all"}}}
LENGTH_REWARDS = [{"builtin": "length", "parameters": {"maximum": "3"}}]
SPECS_AND_ROWS: dict[str, tuple[dict[str, Any], Any]] = {
    "modules trained in full": (FULLY_TRAINED_MODULES, TEN_ROWS),
    "a reward model's head": ({"trainer": {"type": "reward"}}, PREFERENCE_PAIRS),
    "answers of grpo": (
        {**FULLY_TRAINED_MODULES, "trainer": {"type": "grpo", "maxCompletionLength": 4, "grpo": {"numGenerations": 2}, "rewards": LENGTH_REWARDS}},
        PROMPTS,
    ),
    "ia3": ({"method": {"type": "ia3"}}, TEN_ROWS),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS_AND_ROWS)
def test_trained_weights_on_a_16_bit_base_have_32_bits(name: str, model: Path, tmp_path: Path) -> None:
    """16-bit weights would lose the small updates of common learning rates."""
    spec, rows = SPECS_AND_ROWS[name]
    outcome = run_training(tmp_path, model, merge_mappings(SIXTEEN_BIT_SPEC, spec), rows)
    types = {(parameter.requires_grad, parameter.dtype) for parameter in outcome.model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    assert len(outcome.losses) == 2 and all(math.isfinite(loss) for loss in outcome.losses)


def test_packing_in_16_bits_gives_the_losses_of_unpacked_rows(model: Path, tmp_path: Path) -> None:
    spec = merge_mappings(SIXTEEN_BIT_SPEC, {"method": {"lora": {"dropout": 0}}, "training": {"batchSizePerDevice": 10}})
    unpacked_outcome = run_training(tmp_path / "a", model, spec)
    packed_outcome = run_training(tmp_path / "b", model, merge_mappings(spec, {"dataset": {"packing": True}}))
    assert packed_outcome.extra["data"]["tokens"]["train"]["sequences"] == 1
    assert packed_outcome.losses == pytest.approx(unpacked_outcome.losses, rel=0.01)


def test_a_packing_leak_is_found_in_16_bits(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ConfigError) as caught:
        run_training(tmp_path, model, merge_mappings(SIXTEEN_BIT_SPEC, {"dataset": {"packing": True}}))
    assert caught.value.code == "PackingLeaks"


def test_without_autocast_trained_modules_keep_the_dtype_of_the_spec(model: Path, tmp_path: Path) -> None:
    outcome = run_training(
        tmp_path, model, {"model": {"dtype": "bfloat16"}, **FULLY_TRAINED_MODULES, "training": {"maxSteps": 1}}
    )
    assert outcome.model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_inputs_that_autocast_converts_give_the_same_losses(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer omits PEFT's conversion of inputs to 32 bits, because autocast would convert them back to 16 bits."""
    from finetune_trainer.method import lora

    spec = merge_mappings(SIXTEEN_BIT_SPEC, {"method": {"lora": {"dropout": 0}}, "training": {"maxSteps": 4}})
    by_autocast = run_training(tmp_path / "autocast", model, spec)
    layers = [module for module in by_autocast.model.modules() if hasattr(module, "cast_input_dtype_enabled")]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    monkeypatch.setattr(lora, "leave_conversion_to_autocast", lambda model: None)
    by_peft = run_training(tmp_path / "peft", model, spec)
    assert by_autocast.losses == by_peft.losses
    assert by_autocast.grad_norms == by_peft.grad_norms
