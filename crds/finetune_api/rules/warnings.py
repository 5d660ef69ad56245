"""Warnings about valid specs that probably do not do what the user intends. Warnings do not refuse a spec.

`finetune validate` prints warnings, and `status.resolved.notes` contains warnings.
"""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.rules.base import Problem
from finetune_api.rules.derived_values import BASE_WEIGHT_METHODS, PROMPT_METHODS, method_type_of, trainer_type_of
from finetune_api.rules.serving import warn_about_servers
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import MethodType, TrainerType

LEARNING_RATE_RANGES = {
    "base weights": (1e-7, 1e-3),
    "adapters": (1e-6, 1e-2),
    "prompts": (1e-5, 1.0),
    "preferences": (1e-8, 1e-3),
}
"""Lowest and highest usual learning rates. Lower rates hardly change the model. With higher rates, training usually diverges."""
PREFERENCE_OBJECTIVES = (TrainerType.DPO, TrainerType.KTO, TrainerType.ORPO, TrainerType.GRPO)


def warnings(spec: FineTuneJobSpec) -> list[Problem]:
    """Return the warnings about a spec without filled-in defaults."""
    return [*_learning_rate(spec), *_warn_about_epochs(spec), *warn_about_servers(spec)]


def _learning_rate(spec: FineTuneJobSpec) -> Iterator[Problem]:
    rate = spec.training.learning_rate
    if rate is None:
        return
    low, high = LEARNING_RATE_RANGES[_range_name(spec)]
    if not low <= rate <= high:
        size, effect = (
            ("small", "hardly changes the model") if rate < low else ("large", "usually makes training diverge")
        )
        setup = f"trainer {trainer_type_of(spec)} with method {method_type_of(spec)}"
        message = f"{rate:g} is unusually {size} for {setup}, and {effect}"
        yield Problem(
            "training.learningRate", "LearningRateUnusual", message, f"usual values are from {low:g} to {high:g}"
        )


def _range_name(spec: FineTuneJobSpec) -> str:
    if trainer_type_of(spec) in PREFERENCE_OBJECTIVES:
        return "preferences"
    if method_type_of(spec) in BASE_WEIGHT_METHODS:
        return "base weights"
    return "prompts" if method_type_of(spec) in (*PROMPT_METHODS, MethodType.IA3) else "adapters"


def _warn_about_epochs(spec: FineTuneJobSpec) -> Iterator[Problem]:
    steps, epochs = spec.training.max_steps, spec.training.epochs
    if steps is not None and epochs is not None:
        message = f"{epochs:g} has no effect, because training.maxSteps is {steps}"
        yield Problem("training.epochs", "EpochsIgnored", message, "remove training.epochs or training.maxSteps")
