"""The dtypes of trained weights."""

from __future__ import annotations

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.method.precision import TrainedWeightsCopy, require_scalable_weights, widen_trained_weights


def make_float16_model() -> torch.nn.Sequential:
    """Return a model with two float16 layers. Only the second layer is trained."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)).half()
    model[0].requires_grad_(False)
    return model


def test_trained_float16_weights_are_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        require_scalable_weights(make_float16_model())
    assert (caught.value.code, caught.value.message.split()[0]) == ("HalfWeights", "1.weight")


def test_frozen_float16_weights_and_trained_bfloat16_weights_are_accepted() -> None:
    model = make_float16_model()
    model[1].float()
    require_scalable_weights(model)
    require_scalable_weights(model.to(torch.bfloat16).requires_grad_(True))


def test_only_trained_weights_are_widened_to_32_bits() -> None:
    model = make_float16_model()
    widen_trained_weights(model)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.float16] * 2 + [torch.float32] * 2


def test_restored_weights_equal_the_weights_before_the_conversion() -> None:
    model = torch.nn.Linear(2, 2)
    weight_before = model.weight.detach().clone()
    weights_copy = TrainedWeightsCopy(model)
    model.to(torch.bfloat16)
    weights_copy.restore(model)
    assert torch.equal(model.weight, weight_before) and model.weight.dtype == torch.float32
