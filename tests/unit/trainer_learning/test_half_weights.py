"""Weights of 16 bits under fp16's loss scaling: those that are trained are refused by name, before a step."""

from __future__ import annotations

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer import method


def test_halves_that_are_trained_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).half()
    model[0].requires_grad_(False)
    with pytest.raises(ConfigError) as caught:
        method.require_scalable(model)
    assert (caught.value.code, caught.value.message.split()[0]) == ("HalfWeights", "1.weight")


def test_frozen_halves_and_wide_weights_are_not() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).half()
    model[0].requires_grad_(False)
    model[1].float()
    method.require_scalable(model)
    method.require_scalable(model.to(torch.bfloat16).requires_grad_(True))
