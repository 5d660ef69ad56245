"""The API's rules list, for each optimizer, the Adam settings that transformers passes to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from finetune_api.rules import OPTIMIZERS
from finetune_api.rules.training import list_adam_fields

pytestmark = pytest.mark.pod
OPTIMIZERS_WITHOUT_PACKAGE = (
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedule_free_radam",
)
"""The optimizers that need a package that the trainer image does not contain."""


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in OPTIMIZERS_WITHOUT_PACKAGE])
def test_the_rules_know_the_settings_that_transformers_passes_to_the_optimizer(name: str) -> None:
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS, OptimizerContext

    betas, eps = (0.125, 0.25), 0.5
    args = SimpleNamespace(optim=name, adam_beta1=betas[0], adam_beta2=betas[1], adam_epsilon=eps, weight_decay=0.0)
    context = OptimizerContext(args, None, {"lr": 1.0}, {"betas": betas, "eps": eps}, {})
    _, optimizer_arguments = _OPTIMIZER_HANDLERS[name](context)
    read_fields = list_adam_fields(name)
    assert ("adam_beta1" in read_fields, "adam_beta2" in read_fields) == ((optimizer_arguments.get("betas") or ())[:2] == betas,) * 2
    assert ("adam_epsilon" in read_fields) is (optimizer_arguments.get("eps") == eps)
