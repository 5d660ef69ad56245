"""The objectives. For each value of `trainer.type`, the module with this name defines its `Objective` as `OBJECTIVE`.

Each module imports a trainer of TRL, which takes seconds. So a job imports only the module of its own objective.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetune_api.spec.enums import TrainerType

if TYPE_CHECKING:
    from finetune_trainer.objective.base import Objective


def objective_module(trainer_type: TrainerType) -> str:
    """Return the name of the module that defines the objective."""
    return f"{__name__}.{trainer_type.value}"


def load_objective(trainer_type: TrainerType) -> Objective[Any, Any]:
    """Import the objective's module and return its `Objective`."""
    objective: Objective[Any, Any] = importlib.import_module(objective_module(trainer_type)).OBJECTIVE
    return objective
