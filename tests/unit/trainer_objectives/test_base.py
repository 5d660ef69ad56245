"""For every value of `trainer.type`, the module of that name contains an objective."""

from __future__ import annotations

import pytest
from finetune_api.objectives import OBJECTIVES
from finetune_api.spec.enums import TrainerType
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.objective import load_objective
from finetune_trainer.objective.base import TEST_LOSS


@pytest.mark.parametrize("kind", list(TrainerType))
def test_every_trainer_type_has_its_objective(kind: TrainerType) -> None:
    objective = load_objective(kind)
    assert objective.trainer_type is kind
    assert objective.facts is OBJECTIVES[kind]
    assert issubclass(objective.trainer_class, GuardedTrainer)
    assert objective.held_out_metrics[0] is TEST_LOSS
