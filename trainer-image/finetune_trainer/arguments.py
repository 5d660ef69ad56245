"""Converts the spec to the fields of TrainingArguments that all objectives share."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import GradientCheckpointing, IntervalStrategy, LearningRateSchedule, TrainerBackend

from finetune_trainer import kernels
from finetune_trainer.distributed import DistributedStrategy
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs
from finetune_trainer.schedules import SCHEDULER_NAMES, scheduler_parameters

CHECKPOINTING_PATH = "training.gradientCheckpointing"
OPTIMIZER_PATH = "training.optimizer"
LOW_MEMORY_OPTIMIZER = "paged_adamw_8bit"
OPTIMIZER_PACKAGES = {"schedule_free_": "schedulefree", "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao"}
"""The Python package that an optimizer needs, by the prefix of the optimizer's name."""


@dataclass(frozen=True)
class MemorySavers:
    """Options that save GPU memory. `trainer.backend: unsloth` enables every option that the user did not set."""

    gradient_checkpointing: GradientCheckpointing
    optimizer: str
    uses_liger: bool
    """Whether the run uses Liger's kernels, unless `kernels.choose_kernels` finds a reason against them."""
    notes: tuple[str, ...] = ()

    @staticmethod
    def choose(run: RunConfig, hardware: Hardware) -> MemorySavers:
        """Choose the options for a run. Errors: ConfigError BackendNeedsGpu."""
        training = run.spec.training
        checkpointing_mode = training.gradient_checkpointing or GradientCheckpointing.DISABLED
        optimizer_name = training.optimizer or "adamw_torch_fused"
        uses_liger = kernels.are_kernels_allowed(run) and (hardware.device.type == "cuda" or kernels.are_kernels_requested(run))
        if run.spec.trainer.backend is not TrainerBackend.UNSLOTH:
            return MemorySavers(checkpointing_mode, optimizer_name, uses_liger)
        if hardware.is_cpu:
            raise ConfigError(
                "BackendNeedsGpu", "trainer.backend unsloth needs a GPU, and this job runs on CPU",
                hint="write `backend: transformers`, or request a GPU",
            )  # fmt: skip
        if CHECKPOINTING_PATH in run.defaults and checkpointing_mode is not GradientCheckpointing.DISABLED:
            checkpointing_mode = GradientCheckpointing.UNSLOTH
        optimizer_name = LOW_MEMORY_OPTIMIZER if OPTIMIZER_PATH in run.defaults else optimizer_name
        note = (
            f"trainer.backend unsloth selects options that save GPU memory: optimizer {optimizer_name}, "
            f"gradientCheckpointing {checkpointing_mode}, liger kernels {uses_liger}"
        )
        return MemorySavers(checkpointing_mode, optimizer_name, uses_liger, (note,))


def shared_arguments(
    run: RunConfig, inputs: Inputs, hardware: Hardware, strategy: DistributedStrategy, *, has_validation_data: bool
) -> dict[str, Any]:
    """Return the keyword arguments for TrainingArguments. `has_validation_data`: whether the run has validation data.

    Errors: ConfigError OptimizerUnknown, SchedulerParameterInvalid, EvaluationWithoutData.
    """
    training = run.spec.training
    memory_savers = MemorySavers.choose(run, hardware)
    strategy.notes += [note for note in (*memory_savers.notes, *unused_warmup_notes(run)) if note not in strategy.notes]
    return {
        "output_dir": str(inputs.output_dir),
        "per_device_train_batch_size": training.batch_size_per_device or 4,
        "gradient_accumulation_steps": training.gradient_accumulation_steps or 4,
        "num_train_epochs": 3.0 if training.epochs is None else training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate or 2e-4,
        "lr_scheduler_type": SCHEDULER_NAMES[training.scheduler or LearningRateSchedule.COSINE],
        "lr_scheduler_kwargs": scheduler_parameters(run),
        "warmup_steps": _choose_warmup_steps(run),
        "max_grad_norm": 1.0 if training.max_grad_norm is None else training.max_grad_norm,
        "optim": require_optimizer(memory_savers.optimizer),
        "use_liger_kernel": memory_savers.uses_liger,
        "liger_kernel_config": dict(kernels.LIGER_OPTIONS) if memory_savers.uses_liger else None,
        "adam_beta1": 0.9 if training.adam_beta1 is None else training.adam_beta1,
        "adam_beta2": 0.999 if training.adam_beta2 is None else training.adam_beta2,
        "adam_epsilon": 1e-8 if training.adam_epsilon is None else training.adam_epsilon,
        "weight_decay": training.weight_decay or 0.0,
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
        "seed": _choose_seed(run),
        "data_seed": _choose_seed(run),
        "bf16": hardware.computes_in_bf16,
        "fp16": hardware.computes_in_fp16,
        "use_cpu": hardware.is_cpu,
        "dataloader_pin_memory": not hardware.is_cpu,
        "disable_tqdm": True,
        "report_to": [],
        # If logging_nan_inf_filter were on, transformers would log the last finite loss instead of a NaN or infinite loss.
        "logging_nan_inf_filter": False,
        **_build_checkpointing_arguments(run, memory_savers.gradient_checkpointing),
        **_build_interval_arguments(run, has_validation_data),
        **strategy.training_arguments(),
    }


def _choose_seed(run: RunConfig) -> int:
    return 42 if run.spec.training.seed is None else run.spec.training.seed


def unused_warmup_notes(run: RunConfig) -> list[str]:
    """Return notes about warm-up settings that the constant schedule ignores.

    The list is empty for schedule-free optimizers, because they apply the warm-up.
    """
    training = run.spec.training
    if training.scheduler is not LearningRateSchedule.CONSTANT or (training.optimizer or "").startswith("schedule_free_"):
        return []
    warmup_settings = {"training.warmupSteps": training.warmup_steps, "training.warmupRatio": training.warmup_ratio}
    return [
        f"{path} {value:g} has no effect with training.scheduler constant: write constantWithWarmup for a warm-up"
        for path, value in warmup_settings.items() if value and path not in run.defaults
    ]  # fmt: skip


def _choose_warmup_steps(run: RunConfig) -> float | int:
    """Return the number of warm-up steps, or a number below 1 for their fraction of all steps, because transformers has one field for both."""
    training = run.spec.training
    if training.warmup_steps is not None:
        return training.warmup_steps
    return 0.03 if training.warmup_ratio is None else training.warmup_ratio


def _build_interval_arguments(run: RunConfig, has_validation_data: bool) -> dict[str, Any]:
    """Return the arguments that set when to log, save and evaluate. Errors: ConfigError EvaluationWithoutData."""
    checkpoint, evaluation, tracking = run.spec.checkpoint, run.spec.evaluation, run.spec.tracking
    evaluation_strategy = evaluation.strategy or IntervalStrategy.NO
    if evaluation_strategy is not IntervalStrategy.NO and not has_validation_data:
        raise ConfigError(
            "EvaluationWithoutData", f"evaluation.strategy is {evaluation_strategy}, but there is no validation data",
            hint="give dataset.validation or dataset.split.validation, or write `strategy: no`",
        )  # fmt: skip
    tracks_best = checkpoint.load_best_at_end is True or run.spec.training.early_stopping is not None
    return {
        "logging_strategy": "steps",
        "logging_steps": tracking.logging_steps or 10,
        "logging_first_step": tracking.log_first_step is not False,
        "save_strategy": str(checkpoint.strategy or IntervalStrategy.STEPS),
        "save_steps": checkpoint.steps or 100,
        "eval_strategy": str(evaluation_strategy),
        "eval_steps": evaluation.steps or checkpoint.steps or 100,
        "per_device_eval_batch_size": evaluation.batch_size_per_device or run.spec.training.batch_size_per_device or 4,
        "load_best_model_at_end": checkpoint.load_best_at_end is True,
        "restore_callback_states_from_checkpoint": run.spec.training.early_stopping is not None,
        "metric_for_best_model": "eval_loss" if tracks_best else None,
        "greater_is_better": False if tracks_best else None,
    }


def _build_checkpointing_arguments(run: RunConfig, mode: GradientCheckpointing) -> dict[str, Any]:
    """Return the arguments for gradient checkpointing: off, for every layer or every n-th layer, and perhaps with activations in host memory."""
    training = run.spec.training
    if mode is GradientCheckpointing.DISABLED:
        return {"activation_checkpointing": False}
    options: dict[str, Any] = {"use_reentrant": False}
    if mode is GradientCheckpointing.UNSLOTH:
        options["offload"] = True
    if (training.checkpoint_every_n_layers or 1) > 1:
        options["every_n_layers"] = training.checkpoint_every_n_layers
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": options}


def require_optimizer(name: str) -> str:
    """Return `name` if this image has the optimizer. Errors: ConfigError OptimizerUnknown, OptimizerUnavailable (a package is missing)."""
    from difflib import get_close_matches

    from transformers.training_args import OptimizerNames

    known_names = [optimizer.value for optimizer in OptimizerNames]
    if name not in known_names:
        similar_names = get_close_matches(name, known_names, n=3) or ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
        raise ConfigError(
            "OptimizerUnknown", f"training.optimizer {name!r} is not known", hint=f"write one of {', '.join(similar_names)}"
        )
    package = next((package for prefix, package in OPTIMIZER_PACKAGES.items() if name.startswith(prefix)), None)
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            "OptimizerUnavailable", f"training.optimizer {name} needs the package {package}, which this image does not have",
            hint="write adamw_torch_fused or adamw_8bit, or set placement.image to an image that has the package",
        )  # fmt: skip
    return name
