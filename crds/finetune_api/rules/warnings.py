"""Finds warnings: parts of a valid spec that probably do not do what the user intends. A spec with warnings is accepted.

`finetune validate` prints the warnings. The operator writes the warnings to `status.resolved.notes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from finetune_api.aliases import normalise
from finetune_api.quantities import CPU_KIND, SIZE_KIND, QuantityKind, find_quantity_problem, parse_amount
from finetune_api.rules.base import Problem
from finetune_api.rules.derived_values import BASE_WEIGHT_METHODS, PROMPT_METHODS, method_type_of, trainer_type_of
from finetune_api.rules.required_fields import iterate_source_fields
from finetune_api.rules.serving import warn_about_serving_targets
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
"""The lowest and the highest usual learning rate. A lower rate hardly changes the model; with a higher rate, training usually diverges."""
PREFERENCE_OBJECTIVES = (TrainerType.DPO, TrainerType.KTO, TrainerType.ORPO, TrainerType.GRPO)


def find_warnings(spec: FineTuneJobSpec) -> list[Problem]:
    """Return the warnings about a spec, which must not contain filled-in defaults."""
    return [
        *_warn_about_learning_rate(spec), *_warn_about_epochs(spec), *_warn_about_preparation(spec), *_warn_about_resources(spec), *_warn_about_placeholders(spec),
        *_warn_about_target_modules(spec), *warn_about_serving_targets(spec),
    ]  # fmt: skip


def _warn_about_learning_rate(spec: FineTuneJobSpec) -> Iterator[Problem]:
    learning_rate = spec.training.learning_rate
    if learning_rate is None:
        return
    lowest_usual_rate, highest_usual_rate = LEARNING_RATE_RANGES[_choose_learning_rate_range_name(spec)]
    if not lowest_usual_rate <= learning_rate <= highest_usual_rate:
        size_word, effect_text = (
            ("small", "hardly changes the model") if learning_rate < lowest_usual_rate else ("large", "usually makes training diverge")
        )
        setup_text = f"trainer {trainer_type_of(spec)} with method {method_type_of(spec)}"
        message = f"{_format_rate(learning_rate)} is unusually {size_word} for {setup_text}, and {effect_text}"
        hint = f"usual values are from {_format_rate(lowest_usual_rate)} to {_format_rate(highest_usual_rate)}"
        yield Problem("training.learningRate", "LearningRateUnusual", message, hint)


def _format_rate(rate: float) -> str:
    """Return a learning rate as people write it, such as `1e-6` or `0.01`."""
    return f"{rate:g}".replace("e-0", "e-")


def _choose_learning_rate_range_name(spec: FineTuneJobSpec) -> str:
    """Return the key of LEARNING_RATE_RANGES for the objective and the method of a spec."""
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
"""Names that users write instead of `all-linear`, in lower case and without `_` and `-`. No model has modules with these names."""


def _warn_about_target_modules(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for name in (spec.method.lora.target_modules or []) if spec.method.lora else []:
        if name != "all-linear" and normalise(name) in ALL_MODULES:
            message = f"{name!r} is not the name of a module in common models"
            yield Problem("method.lora.targetModules", "TargetModuleUnusual", message, "for all linear layers write [all-linear]")


MAX_USUAL_CPUS = 448
"""CPUs of the largest common nodes. A user who writes a larger number usually means thousandths of a CPU."""


def _warn_about_resources(spec: FineTuneJobSpec) -> Iterator[Problem]:
    resources = spec.resources
    cpu, memory, shared_memory = _parse_quantity_if_valid(resources.cpu, CPU_KIND), _parse_quantity_if_valid(resources.memory, SIZE_KIND), _parse_quantity_if_valid(resources.shared_memory, SIZE_KIND)
    if cpu is not None and cpu > MAX_USUAL_CPUS:
        message = f"{resources.cpu} is more CPUs than common nodes have, so the pods may never start"
        yield Problem("resources.cpu", "ResourcesUnusual", message, f"for thousandths of a CPU write {cpu:g}m")
    if memory is not None and shared_memory is not None and shared_memory > memory:
        message = f"{resources.shared_memory} is more than resources.memory {resources.memory}, but shared memory counts towards this limit"
        yield Problem("resources.sharedMemory", "ResourcesUnusual", message, "write a smaller sharedMemory or a larger memory")


def _parse_quantity_if_valid(quantity: str | int | None, kind: QuantityKind) -> Decimal | None:
    """Return a quantity in CPUs or bytes. None: the quantity is missing or invalid. A rule reports invalid quantities."""
    return None if quantity is None or find_quantity_problem(quantity, kind) else parse_amount(str(quantity))


def _warn_about_placeholders(spec: FineTuneJobSpec) -> Iterator[Problem]:
    for path, source_text in iterate_source_fields(spec):
        if "://" in source_text and has_placeholder(source_text):
            message = f"{redact_source(source_text)!r} seems to contain a placeholder, but a FineTuneJob does not replace placeholders"
            yield Problem(path, "PlaceholderInSource", message, "write the value itself")
