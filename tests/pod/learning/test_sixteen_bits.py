"""Runs with the number types of a GPU, on the CPU: a base of 16 bits, autocast, recomputation. What is trained has 32 bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.learning import TEN, go, merged
from tests.support.preferences import PAIRS, PROMPTS

SIXTEEN: dict[str, Any] = {
    "model": {"dtype": "bfloat16"},
    "training": {"maxSteps": 2, "mixedPrecision": "bf16", "gradientCheckpointing": "enabled"},
}
WHOLE = {"method": {"lora": {"modulesToSave": ["lm_head"], "bias": "all"}}}
REWARDS = [{"builtin": "length", "parameters": {"maximum": "3"}}]
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "modules beside the adapter": (WHOLE, TEN),
    "a reward model's head": ({"trainer": {"type": "reward"}}, PAIRS),
    "answers of grpo": (
        {**WHOLE, "trainer": {"type": "grpo", "maxCompletionLength": 4, "grpo": {"numGenerations": 2}, "rewards": REWARDS}},
        PROMPTS,
    ),
    "ia3": ({"method": {"type": "ia3"}}, TEN),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_beside_16_bits_has_32(name: str, model: Path, tmp_path: Path) -> None:
    """Steps of a usual learning rate are smaller than what 16 bits can tell apart."""
    spec, rows = CASES[name]
    outcome = go(tmp_path, model, merged(SIXTEEN, spec), rows)
    types = {(one.requires_grad, one.dtype) for one in outcome.model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    assert len(outcome.losses) == 2 and all(math.isfinite(loss) for loss in outcome.losses)


def test_packed_documents_stay_apart_in_16_bits(model: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, model, merged(SIXTEEN, {"dataset": {"packing": True}}))
    assert len(outcome.losses) == 2


def test_without_autocast_types_stay_as_asked(model: Path, tmp_path: Path) -> None:
    outcome = go(tmp_path, model, {"model": {"dtype": "bfloat16"}, **WHOLE, "training": {"maxSteps": 1}})
    assert outcome.model.get_output_embeddings().weight.dtype == torch.bfloat16
