"""From our options to the Trainer's: the fields that all objectives share. Every option stands here once."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import Backend, GradientCheckpointing, Scheduler, When

from finetune_trainer.distributed import Plan
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs
from finetune_trainer.schedules import SCHEDULERS, scheduler_parameters

CHECKPOINTING = "training.gradientCheckpointing"
OPTIMIZER = "training.optimizer"
LIGER = "model.ligerKernels"
TUNED_OPTIMIZER = "paged_adamw_8bit"
PACKAGES = {"schedule_free_": "schedulefree", "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao"}
"""What optimizers need beside torch and bitsandbytes, by how their names begin."""


@dataclass(frozen=True)
class Tuned:
    """What `trainer.backend: unsloth` means here: the single-GPU path with every memory saver that nobody set otherwise."""

    checkpointing: GradientCheckpointing
    optimizer: str
    liger: bool
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(run: RunConfig, hardware: Hardware) -> Tuned:
        """The three choices of a run, tuned or as they stand. Errors: ConfigError BackendNeedsGpu."""
        training = run.spec.training
        mode = training.gradient_checkpointing or GradientCheckpointing.DISABLED
        name = training.optimizer or "adamw_torch_fused"
        liger = run.spec.model.liger_kernels is True
        if run.spec.trainer.backend is not Backend.UNSLOTH:
            return Tuned(mode, name, liger)
        if hardware.cpu:
            raise ConfigError(
                "BackendNeedsGpu", "trainer.backend unsloth is the tuned path for one GPU, and this job runs on CPU",
                hint="write `backend: transformers`, or ask for a GPU",
            )  # fmt: skip
        if CHECKPOINTING in run.defaults and mode is not GradientCheckpointing.DISABLED:
            mode = GradientCheckpointing.UNSLOTH
        name = TUNED_OPTIMIZER if OPTIMIZER in run.defaults else name
        liger = liger or LIGER in run.defaults
        said = f"backend unsloth is this trainer's own single-GPU path: optimizer {name}, gradientCheckpointing {mode}, liger kernels {liger}"
        return Tuned(mode, name, liger, (said,))


def common(run: RunConfig, inputs: Inputs, hardware: Hardware, plan: Plan, *, evaluates: bool) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments, whatever the objective. `evaluates`: there is validation data.

    Errors: ConfigError OptimizerUnknown, SchedulerParameterInvalid, EvaluationWithoutData.
    """
    training = run.spec.training
    tuned = Tuned.of(run, hardware)
    plan.notes += [note for note in (*tuned.notes, *unread_warmup(run)) if note not in plan.notes]
    return {
        "output_dir": str(inputs.output_dir),
        "per_device_train_batch_size": training.batch_size_per_device or 4,
        "gradient_accumulation_steps": training.gradient_accumulation_steps or 4,
        "num_train_epochs": 3.0 if training.epochs is None else training.epochs,
        "max_steps": training.max_steps or -1,
        "learning_rate": training.learning_rate or 2e-4,
        "lr_scheduler_type": SCHEDULERS[training.scheduler or Scheduler.COSINE],
        "lr_scheduler_kwargs": scheduler_parameters(run),
        "warmup_steps": _warmup(run),
        "max_grad_norm": 1.0 if training.max_grad_norm is None else training.max_grad_norm,
        "optim": optimizer(tuned.optimizer),
        "use_liger_kernel": tuned.liger,
        # It would replace the forward pass that TRL's losses, and a reward model's head, are made for.
        "liger_kernel_config": {"fused_linear_cross_entropy": False} if tuned.liger else None,
        "adam_beta1": 0.9 if training.adam_beta1 is None else training.adam_beta1,
        "adam_beta2": 0.999 if training.adam_beta2 is None else training.adam_beta2,
        "adam_epsilon": 1e-8 if training.adam_epsilon is None else training.adam_epsilon,
        "weight_decay": training.weight_decay or 0.0,
        "neftune_noise_alpha": training.neftune_noise_alpha,
        "train_sampling_strategy": "group_by_length" if training.group_by_length else "random",
        "seed": _seed(run),
        "data_seed": _seed(run),
        "bf16": hardware.bf16,
        "fp16": hardware.fp16,
        "use_cpu": hardware.cpu,
        "dataloader_pin_memory": not hardware.cpu,
        "disable_tqdm": True,
        "report_to": [],
        # A non-finite loss must be seen, not replaced by the last good one.
        "logging_nan_inf_filter": False,
        **_checkpointing(run, tuned.checkpointing),
        **_rhythm(run, evaluates),
        **plan.arguments(),
    }


def _seed(run: RunConfig) -> int:
    return 42 if run.spec.training.seed is None else run.spec.training.seed


def unread_warmup(run: RunConfig) -> list[str]:
    """What to say of a warm-up that somebody wrote beside a schedule that has none. Optimizers without a schedule read it themselves."""
    training = run.spec.training
    if training.scheduler is not Scheduler.CONSTANT or (training.optimizer or "").startswith("schedule_free_"):
        return []
    written = {"training.warmupSteps": training.warmup_steps, "training.warmupRatio": training.warmup_ratio}
    return [
        f"{path} {value:g} has no effect with training.scheduler constant: constantWithWarmup warms up"
        for path, value in written.items() if value and path not in run.defaults
    ]  # fmt: skip


def _warmup(run: RunConfig) -> float | int:
    """Steps, or below 1 a fraction of all steps: transformers has one field for both."""
    training = run.spec.training
    if training.warmup_steps is not None:
        return training.warmup_steps
    return 0.03 if training.warmup_ratio is None else training.warmup_ratio


def _rhythm(run: RunConfig, evaluates: bool) -> dict[str, Any]:
    """When to log, save and evaluate."""
    checkpoint, evaluation, tracking = run.spec.checkpoint, run.spec.evaluation, run.spec.tracking
    when = evaluation.strategy or When.NO
    if when is not When.NO and not evaluates:
        raise ConfigError(
            "EvaluationWithoutData", f"evaluation.strategy is {when}, but there is no validation data",
            hint="give dataset.validation or dataset.split.validation, or write `strategy: no`",
        )  # fmt: skip
    best = checkpoint.load_best_at_end is True or run.spec.training.early_stopping is not None
    return {
        "logging_strategy": "steps",
        "logging_steps": tracking.logging_steps or 10,
        "logging_first_step": tracking.log_first_step is not False,
        "save_strategy": str(checkpoint.strategy or When.STEPS),
        "save_steps": checkpoint.steps or 100,
        "eval_strategy": str(when),
        "eval_steps": evaluation.steps or checkpoint.steps or 100,
        "per_device_eval_batch_size": evaluation.batch_size_per_device or run.spec.training.batch_size_per_device or 4,
        "load_best_model_at_end": checkpoint.load_best_at_end is True,
        "restore_callback_states_from_checkpoint": run.spec.training.early_stopping is not None,
        "metric_for_best_model": "eval_loss" if best else None,
        "greater_is_better": False if best else None,
    }


def _checkpointing(run: RunConfig, mode: GradientCheckpointing) -> dict[str, Any]:
    """Recompute activations, every layer or every n-th, or move them to host memory."""
    training = run.spec.training
    if mode is GradientCheckpointing.DISABLED:
        return {"activation_checkpointing": False}
    options: dict[str, Any] = {"use_reentrant": False}
    if mode is GradientCheckpointing.UNSLOTH:
        options["offload"] = True
    if (training.checkpoint_every_n_layers or 1) > 1:
        options["every_n_layers"] = training.checkpoint_every_n_layers
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": options}


def optimizer(name: str) -> str:
    """The optimizer's name, if transformers knows it. Errors: ConfigError OptimizerUnknown."""
    from difflib import get_close_matches

    from transformers.training_args import OptimizerNames

    known = [one.value for one in OptimizerNames]
    if name not in known:
        near = get_close_matches(name, known, n=3) or ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
        raise ConfigError(
            "OptimizerUnknown", f"training.optimizer {name!r} is not known", hint=f"write one of {', '.join(near)}"
        )
    package = next((package for begin, package in PACKAGES.items() if name.startswith(begin)), None)
    if package is not None and find_spec(package) is None:
        raise ConfigError(
            "OptimizerUnavailable", f"training.optimizer {name} needs the package {package}, which this image does not have",
            hint="write adamw_torch_fused or adamw_8bit, or give an image of your own in placement.image",
        )  # fmt: skip
    return name


def settle_kernels(args: Any, run: RunConfig, model_type: str) -> list[str]:
    """Turn liger's kernels off where there are none for the model and nobody asked for them; what to say of it.

    Errors: ConfigError KernelsUnavailable if they were asked for.
    """
    if not args.use_liger_kernel:
        return []
    if find_spec("liger_kernel") is None:
        why = "liger-kernel is not installed in this image"
    else:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
            return []
        why = f"liger has no kernels for models of type {model_type}"
    if LIGER not in run.defaults:
        raise ConfigError("KernelsUnavailable", f"{LIGER} is true, but {why}", hint="remove it")
    args.use_liger_kernel = False
    return [f"{why}: the model's own layers are used"]
