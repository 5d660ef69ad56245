"""Rules for `spec.training`, `spec.checkpoint`, and the validation during training (`spec.evaluation`)."""

from __future__ import annotations

import difflib
import math

from finetune_api.aliases import OPTIMIZER_ALIASES, normalise
from finetune_api.rules.base import ExecutionTarget, Findings, rule
from finetune_api.rules.derived_values import (
    compute_batch_split,
    compute_data_parallel_size,
    evaluates_during_training,
    gpus_per_node,
    has_validation_set,
    method_type_of,
    value_or_default,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    Device,
    GradientCheckpointing,
    IntervalStrategy,
    MethodType,
    MixedPrecision,
    StrategyType,
)


@rule("WarmupTwice")
def check_warmup_twice(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if spec.training.warmup_steps is not None and spec.training.warmup_ratio is not None:
        yield (
            "training.warmupRatio",
            f"warmupSteps {spec.training.warmup_steps} and warmupRatio {spec.training.warmup_ratio:g} exclude each other",
            "remove warmupSteps or warmupRatio",
        )


OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad", "adamw_8bit", "adamw_bnb_8bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "adamw_torch_4bit", "adamw_torch_8bit",
    "schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam",
)  # fmt: skip
"""Supported values of `training.optimizer`. The trainer's tests compare this list with the optimizers of transformers."""


@rule("OptimizerUnknown")
def check_optimizer_unknown(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    name = spec.training.optimizer
    if name is not None and name not in OPTIMIZERS:
        yield "training.optimizer", f"{name!r} is not a supported optimizer", make_optimizer_hint(name)


def make_optimizer_hint(unknown_name: str) -> str:
    """Return a hint that says what to write instead of an unknown optimizer."""
    normalised_name = unknown_name.lower().replace("-", "_")
    supported_name = OPTIMIZER_ALIASES.get(unknown_name.lower()) or OPTIMIZER_ALIASES.get(normalise(unknown_name)) or (normalised_name if normalised_name in OPTIMIZERS else "")
    similar_names = difflib.get_close_matches(normalised_name, OPTIMIZERS, 1)
    return f"write {supported_name}" if supported_name else f"did you mean {similar_names[0]}?" if similar_names else f"write one of {', '.join(OPTIMIZERS)}"


@rule("PrecisionOnCpu")
def check_precision_on_cpu(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    runs_on_cpu = spec.training.device is Device.CPU or gpus_per_node(spec) == 0
    if not runs_on_cpu or (target is ExecutionTarget.LOCAL and spec.training.device in (None, Device.AUTO)):
        return
    if spec.training.mixed_precision is MixedPrecision.FP16:
        yield "training.mixedPrecision", "fp16, but fp16 needs loss scaling, which is not possible on CPU", "write auto, no or bf16"
    if spec.model.liger_kernels:
        yield (
            "model.ligerKernels",
            "true, but the job uses no CUDA GPU and Liger kernels need one",
            "remove ligerKernels, or request GPUs in spec.resources",
        )
    if spec.training.gradient_checkpointing is GradientCheckpointing.UNSLOTH:
        yield (
            "training.gradientCheckpointing",
            "unsloth, but the job runs on CPU and this mode needs a GPU",
            "write enabled or disabled",
        )


MAX_ACCUMULATION = 65536
"""Maximum of `training.gradientAccumulationSteps` and of `training.batchSizePerDevice` in the CRD."""


@rule("EffectiveBatchSize")
def check_effective_batch_size(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    training, path, rank_count = spec.training, "training.effectiveBatchSize", compute_data_parallel_size(spec)
    requested_batch, micro_batch, accumulation = training.effective_batch_size, training.batch_size_per_device, training.gradient_accumulation_steps
    if requested_batch is None:
        return
    batch_options = {"batchSizePerDevice": micro_batch, "gradientAccumulationSteps": accumulation}
    factors = [f"{name} {value}" for name, value in batch_options.items() if value is not None] + [f"{rank_count} {_format_ranks(spec, rank_count)}"]
    batch_product, product_text = (micro_batch or 1) * (accumulation or 1) * rank_count, " x ".join(factors)
    if micro_batch is not None and accumulation is not None:
        if requested_batch != batch_product:
            yield path, f"{requested_batch}, but {product_text} are {batch_product} rows", f"remove effectiveBatchSize, batchSizePerDevice or gradientAccumulationSteps, or write `effectiveBatchSize: {batch_product}`"
    elif requested_batch % batch_product:
        lower_multiple = requested_batch // batch_product * batch_product
        nearest_multiples = f"{lower_multiple} or {lower_multiple + batch_product}" if lower_multiple else str(batch_product)
        yield path, f"{requested_batch} is not divisible by {product_text}" + (f" = {batch_product}" if len(factors) > 1 else ""), f"write {nearest_multiples}"
    elif max(compute_batch_split(spec)) > MAX_ACCUMULATION:
        yield path, f"{requested_batch} needs more than {MAX_ACCUMULATION} accumulation steps, or more than {MAX_ACCUMULATION} rows in a micro-batch", f"write at most {MAX_ACCUMULATION * batch_product}"


def _format_ranks(spec: FineTuneJobSpec, group_count: int) -> str:
    """Return the words that follow `group_count` in a message: `ranks` or, with context parallelism, for example `groups of 4 ranks`."""
    context_parallel_size = spec.distributed.context_parallel_size or 1
    if context_parallel_size > 1:
        return f"{'group' if group_count == 1 else 'groups'} of {context_parallel_size} ranks"
    return "rank" if group_count == 1 else "ranks"


@rule("DeviceOfAnotherMachine")
def check_device(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    requested_device = spec.training.device
    if target is ExecutionTarget.LOCAL:
        return
    if requested_device is Device.MPS:
        yield (
            "training.device",
            "mps, but cluster nodes have no MPS devices",
            "remove device, or use `finetune run --local` on an Apple machine",
        )
    if requested_device is Device.CPU and gpus_per_node(spec) > 0:
        yield (
            "training.device",
            f"cpu, but resources.gpusPerNode requests {gpus_per_node(spec)} GPUs",
            "write `resources: {gpusPerNode: 0}`, or remove device",
        )
    if requested_device is Device.CUDA and gpus_per_node(spec) == 0:
        yield "training.device", "cuda, but resources.gpusPerNode is 0", "write gpusPerNode 1 or more, or `device: cpu`"


@rule(
    "BestNeedsMatchingSteps",
    cel="!(has(self.checkpoint) && has(self.checkpoint.loadBestAtEnd) && self.checkpoint.loadBestAtEnd && has(self.checkpoint.steps) && has(self.evaluation) && has(self.evaluation.steps)) || self.checkpoint.steps % self.evaluation.steps == 0",
    message="with checkpoint.loadBestAtEnd, checkpoint.steps must be a multiple of evaluation.steps, so that every checkpoint is evaluated",
)
def check_best_checkpoint(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    if not spec.checkpoint.load_best_at_end:
        return
    if not evaluates_during_training(spec):
        yield (
            "checkpoint.loadBestAtEnd",
            "true, but without a validation loss the trainer cannot choose the best checkpoint",
            "add dataset.validation or dataset.split.validation, or remove loadBestAtEnd",
        )
        return
    save_strategy, eval_strategy = value_or_default(spec.checkpoint, "strategy"), spec.evaluation.strategy or IntervalStrategy.STEPS
    if save_strategy != eval_strategy:
        yield (
            "checkpoint.strategy",
            f"{save_strategy}, but evaluation.strategy is {eval_strategy}, and loadBestAtEnd needs the same strategy for both",
            f"write `checkpoint: {{strategy: {eval_strategy}}}`",
        )
    save_steps = int(value_or_default(spec.checkpoint, "steps"))
    eval_steps = spec.evaluation.steps or save_steps
    if save_strategy == IntervalStrategy.STEPS and eval_strategy is IntervalStrategy.STEPS and save_steps % eval_steps:
        yield (
            "checkpoint.steps",
            f"{save_steps} is not a multiple of evaluation.steps {eval_steps}, but loadBestAtEnd needs an evaluation of every checkpoint",
            f"write for example {math.ceil(save_steps / eval_steps) * eval_steps}",
        )


@rule("StepsWithoutEffect")
def check_steps_without_effect(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    save_strategy = value_or_default(spec.checkpoint, "strategy")
    if spec.checkpoint.steps is not None and save_strategy != IntervalStrategy.STEPS:
        yield (
            "checkpoint.steps",
            f"checkpoint.steps has no effect, because checkpoint.strategy is {save_strategy}",
            "remove checkpoint.steps or checkpoint.strategy",
        )
    if spec.evaluation.steps is not None and spec.evaluation.strategy in (IntervalStrategy.EPOCH, IntervalStrategy.NO):
        yield (
            "evaluation.steps",
            f"evaluation.steps has no effect, because evaluation.strategy is {spec.evaluation.strategy}",
            "remove evaluation.steps or evaluation.strategy",
        )
    if spec.training.checkpoint_every_n_layers not in (None, 1):
        yield from _check_recomputation_interval(spec)


def _check_recomputation_interval(spec: FineTuneJobSpec) -> Findings:
    """Yield a problem if gradient checkpointing is disabled, because `training.checkpointEveryNLayers` then has no effect."""
    path, mode = "training.checkpointEveryNLayers", spec.training.gradient_checkpointing
    if mode is GradientCheckpointing.DISABLED:
        yield path, "checkpointEveryNLayers has no effect with `gradientCheckpointing: disabled`", "remove checkpointEveryNLayers or gradientCheckpointing"
    elif mode is None and method_type_of(spec) is MethodType.PREFIX_TUNING:
        yield path, "checkpointEveryNLayers has no effect, because prefixTuning disables gradientCheckpointing", "remove checkpointEveryNLayers"
    elif mode is None and gpus_per_node(spec) == 0:
        yield (
            path,
            "checkpointEveryNLayers has no effect, because gradientCheckpointing is disabled by default on CPU",
            "write `gradientCheckpointing: enabled`, or remove checkpointEveryNLayers",
        )


def list_adam_fields(optimizer: str) -> tuple[str, ...]:
    """Return the Adam options of `spec.training` that an optimizer uses. The trainer's tests compare this function with transformers' code."""
    if "adam" in optimizer or "ademamix" in optimizer:
        return ("adam_beta1", "adam_beta2", "adam_epsilon")
    return ("adam_beta1", "adam_beta2") if "lion" in optimizer else ()


@rule("TrainingOptionWithoutEffect")
def check_training_options(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    training = spec.training
    optimizer_name = str(value_or_default(training, "optimizer"))
    used_fields = list_adam_fields(optimizer_name)
    for field, wire_name in (("adam_beta1", "adamBeta1"), ("adam_beta2", "adamBeta2"), ("adam_epsilon", "adamEpsilon")):
        if getattr(training, field) is not None and field not in used_fields and optimizer_name in OPTIMIZERS:
            yield (
                f"training.{wire_name}",
                f"{getattr(training, field):g}, but {wire_name} has no effect on optimizer {optimizer_name}",
                f"remove {wire_name}, or choose an Adam optimizer",
            )
    if training.group_by_length and spec.dataset.packing:
        yield (
            "training.groupByLength",
            "true, but with `packing: true` all sequences have the same length",
            "remove groupByLength or packing",
        )


@rule("ValidationMissing")
def check_validation_missing(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    hint = "add dataset.validation or dataset.split.validation, or remove {}"
    if has_validation_set(spec):
        if spec.training.early_stopping is not None and not evaluates_during_training(spec):
            yield (
                "training.earlyStopping",
                "earlyStopping needs the validation loss, but evaluation.strategy is no",
                "write `evaluation: {strategy: steps}`, or remove earlyStopping",
            )
        return
    if spec.evaluation.strategy not in (None, IntervalStrategy.NO):
        yield "evaluation.strategy", f"{spec.evaluation.strategy}, but the spec has no validation data", hint.format("evaluation.strategy")
    if spec.evaluation.steps is not None and spec.evaluation.strategy is None:
        yield "evaluation.steps", "evaluation.steps has no effect without validation data", hint.format("evaluation.steps")
    if spec.training.early_stopping is not None:
        message = "earlyStopping needs the validation loss, but the spec has no validation data"
        yield "training.earlyStopping", message, hint.format("earlyStopping")


PICKLING_STRATEGIES = (StrategyType.FSDP, StrategyType.DEEPSPEED)
"""Strategies whose checkpoints contain Python pickles. Loading a forged pickle runs code."""


@rule("CheckpointMayContainCode")
def check_pickled_checkpoint(spec: FineTuneJobSpec, target: ExecutionTarget) -> Findings:
    resume, strategy = spec.checkpoint.resume, spec.distributed.strategy
    needs_permission = resume not in (None, "auto", "never") and strategy in PICKLING_STRATEGIES
    if needs_permission and not spec.checkpoint.allow_pickle:
        yield (
            "checkpoint.allowPickle",
            f"checkpoint.resume names a checkpoint of another job, and checkpoints of {strategy} contain Python pickles, which can run code",
            "write `allowPickle: true` if you trust everyone who can write to this address",
        )
    if spec.checkpoint.allow_pickle and not needs_permission:
        yield (
            "checkpoint.allowPickle",
            "true, but allowPickle has an effect only if checkpoint.resume is an address and distributed.strategy is fsdp or deepspeed",
            "remove allowPickle",
        )
