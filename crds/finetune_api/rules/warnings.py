"""Warnings about valid specs that probably do not do what the user intends. Warnings do not refuse a spec.

`finetune validate` prints warnings, and `status.resolved.notes` contains warnings.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from finetune_api.aliases import normalise
from finetune_api.quantities import CPU_KIND, SIZE_KIND, QuantityKind, parse_amount, quantity_problem
from finetune_api.rules.base import Problem
from finetune_api.rules.derived_values import BASE_WEIGHT_METHODS, PROMPT_METHODS, method_type_of, trainer_type_of
from finetune_api.rules.required_fields import source_fields
from finetune_api.rules.serving import warn_about_servers
from finetune_api.source_mistakes import has_placeholder
from finetune_api.sources import redact_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import MethodType, PrepareStrategy, TrainerType

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
    return [
        *_learning_rate(spec), *_warn_about_epochs(spec), *_warn_about_preparation(spec), *_warn_about_resources(spec), *_warn_about_placeholders(spec),
        *_warn_about_target_modules(spec), *warn_about_servers(spec),
    ]  # fmt: skip


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
        message = f"{_format_rate(rate)} is unusually {size} for {setup}, and {effect}"
        hint = f"usual values are from {_format_rate(low)} to {_format_rate(high)}"
        yield Problem("training.learningRate", "LearningRateUnusual", message, hint)


def _format_rate(rate: float) -> str:
    """Return a rate as people write it: `1e-6`, `0.01`."""
    return f"{rate:g}".replace("e-0", "e-")


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


def _warn_about_preparation(spec: FineTuneJobSpec) -> Iterator[Problem]:
    prepare = spec.prepare
    if prepare.strategy is PrepareStrategy.NEVER and prepare.ttl_days is not None:
        message = f"{prepare.ttl_days} has no effect, because prepare.strategy is never"
        yield Problem("prepare.ttlDays", "PreparationIgnored", message, "remove prepare.ttlDays or prepare.strategy")


ALL_MODULES = ("all", "auto", "linear", "alllinear")
"""Spellings of `all-linear`, in lower case without `_` and `-`. No model has modules with these names."""


def _warn_about_target_modules(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for name in (spec.method.lora.target_modules or []) if spec.method.lora else []:
        if name != "all-linear" and normalise(name) in ALL_MODULES:
            message = f"{name!r} is not the name of a module of usual models"
            yield Problem("method.lora.targetModules", "TargetModuleUnusual", message, "for all linear layers write [all-linear]")


MOST_CPUS_OF_A_NODE = 448
"""CPUs of the largest usual nodes. Users who write a larger number usually mean thousandths of a CPU."""


def _warn_about_resources(spec: FineTuneJobSpec) -> Iterator[Problem]:
    resources = spec.resources
    cpu, memory, shared_memory = _amount(resources.cpu, CPU_KIND), _amount(resources.memory, SIZE_KIND), _amount(resources.shared_memory, SIZE_KIND)
    if cpu is not None and cpu > MOST_CPUS_OF_A_NODE:
        message = f"{resources.cpu} is more CPUs than usual nodes have, so the pods may never start"
        yield Problem("resources.cpu", "ResourcesUnusual", message, f"for thousandths of a CPU write {cpu:g}m")
    if memory is not None and shared_memory is not None and shared_memory > memory:
        message = f"{resources.shared_memory} is more than resources.memory {resources.memory}, whose limit includes /dev/shm"
        yield Problem("resources.sharedMemory", "ResourcesUnusual", message, "write a smaller sharedMemory or a larger memory")


def _amount(quantity: str | int | None, kind: QuantityKind) -> Decimal | None:
    """Return a quantity in CPUs or bytes. None: the quantity is absent or invalid; a rule refuses invalid quantities."""
    return None if quantity is None or quantity_problem(quantity, kind) else parse_amount(str(quantity))


def _warn_about_placeholders(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for path, text in source_fields(spec):
        if "://" in text and has_placeholder(text):
            message = f"{redact_source(text)!r} seems to contain a placeholder, and a FineTuneJob has no variables"
            yield Problem(path, "PlaceholderInSource", message, "write the value itself")
