"""The objectives. Each value of `trainer.type` has a module with the same name, and its `Objective` is called `OBJECTIVE`.

Each module imports a trainer of TRL. This import takes seconds, so a job imports only the module of its own objective.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetune_api.spec.enums import TrainerType

if TYPE_CHECKING:
    from finetune_trainer.objective.base import Objective


def module_of(kind: TrainerType) -> str:
    """Name of the module that defines the objective."""
    return f"{__name__}.{kind.value}"


def load_objective(kind: TrainerType) -> Objective[Any, Any]:
    """Import the objective's module and return its `Objective`."""
    objective: Objective[Any, Any] = importlib.import_module(module_of(kind)).OBJECTIVE
    return objective
