"""DeepSpeed ZeRO: stage 1 shards the optimizer, stage 2 also gradients, stage 3 also parameters; stage 0 is plain data parallelism.

Options that only DeepSpeed has are taken from the user's JSON. Options that the spec also has (batch, clipping, learning rate,
precision, stage, offload) must be equal in both, or `auto` in the JSON. An Adam optimizer in the JSON is replaced by torch's AdamW,
because DeepSpeed would compile its own optimizers on first use, and the image has no C++ or CUDA compiler. A scheduler in the JSON
is replaced by a scheduler of transformers. DeepSpeed ignores unknown keys at the top level, and fails with a traceback if a value
has the wrong type. For such keys and values, this module raises an error that names the key.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.rules import (
    incompatible_with_deepspeed,
    incompatible_with_zero3,
    min_batch_size_per_device,
    raise_first_finding,
)
from finetune_api.spec.enums import LearningRateSchedule
from pydantic import ValidationError

from finetune_trainer.distributed import context_parallel
from finetune_trainer.distributed.base import DistributedStrategy, set_single_rank_variables
from finetune_trainer.distributed.user_config import (
    AUTO_VALUE,
    BOOLEAN_TYPE,
    COUNT_TYPE,
    MAPPING_TYPE,
    NOT_NEGATIVE_TYPE,
    POSITIVE_TYPE,
    STEP_COUNT_TYPE,
    TEXT_TYPE,
    FileMerge,
    ValueType,
    check_keys,
    one_of,
    read_config_file,
)
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs

FILE_FIELD = "distributed.deepspeed.configRef"
DEFAULT_STAGE = 2
AUTO_ALLOWED = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of zero_optimization that may be `auto`: transformers computes their values from the model's size."""
_TRACKING_DECIDES = "the spec's `tracking` decides where metrics are sent"
_REMOVED_SECTION_REASON = "this version of DeepSpeed does not have this section"
REFUSED_SECTIONS = {
    "tensor_parallel": "tensor parallelism is not supported", "sequence_parallel_size": "sequence parallelism is not supported",
    "expert_parallel": "expert parallelism is not supported", "elasticity": "the operator decides the number of ranks",
    "pipeline": "pipeline parallelism is not supported", "curriculum_learning": "DeepSpeed cannot choose the order of the rows",
    "data_efficiency": "DeepSpeed cannot choose the order of the rows",
    "activation_checkpointing": "write training.gradientCheckpointing instead",
    "torch_autocast": "write training.mixedPrecision instead", "bfloat16": "the key is called bf16",
    "aio": "nvme is not supported", "autotuning": "the operator starts the ranks", "hybrid_engine": "DeepSpeed does not generate completions",
    "tensorboard": _TRACKING_DECIDES, "wandb": _TRACKING_DECIDES, "comet": _TRACKING_DECIDES, "csv_monitor": _TRACKING_DECIDES,
} | dict.fromkeys(
    ("amp", "compression_training", "eigenvalue", "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    _REMOVED_SECTION_REASON,
)  # fmt: skip
"""Refused sections and the reason. A section that the file disables (`enabled: false`) is not refused."""
REFUSED_IN_ZERO = {
    "cpu_offload": "the key is called offload_optimizer", "cpu_offload_param": "the key is called offload_param",
    "cpu_offload_use_pin_memory": "the key is called pin_memory, in offload_optimizer and offload_param",
}  # fmt: skip
COMPILED_OPTIONS: tuple[tuple[str, ...], ...] = (
    ("zero_optimization", "zero_quantized_weights"), ("zero_optimization", "zero_quantized_nontrainable_weights"),
    ("zero_optimization", "zero_quantized_gradients"), ("zero_optimization", "zenflow"),
    ("zero_optimization", "offload_optimizer", "super_offload"), ("checkpoint", "writer"),
)  # fmt: skip
"""Paths of options for which DeepSpeed compiles code on first use. They are refused, because the image has no C++ or CUDA compiler."""
MICRO_BATCH_KEY, MICRO_BATCH_PATH = "train_micro_batch_size_per_gpu", "training.batchSizePerDevice"
ACCUMULATION_KEY, ACCUMULATION_PATH = "gradient_accumulation_steps", "training.gradientAccumulationSteps"
MAX_BATCH_VALUE = 65536
"""Upper limit of batchSizePerDevice and gradientAccumulationSteps in the API."""
BATCH_VALUE_TYPE = ValueType(
    f"a whole number from 1 to {MAX_BATCH_VALUE}", lambda value: COUNT_TYPE.accepts(value) and value <= MAX_BATCH_VALUE
)
TOP_LEVEL_KEYS = {
    "train_batch_size": COUNT_TYPE, MICRO_BATCH_KEY: BATCH_VALUE_TYPE, ACCUMULATION_KEY: BATCH_VALUE_TYPE, "gradient_clipping": NOT_NEGATIVE_TYPE,
    "bf16": MAPPING_TYPE, "fp16": MAPPING_TYPE, "zero_optimization": MAPPING_TYPE, "optimizer": MAPPING_TYPE, "scheduler": MAPPING_TYPE,
    "zero_allow_untested_optimizer": BOOLEAN_TYPE, "zero_force_ds_cpu_optimizer": BOOLEAN_TYPE, "communication_data_type": TEXT_TYPE,
    "data_types": MAPPING_TYPE, "prescale_gradients": BOOLEAN_TYPE, "gradient_predivide_factor": POSITIVE_TYPE, "gradient_allreduce_op": TEXT_TYPE,
    "checkpoint": MAPPING_TYPE, "comms_logger": MAPPING_TYPE, "flops_profiler": MAPPING_TYPE, "timers": MAPPING_TYPE,
    "steps_per_print": POSITIVE_TYPE, "wall_clock_breakdown": BOOLEAN_TYPE, "memory_breakdown": BOOLEAN_TYPE, "dump_state": BOOLEAN_TYPE,
    "disable_python_gc": BOOLEAN_TYPE, "log_level": TEXT_TYPE,
}  # fmt: skip
"""Type of each key at the top level of the JSON. DeepSpeed checks the keys inside the sections, see `validate_with_deepspeed`."""
TYPED_SECTION = {"type": TEXT_TYPE, "params": MAPPING_TYPE}
BETA_TYPE = ValueType(
    "a number from 0 to below 1", lambda value: value == AUTO_VALUE or NOT_NEGATIVE_TYPE.accepts(value) and value < 1
)
BETA_PAIR_TYPE = ValueType(
    "two numbers from 0 to below 1",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(BETA_TYPE.accepts, value)),
)
ADAM_PARAMETERS = {
    "lr": POSITIVE_TYPE, "betas": BETA_PAIR_TYPE, "eps": POSITIVE_TYPE, "weight_decay": NOT_NEGATIVE_TYPE, "adam_w_mode": BOOLEAN_TYPE,
    "torch_adam": BOOLEAN_TYPE,
}  # fmt: skip
WARMUP_PARAMETERS = {
    "warmup_num_steps": STEP_COUNT_TYPE, "warmup_min_lr": NOT_NEGATIVE_TYPE, "warmup_max_lr": NOT_NEGATIVE_TYPE, "total_num_steps": COUNT_TYPE,
    "warmup_type": TEXT_TYPE,
}  # fmt: skip
OFFLOAD_DEVICE = one_of("none", "cpu", "nvme")
FUSED_ADAMW = "adamw_torch_fused"
TORCH_ADAMW = ("adamw_torch", FUSED_ADAMW)
OFFLOAD_FIELDS = (
    ("offload_optimizer", "offloadOptimizer", "offload_optimizer"), ("offload_param", "offloadParameters", "offload_parameters"),
)  # fmt: skip
"""For each offload: section of zero_optimization, field of the spec, Python attribute of the field."""
DEEPSPEED_SCHEDULERS = {
    "WarmupLR": LearningRateSchedule.CONSTANT_WITH_WARMUP, "WarmupDecayLR": LearningRateSchedule.LINEAR, "WarmupCosineLR": LearningRateSchedule.COSINE,
}  # fmt: skip


@dataclass
class DeepspeedOptions:
    """DeepSpeed's configuration, and the TrainingArguments that follow from it."""

    stage: int
    config: dict[str, Any]
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingArguments that the JSON sets."""
    notes: list[str] = field(default_factory=list)


def build_options(run: RunConfig, inputs: Inputs, hardware: Hardware, world_size: int) -> DeepspeedOptions:
    """The options of a run, from the spec and the user's JSON.

    Errors: ConfigError ConfigsDisagree (with all conflicts), ConfigFileInvalid, OffloadNeedsStage3, or the code of an API rule
    that a value of the file breaks; NotFoundError ConfigMapMissing.
    """
    spec = run.spec.distributed.deepspeed
    merge = FileMerge(run)
    has_file = spec is not None and spec.config_ref is not None
    file_config = read_config_file(spec.config_ref, inputs.config_maps, FILE_FIELD) if has_file else {}
    config = _check_config(file_config, merge)
    result = DeepspeedOptions(DEFAULT_STAGE, config)
    _merge_batch_sizes(config, merge, run, result, world_size)
    _merge_precision(config, merge, hardware)
    _merge_optimizer(config, merge, run, result)
    _merge_scheduler(config, merge, run, result)
    _merge_zero(config, merge, run, result)
    merge.check_merged_values("the DeepSpeed JSON")
    result.notes += merge.notes
    _require_no_auto(config)
    return result


def _check_config(file_config: dict[str, Any], merge: FileMerge) -> dict[str, Any]:
    """Check the file and copy it without null values and disabled sections. Errors: ConfigError ConfigFileInvalid."""
    config: dict[str, Any] = _without_nulls(file_config)
    disabled_sections = [
        key for key in REFUSED_SECTIONS if isinstance(config.get(key), dict) and config[key].get("enabled") is False
    ]
    for key in disabled_sections:
        del config[key]
    if disabled_sections:
        merge.notes.append(f"sections that the DeepSpeed JSON disables are ignored: {', '.join(disabled_sections)}")
    _refuse_keys(REFUSED_SECTIONS, "", config)
    check_keys(FILE_FIELD, "", config, TOP_LEVEL_KEYS, allows_auto=True)
    for name in ("bf16", "fp16"):
        _check_read_keys(name, config.get(name), {"enabled": BOOLEAN_TYPE})
    zero = config.get("zero_optimization", {})
    _refuse_keys(REFUSED_IN_ZERO, "zero_optimization.", zero)
    _check_read_keys(
        "zero_optimization", zero, {"stage": one_of(0, 1, 2, 3), **{section: MAPPING_TYPE for section, _, _ in OFFLOAD_FIELDS}}
    )
    for section, _, _ in OFFLOAD_FIELDS:
        _check_read_keys(
            f"zero_optimization.{section}", zero.get(section), {"device": OFFLOAD_DEVICE}, allows_auto=False
        )
    _refuse_compiled_options(config)
    return config


def _refuse_compiled_options(config: dict[str, Any]) -> None:
    requested = [".".join(path) for path in COMPILED_OPTIONS if _value_at(config, path) not in (None, False)]
    if requested:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE_FIELD}: DeepSpeed compiles {', '.join(requested)} on first use, but the image has no C++ or CUDA compiler",
            hint="remove it",
        )


def _value_at(section: Any, path: tuple[str, ...]) -> Any:
    """Return the value at a path of nested sections; None if a section or the value is absent."""
    for key in path:
        section = section.get(key) if isinstance(section, dict) else None
    return section


def _refuse_keys(keys: dict[str, str], prefix: str, section: dict[str, Any]) -> None:
    refused = [f"{prefix}{key} ({reason})" for key, reason in keys.items() if key in section]
    if refused:
        raise ConfigError("ConfigFileInvalid", f"{FILE_FIELD}: {'; '.join(refused)}", hint="remove it")


def _without_nulls(value: Any) -> Any:
    """Copy the value without nulls. A null means DeepSpeed's default."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return copy.deepcopy(value)


def _check_read_keys(group: str, section: Any, value_types: dict[str, ValueType], *, allows_auto: bool = True) -> None:
    """Check the keys of a section that this module reads. DeepSpeed checks the other keys."""
    check_keys(
        FILE_FIELD,
        group,
        {key: value for key, value in (section or {}).items() if key in value_types},
        value_types,
        allows_auto=allows_auto,
    )


def _merge_batch_sizes(config: dict[str, Any], merge: FileMerge, run: RunConfig, result: DeepspeedOptions, world_size: int) -> None:
    rows, steps = _merge_rows_and_steps(config, merge, run)
    clip = merge.merge(
        "gradient_clipping", config.get("gradient_clipping"), "training.maxGradNorm", run.spec.training.max_grad_norm
    )
    effective_batch = rows * steps * world_size // (run.spec.distributed.context_parallel_size or 1)
    merge.require_equal(
        "train_batch_size", config.get("train_batch_size"), "micro-batch x accumulation x ranks", effective_batch
    )
    # transformers and DeepSpeed check the value before they know the groups of ranks. accelerate then corrects it.
    config |= {MICRO_BATCH_KEY: rows, ACCUMULATION_KEY: steps, "train_batch_size": rows * steps * world_size, "gradient_clipping": clip}
    result.training_arguments |= {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": steps,
        "max_grad_norm": clip,
    }


def _merge_rows_and_steps(config: dict[str, Any], merge: FileMerge, run: RunConfig) -> tuple[int, int]:
    """Return micro-batch and accumulation steps.

    If the operator reduced the spec's micro-batch, the file's value is reduced too. The effective batch stays the same.
    """
    training = run.spec.training
    requested_rows = training.batch_size_per_device
    rows_before_adaptation = merge.before_adaptation(MICRO_BATCH_PATH, requested_rows)
    is_adapted = rows_before_adaptation != requested_rows
    asked_steps = training.gradient_accumulation_steps
    spec_steps = merge.before_adaptation(ACCUMULATION_PATH, asked_steps) if is_adapted else asked_steps
    rows = merge.merge(MICRO_BATCH_KEY, config.get(MICRO_BATCH_KEY), MICRO_BATCH_PATH, rows_before_adaptation)
    steps = merge.merge(ACCUMULATION_KEY, config.get(ACCUMULATION_KEY), ACCUMULATION_PATH, spec_steps)
    if not is_adapted or merge.conflicts:
        return rows, steps
    merge.file_values |= {MICRO_BATCH_PATH: rows, ACCUMULATION_PATH: steps}
    reduced_rows = _reduced_rows(rows, steps, rows * requested_rows / rows_before_adaptation, merge, run)
    if (rows, steps) != (rows_before_adaptation, spec_steps):
        change = f"the operator changed {MICRO_BATCH_PATH} from {rows_before_adaptation} to {requested_rows}"
        if reduced_rows == rows:
            note = f"{MICRO_BATCH_KEY} of the file stays {rows}, although {change}: no smaller divisor of {rows} is allowed"
        else:
            note = (
                f"{change}; {MICRO_BATCH_KEY} in the file therefore changes from {rows} to {reduced_rows}, and {ACCUMULATION_KEY} "
                f"from {steps} to {steps * rows // reduced_rows}"
            )
        merge.notes.append(note)
    steps = steps * rows // reduced_rows
    merge.file_values |= {MICRO_BATCH_PATH: reduced_rows, ACCUMULATION_PATH: steps}
    return reduced_rows, steps


def _reduced_rows(rows: int, steps: int, limit: float, merge: FileMerge, run: RunConfig) -> int:
    """Return the largest allowed divisor of the micro-batch `rows` that is at most `limit`.

    If all allowed divisors are above the limit, return the smallest; if there are none, return `rows`. A divisor is not allowed if
    it breaks a rule of the API: after an out-of-memory error, the job must not fail because of the adapted value.
    """
    divisors = [
        part
        for part in range(min_batch_size_per_device(run.spec), rows)
        if rows % part == 0
        and steps * rows // part <= MAX_BATCH_VALUE
        and merge.allows({MICRO_BATCH_PATH: part, ACCUMULATION_PATH: steps * rows // part})
    ]
    return max((part for part in divisors if part <= limit), default=min(divisors, default=rows))


def _merge_precision(config: dict[str, Any], merge: FileMerge, hardware: Hardware) -> None:
    for name, active in (("bf16", hardware.bf16), ("fp16", hardware.fp16)):
        section = config.setdefault(name, {})
        merge.require_equal(
            f"{name}.enabled",
            section.get("enabled"),
            f"{name} on {hardware.name}, from training.mixedPrecision,",
            active,
        )
        section["enabled"] = active


def _merge_optimizer(config: dict[str, Any], merge: FileMerge, run: RunConfig, result: DeepspeedOptions) -> None:
    """Replace the Adam optimizer of the JSON by torch's AdamW with the same parameters."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    check_keys(FILE_FIELD, "optimizer", section, TYPED_SECTION, allows_auto=True)
    kind, parameters, training = (
        str(section.get("type", "without a type")),
        dict(section.get("params") or {}),
        run.spec.training,
    )
    if kind.lower() not in ("adam", "adamw") or parameters.get("adam_w_mode", True) is False:
        raise ConfigError(
            "ConfigFileInvalid", f"{FILE_FIELD}: DeepSpeed compiles optimizer {kind} on first use, but the image has no C++ or CUDA compiler",
            hint="write AdamW, or remove the section and name training.optimizer",
        )  # fmt: skip
    check_keys(FILE_FIELD, "optimizer.params", parameters, ADAM_PARAMETERS, allows_auto=True)
    name = training.optimizer
    if name not in TORCH_ADAMW:
        name = merge.merge("optimizer.type", FUSED_ADAMW, "training.optimizer", name, file_text=kind)
    betas = parameters.get("betas", AUTO_VALUE)
    first, second = (AUTO_VALUE, AUTO_VALUE) if betas == AUTO_VALUE else betas
    result.training_arguments |= {
        "optim": name,
        "adam_beta1": merge.merge("optimizer.params.betas[0]", first, "training.adamBeta1", training.adam_beta1),
        "adam_beta2": merge.merge("optimizer.params.betas[1]", second, "training.adamBeta2", training.adam_beta2),
        "learning_rate": merge.merge("optimizer.params.lr", parameters.get("lr"), "training.learningRate", training.learning_rate),
        "adam_epsilon": merge.merge("optimizer.params.eps", parameters.get("eps"), "training.adamEpsilon", training.adam_epsilon),
        "weight_decay": merge.merge("optimizer.params.weight_decay", parameters.get("weight_decay"), "training.weightDecay", training.weight_decay),
    }  # fmt: skip
    merge.notes.append(f"optimizer {kind} of the DeepSpeed JSON runs as torch's AdamW ({name})")


def _merge_scheduler(config: dict[str, Any], merge: FileMerge, run: RunConfig, result: DeepspeedOptions) -> None:
    """Replace the warm-up schedule of the JSON by the equivalent scheduler of transformers."""
    section = config.pop("scheduler", None)
    if section is None:
        return
    check_keys(FILE_FIELD, "scheduler", section, TYPED_SECTION, allows_auto=True)
    kind, parameters, training = (
        str(section.get("type", "without a type")),
        dict(section.get("params") or {}),
        run.spec.training,
    )
    if kind not in DEEPSPEED_SCHEDULERS:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE_FIELD}: scheduler {kind} is not supported",
            hint=f"write one of {', '.join(DEEPSPEED_SCHEDULERS)}, or training.scheduler",
        )
    check_keys(FILE_FIELD, "scheduler.params", parameters, WARMUP_PARAMETERS, allows_auto=True)
    from finetune_trainer.schedules import SCHEDULER_NAMES

    scheduler = merge.merge(
        "scheduler.type",
        DEEPSPEED_SCHEDULERS[kind],
        "training.scheduler",
        training.scheduler,
        file_text=f"{kind} ({DEEPSPEED_SCHEDULERS[kind]})",
    )
    result.training_arguments["lr_scheduler_type"] = SCHEDULER_NAMES[scheduler]
    _merge_warmup(parameters.get("warmup_num_steps"), merge, run, result)
    rate = merge.undo_adaptation(
        "training.learningRate", training.learning_rate, result.training_arguments.get("learning_rate", training.learning_rate)
    )
    for key, path, actual in (
        ("warmup_max_lr", "training.learningRate", rate),
        ("warmup_min_lr", "the first learning rate of the warm-up", 0),
        ("total_num_steps", "training.maxSteps", training.max_steps),
        ("warmup_type", "the shape of the warm-up", "linear"),
    ):
        merge.require_equal(f"scheduler.params.{key}", parameters.get(key), path, actual)
    merge.notes.append(f"scheduler {kind} of the DeepSpeed JSON runs as {scheduler}")


def _merge_warmup(steps: Any, merge: FileMerge, run: RunConfig, result: DeepspeedOptions) -> None:
    """Use the file's warm-up steps instead of the spec's warm-up ratio if that ratio is a default."""
    training, key = run.spec.training, "scheduler.params.warmup_num_steps"
    if steps in (None, AUTO_VALUE):
        return
    if training.warmup_ratio and "training.warmupRatio" not in run.defaults:
        merge.conflicts.append(f"{key} is {steps}, training.warmupRatio is {training.warmup_ratio:g}")
    result.training_arguments["warmup_steps"] = merge.merge(key, steps, "training.warmupSteps", training.warmup_steps)
    if "training.warmupSteps" in merge.file_values:
        merge.file_values["training.warmupRatio"] = None


def _merge_zero(config: dict[str, Any], merge: FileMerge, run: RunConfig, result: DeepspeedOptions) -> None:
    spec = run.spec.distributed.deepspeed
    zero = config.setdefault("zero_optimization", {})
    stage = merge.merge(
        "zero_optimization.stage",
        zero.get("stage"),
        "distributed.deepspeed.zeroStage",
        spec.zero_stage if spec else None,
    )
    result.stage = zero["stage"] = DEFAULT_STAGE if stage is None else stage
    for key, path, attribute in OFFLOAD_FIELDS:
        section, requested = zero.get(key) or {}, getattr(spec, attribute) if spec else None
        if section.get("device") == "nvme":
            raise ConfigError(
                "ConfigFileInvalid",
                f"{FILE_FIELD}: {key}.device nvme needs code that DeepSpeed compiles on first use, but the image has no C++ or CUDA compiler",
                hint="write cpu",
            )
        file_value = None if key not in zero else section.get("device", "none") != "none"
        if merge.merge(f"zero_optimization.{key}", file_value, f"distributed.deepspeed.{path}", requested):
            zero[key] = {**section, "device": "cpu"}
        else:
            zero.pop(key, None)
    if "offload_param" in zero and result.stage != 3:
        raise ConfigError(
            "OffloadNeedsStage3", f"offloadParameters is true, but the ZeRO stage is {result.stage}, which does not shard parameters",
            hint="write `zeroStage: 3`, or remove offloadParameters",
        )  # fmt: skip
    if "offload_optimizer" in zero and result.stage == 0:
        raise ConfigError(
            "OffloadNeedsStage1", "offloadOptimizer is true, but with ZeRO stage 0 DeepSpeed does not hold the optimizer's state",
            hint="write `zeroStage: 1` or more, or remove offloadOptimizer",
        )  # fmt: skip
    if result.stage == 3:
        merge.require_equal(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save", zero.get("stage3_gather_16bit_weights_on_model_save"),
            "the value that a loadable checkpoint needs", True,
        )  # fmt: skip
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    # With these keys, DeepSpeed accepts torch's optimizer even with offloading. Otherwise DeepSpeed would compile its own optimizer.
    for key, value in (("zero_allow_untested_optimizer", True), ("zero_force_ds_cpu_optimizer", False)):
        merge.require_equal(key, config.get(key), "the value that torch's optimizer needs", value)
        config[key] = value


def _require_no_auto(config: dict[str, Any]) -> None:
    unset_keys = [key for key in _auto_keys(config) if key.removeprefix("zero_optimization.") not in AUTO_ALLOWED]
    if unset_keys:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE_FIELD}: {', '.join(unset_keys)} is auto, and the spec has no value for it",
            hint="write a value, or remove it",
        )


def _auto_keys(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            nested
            for key, inner in value.items()
            for nested in _auto_keys(inner, f"{path}.{key}" if path else str(key))
        ]
    return [path] if value == AUTO_VALUE else []


def validate_with_deepspeed(config: dict[str, Any]) -> None:
    """Let DeepSpeed parse the configuration before the model is loaded. Errors: ConfigError ConfigFileInvalid with DeepSpeed's message."""
    from deepspeed.runtime.config import DeepSpeedConfig

    trial = copy.deepcopy(config)
    # Leave out train_batch_size: DeepSpeed would check it against one rank, because no process group exists yet.
    del trial["train_batch_size"]
    try:
        DeepSpeedConfig(trial)
    except Exception as error:
        message = str(error)
        if isinstance(error, ValidationError):
            message = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            message = f"{error.title}: {message}"
        raise ConfigError(
            "ConfigFileInvalid", f"{FILE_FIELD}: DeepSpeed refuses the file: {' '.join(message.split())[:500]}",
            hint="correct the named key, or remove it",
        ) from error  # fmt: skip


class Deepspeed(DistributedStrategy):
    """The model is wrapped in DeepSpeed's engine."""

    name = "deepspeed"
    uses_autocast = False

    def __init__(self, run: RunConfig, hardware: Hardware, world_size: int, options: DeepspeedOptions):
        super().__init__(run, hardware, world_size)
        self.options = options
        self.shards_weights = self.keeps_base_dtype = options.stage == 3
        self.notes += [*options.notes, f"DeepSpeed ZeRO stage {options.stage}"]
        if self.context_parallel_size > 1:
            self.notes.append(f"{self.context_parallel_size} ranks share each sequence (Ulysses)")
            self.gradient_factor = context_parallel.gradient_factor(self.context_parallel_size, options.stage, options.config)
        raise_first_finding("StrategyAndMethod", incompatible_with_deepspeed(run.spec))
        if options.stage == 3:
            raise_first_finding("StrategyAndMethod", incompatible_with_zero3(run.spec))

    @property
    def trainer_mixins(self) -> tuple[type, ...]:
        """Return the mixin that loads the best weights, and with context parallelism the mixin for it."""
        return (_best_weights_mixin(), *([context_parallel.context_parallel_mixin()] if self.context_parallel_size > 1 else []))

    def prepare_process(self) -> None:
        """Create the process group that DeepSpeed needs even for one rank. On CPU, accelerate would create it too late."""
        import deepspeed
        import torch

        from finetune_trainer.library_internals import disable_compiled_deepspeed_operations

        validate_with_deepspeed(self.options.config)
        disable_compiled_deepspeed_operations()
        if self.world_size == 1:
            set_single_rank_variables()
        if self.hardware.is_cpu:
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    def training_arguments(self) -> dict[str, Any]:
        """Fields of TrainingArguments."""
        arguments = {**self.options.training_arguments, "deepspeed": copy.deepcopy(self.options.config)}
        if self.context_parallel_size > 1:
            arguments["parallelism_config"] = context_parallel.parallelism_config(self.context_parallel_size, self.world_size)
        return arguments

    def verify_active(self, trainer: Any) -> str:
        """Also check the engine's stage, its ranks and the number of sharded parameters. Errors: InternalError StrategyNotActive."""
        name = super().verify_active(trainer)
        engine = trainer.deepspeed
        stage, ranks = engine.zero_optimization_stage(), engine.world_size
        sharded_count = sum(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
        total = sum(1 for _ in trainer.model.parameters())
        expected_count = total if self.options.stage == 3 else 0
        if (stage, ranks, sharded_count) != (self.options.stage, self.world_size, expected_count):
            raise InternalError(
                "StrategyNotActive",
                f"ZeRO stage {self.options.stage} over {self.world_size} ranks was requested; active: stage {stage} over {ranks} ranks, "
                f"{sharded_count} of {total} parameters sharded",
                hint="this is a bug of the trainer image: report it with the versions of its packages",
            )  # fmt: skip
        if self.context_parallel_size > 1:
            context_parallel.require_group(self.context_parallel_size)
        return name


def _best_weights_mixin() -> type:
    """Create the mixin class on demand, so that importing this module does not import torch."""
    from finetune_trainer.best import best_folder
    from finetune_trainer.distributed.weights import load_into_deepspeed
    from finetune_trainer.library_internals import OpenTrainer

    class BestWeightsFromFolder(OpenTrainer):
        """Loads the best weights from a plain folder. transformers would load DeepSpeed's own checkpoint, but it may be deleted."""

        def load_best_model(self) -> None:
            is_reader = self.accelerator.is_main_process
            load_into_deepspeed(self.model, best_folder(self) if is_reader else Path(), is_reader)
            self.accelerator.wait_for_everyone()

    return BestWeightsFromFolder
