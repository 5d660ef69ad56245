"""Every value of `trainer.type` has an objective."""

from __future__ import annotations

import pytest
from finetune_api.objectives import OBJECTIVES
from finetune_api.spec.enums import TrainerType
from finetune_trainer.engine import GuardedTrainer
from finetune_trainer.objective import load_objective
from finetune_trainer.objective.base import TEST_LOSS


@pytest.mark.parametrize("trainer_type", list(TrainerType))
def test_every_trainer_type_has_its_objective(trainer_type: TrainerType) -> None:
    objective = load_objective(trainer_type)
    assert objective.trainer_type is trainer_type
    assert objective.facts is OBJECTIVES[trainer_type]
    assert issubclass(objective.trainer_class, GuardedTrainer)
    assert objective.held_out_metrics[0] is TEST_LOSS
