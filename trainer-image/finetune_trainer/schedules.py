"""Maps `training.scheduler` to transformers' names, and checks `training.schedulerParameters`."""

from __future__ import annotations

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import LearningRateSchedule

SCHEDULER_NAMES = {
    LearningRateSchedule.LINEAR: "linear", LearningRateSchedule.COSINE: "cosine", LearningRateSchedule.COSINE_WITH_RESTARTS: "cosine_with_restarts",
    LearningRateSchedule.COSINE_WITH_MIN_LR: "cosine_with_min_lr", LearningRateSchedule.POLYNOMIAL: "polynomial", LearningRateSchedule.CONSTANT: "constant",
    LearningRateSchedule.CONSTANT_WITH_WARMUP: "constant_with_warmup", LearningRateSchedule.INVERSE_SQRT: "inverse_sqrt",
    LearningRateSchedule.WARMUP_STABLE_DECAY: "warmup_stable_decay",
}  # fmt: skip


def scheduler_parameters(run: RunConfig) -> dict[str, float | int | str | bool]:
    """Return `training.schedulerParameters` with text converted to numbers and booleans. Errors: ConfigError SchedulerParameterInvalid."""
    import inspect

    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType

    parameters = run.spec.training.scheduler_parameters or {}
    scheduler = run.spec.training.scheduler or LearningRateSchedule.COSINE
    scheduler_function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(SCHEDULER_NAMES[scheduler])]
    known_parameters = set(inspect.signature(scheduler_function).parameters) - {
        "optimizer",
        "num_warmup_steps",
        "num_training_steps",
        "last_epoch",
    }
    unknown_parameters = sorted(set(parameters) - known_parameters)
    if unknown_parameters:
        raise ConfigError(
            "SchedulerParameterInvalid", f"training.schedulerParameters: scheduler {scheduler} has no parameter {', '.join(unknown_parameters)}",
            hint=f"parameters of this scheduler: {', '.join(sorted(known_parameters)) or 'none'}",
        )  # fmt: skip
    return {name: _parse_parameter(text) for name, text in parameters.items()}


def _parse_parameter(text: str) -> float | int | str | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
