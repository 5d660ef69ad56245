"""DeepSpeed ZeRO: stage 1 shards the optimizer state, stage 2 also the gradients, stage 3 also the parameters; stage 0 shards nothing.

Options that only DeepSpeed has come from the user's JSON. Options that the spec has too (batch sizes, clipping, learning rate,
precision, stage, offloading) must be equal in both, or `auto` in the JSON. An Adam optimizer in the JSON is replaced with torch's AdamW,
because DeepSpeed would compile its own optimizers on first use, and the image has no C++ or CUDA compiler. A scheduler in the JSON
is replaced with a scheduler of transformers. DeepSpeed itself ignores unknown keys at the top level, and fails with a traceback for a
value of the wrong type. For unknown keys and for values of the wrong type, this module raises an error that names the key.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.rules import (
    find_deepspeed_conflicts,
    find_zero3_conflicts,
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

CONFIG_FILE_FIELD = "distributed.deepspeed.configRef"
DEFAULT_STAGE = 2
KEYS_THAT_MAY_BE_AUTO = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of zero_optimization that may be `auto`, because transformers computes their values from the size of the model."""
_REPLACED_BY_TRACKING_REASON = "the spec's `tracking` decides where metrics are sent"
_REMOVED_SECTION_REASON = "this version of DeepSpeed does not have this section"
REFUSED_SECTIONS = {
    "tensor_parallel": "tensor parallelism is not supported", "sequence_parallel_size": "sequence parallelism is not supported",
    "expert_parallel": "expert parallelism is not supported", "elasticity": "the operator decides the number of ranks",
    "pipeline": "pipeline parallelism is not supported", "curriculum_learning": "DeepSpeed cannot choose the order of the rows",
    "data_efficiency": "DeepSpeed cannot choose the order of the rows",
    "activation_checkpointing": "write training.gradientCheckpointing instead",
    "torch_autocast": "write training.mixedPrecision instead", "bfloat16": "the key is called bf16",
    "aio": "nvme is not supported", "autotuning": "the operator starts the ranks", "hybrid_engine": "DeepSpeed does not generate completions",
    "tensorboard": _REPLACED_BY_TRACKING_REASON, "wandb": _REPLACED_BY_TRACKING_REASON,
    "comet": _REPLACED_BY_TRACKING_REASON, "csv_monitor": _REPLACED_BY_TRACKING_REASON,
} | dict.fromkeys(
    ("amp", "compression_training", "eigenvalue", "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    _REMOVED_SECTION_REASON,
)  # fmt: skip
"""The refused sections and keys, each with the reason. A section that the file disables (`enabled: false`) is not refused."""
REFUSED_ZERO_KEYS = {
    "cpu_offload": "the key is called offload_optimizer", "cpu_offload_param": "the key is called offload_param",
    "cpu_offload_use_pin_memory": "the key is called pin_memory, in offload_optimizer and offload_param",
}  # fmt: skip
"""The refused keys of zero_optimization, each with the reason."""
COMPILED_OPTIONS: tuple[tuple[str, ...], ...] = (
    ("zero_optimization", "zero_quantized_weights"), ("zero_optimization", "zero_quantized_nontrainable_weights"),
    ("zero_optimization", "zero_quantized_gradients"), ("zero_optimization", "zenflow"),
    ("zero_optimization", "offload_optimizer", "super_offload"), ("checkpoint", "writer"),
)  # fmt: skip
"""Paths of the options that make DeepSpeed compile code on first use. These options are refused, because the image has no C++ or CUDA compiler."""
MICRO_BATCH_KEY, MICRO_BATCH_PATH = "train_micro_batch_size_per_gpu", "training.batchSizePerDevice"
ACCUMULATION_KEY, ACCUMULATION_PATH = "gradient_accumulation_steps", "training.gradientAccumulationSteps"
MAX_BATCH_VALUE = 65536
"""The API's upper limit of batchSizePerDevice and gradientAccumulationSteps."""
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
"""The type of each key at the top level of the JSON. Keys inside the sections are checked by DeepSpeed: see `validate_with_deepspeed`."""
TYPED_SECTION_KEYS = {"type": TEXT_TYPE, "params": MAPPING_TYPE}
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
OFFLOAD_DEVICE_TYPE = one_of("none", "cpu", "nvme")
FUSED_ADAMW = "adamw_torch_fused"
TORCH_ADAMW = ("adamw_torch", FUSED_ADAMW)
OFFLOAD_FIELDS = (
    ("offload_optimizer", "offloadOptimizer", "offload_optimizer"), ("offload_param", "offloadParameters", "offload_parameters"),
)  # fmt: skip
"""For each kind of offloading: its section in zero_optimization, the field of the spec, and the Python attribute of the field."""
DEEPSPEED_SCHEDULERS = {
    "WarmupLR": LearningRateSchedule.CONSTANT_WITH_WARMUP, "WarmupDecayLR": LearningRateSchedule.LINEAR, "WarmupCosineLR": LearningRateSchedule.COSINE,
}  # fmt: skip


@dataclass
class DeepspeedOptions:
    """The configuration for DeepSpeed, and the fields of TrainingArguments that follow from it."""

    stage: int
    config: dict[str, Any]
    training_arguments: dict[str, Any] = field(default_factory=dict)
    """The fields of TrainingArguments that the merged configuration sets."""
    notes: list[str] = field(default_factory=list)


def build_options(run: RunConfig, inputs: Inputs, hardware: Hardware, world_size: int) -> DeepspeedOptions:
    """Return the options of a run, from the spec and the user's JSON.

    Errors: ConfigError ConfigsDisagree (with all conflicts), ConfigFileInvalid, OffloadNeedsStage1, OffloadNeedsStage3, or the code of an
    API rule that a value of the file breaks; NotFoundError ConfigMapMissing.
    """
    spec = run.spec.distributed.deepspeed
    file_merge = FileMerge(run)
    has_file = spec is not None and spec.config_ref is not None
    file_config = read_config_file(spec.config_ref, inputs.config_maps, CONFIG_FILE_FIELD) if has_file else {}
    config = _check_config(file_config, file_merge)
    options = DeepspeedOptions(DEFAULT_STAGE, config)
    _merge_batch_sizes(config, file_merge, run, options, world_size)
    _merge_precision(config, file_merge, hardware)
    _merge_optimizer(config, file_merge, run, options)
    _merge_scheduler(config, file_merge, run, options)
    _merge_zero_options(config, file_merge, run, options)
    file_merge.check_merged_values("the DeepSpeed JSON")
    options.notes += file_merge.notes
    _require_no_auto(config)
    return options


def _check_config(file_config: dict[str, Any], file_merge: FileMerge) -> dict[str, Any]:
    """Check the file, and return a copy without null values and disabled sections. Errors: ConfigError ConfigFileInvalid."""
    config: dict[str, Any] = _remove_nulls(file_config)
    disabled_sections = [
        key for key in REFUSED_SECTIONS if isinstance(config.get(key), dict) and config[key].get("enabled") is False
    ]
    for key in disabled_sections:
        del config[key]
    if disabled_sections:
        file_merge.notes.append(f"sections that the DeepSpeed JSON disables are ignored: {', '.join(disabled_sections)}")
    _refuse_keys(REFUSED_SECTIONS, "", config)
    check_keys(CONFIG_FILE_FIELD, "", config, TOP_LEVEL_KEYS, allows_auto=True)
    for name in ("bf16", "fp16"):
        _check_read_keys(name, config.get(name), {"enabled": BOOLEAN_TYPE})
    zero_section = config.get("zero_optimization", {})
    _refuse_keys(REFUSED_ZERO_KEYS, "zero_optimization.", zero_section)
    _check_read_keys(
        "zero_optimization", zero_section, {"stage": one_of(0, 1, 2, 3), **{section: MAPPING_TYPE for section, _, _ in OFFLOAD_FIELDS}}
    )
    for section, _, _ in OFFLOAD_FIELDS:
        _check_read_keys(
            f"zero_optimization.{section}", zero_section.get(section), {"device": OFFLOAD_DEVICE_TYPE}, allows_auto=False
        )
    _refuse_compiled_options(config)
    return config


def _refuse_compiled_options(config: dict[str, Any]) -> None:
    requested_options = [".".join(path) for path in COMPILED_OPTIONS if _find_value_at(config, path) not in (None, False)]
    if requested_options:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{CONFIG_FILE_FIELD}: DeepSpeed compiles {', '.join(requested_options)} on first use, but the image has no C++ or CUDA compiler",
            hint="remove it",
        )


def _find_value_at(section: Any, path: tuple[str, ...]) -> Any:
    """Return the value at a path of nested sections; None if a section or the value is absent."""
    for key in path:
        section = section.get(key) if isinstance(section, dict) else None
    return section


def _refuse_keys(keys: dict[str, str], prefix: str, section: dict[str, Any]) -> None:
    refused_keys = [f"{prefix}{key} ({reason})" for key, reason in keys.items() if key in section]
    if refused_keys:
        raise ConfigError("ConfigFileInvalid", f"{CONFIG_FILE_FIELD}: {'; '.join(refused_keys)}", hint="remove it")


def _remove_nulls(value: Any) -> Any:
    """Return a copy of the value without null values, which stand for DeepSpeed's defaults."""
    if isinstance(value, dict):
        return {key: _remove_nulls(item) for key, item in value.items() if item is not None}
    return copy.deepcopy(value)


def _check_read_keys(section_path: str, section: Any, value_types: dict[str, ValueType], *, allows_auto: bool = True) -> None:
    """Check those keys of a section that this module reads, which are the keys of `value_types`. DeepSpeed checks the other keys."""
    check_keys(
        CONFIG_FILE_FIELD,
        section_path,
        {key: value for key, value in (section or {}).items() if key in value_types},
        value_types,
        allows_auto=allows_auto,
    )


def _merge_batch_sizes(config: dict[str, Any], file_merge: FileMerge, run: RunConfig, options: DeepspeedOptions, world_size: int) -> None:
    rows, steps = _merge_rows_and_steps(config, file_merge, run)
    max_gradient_norm = file_merge.merge(
        "gradient_clipping", config.get("gradient_clipping"), "training.maxGradNorm", run.spec.training.max_grad_norm
    )
    effective_batch = rows * steps * world_size // (run.spec.distributed.context_parallel_size or 1)
    file_merge.require_equal(
        "train_batch_size", config.get("train_batch_size"), "micro-batch x accumulation x ranks", effective_batch
    )
    # transformers and DeepSpeed check train_batch_size before they know the groups of context parallelism. accelerate corrects train_batch_size later.
    config |= {MICRO_BATCH_KEY: rows, ACCUMULATION_KEY: steps, "train_batch_size": rows * steps * world_size, "gradient_clipping": max_gradient_norm}
    options.training_arguments |= {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": steps,
        "max_grad_norm": max_gradient_norm,
    }


def _merge_rows_and_steps(config: dict[str, Any], file_merge: FileMerge, run: RunConfig) -> tuple[int, int]:
    """Return the micro-batch (rows) and the number of accumulation steps.

    If the operator reduced the spec's micro-batch, the file's micro-batch is reduced too, and more accumulation steps keep the effective batch the same.
    """
    training = run.spec.training
    requested_rows = training.batch_size_per_device
    rows_before_adaptation = file_merge.before_adaptation(MICRO_BATCH_PATH, requested_rows)
    is_adapted = rows_before_adaptation != requested_rows
    requested_steps = training.gradient_accumulation_steps
    spec_steps = file_merge.before_adaptation(ACCUMULATION_PATH, requested_steps) if is_adapted else requested_steps
    rows = file_merge.merge(MICRO_BATCH_KEY, config.get(MICRO_BATCH_KEY), MICRO_BATCH_PATH, rows_before_adaptation)
    steps = file_merge.merge(ACCUMULATION_KEY, config.get(ACCUMULATION_KEY), ACCUMULATION_PATH, spec_steps)
    if not is_adapted or file_merge.conflicts:
        return rows, steps
    file_merge.file_values |= {MICRO_BATCH_PATH: rows, ACCUMULATION_PATH: steps}
    reduced_rows = _reduce_rows(rows, steps, rows * requested_rows / rows_before_adaptation, file_merge, run)
    if (rows, steps) != (rows_before_adaptation, spec_steps):
        change_text = f"the operator changed {MICRO_BATCH_PATH} from {rows_before_adaptation} to {requested_rows}"
        if reduced_rows == rows:
            note = f"{MICRO_BATCH_KEY} of the file stays {rows}, although {change_text}: no smaller divisor of {rows} is allowed"
        else:
            note = (
                f"{change_text}; {MICRO_BATCH_KEY} in the file therefore changes from {rows} to {reduced_rows}, and {ACCUMULATION_KEY} "
                f"from {steps} to {steps * rows // reduced_rows}"
            )
        file_merge.notes.append(note)
    steps = steps * rows // reduced_rows
    file_merge.file_values |= {MICRO_BATCH_PATH: reduced_rows, ACCUMULATION_PATH: steps}
    return reduced_rows, steps


def _reduce_rows(rows: int, steps: int, limit: float, file_merge: FileMerge, run: RunConfig) -> int:
    """Return the largest allowed divisor of the micro-batch `rows` that is at most `limit`.

    If all allowed divisors are above the limit, return the smallest one; if no divisor is allowed, return `rows`. A divisor that breaks a rule of the
    API is not allowed, because with this divisor, the attempt after an out-of-memory error would fail.
    """
    divisors = [
        divisor
        for divisor in range(min_batch_size_per_device(run.spec), rows)
        if rows % divisor == 0
        and steps * rows // divisor <= MAX_BATCH_VALUE
        and file_merge.allows({MICRO_BATCH_PATH: divisor, ACCUMULATION_PATH: steps * rows // divisor})
    ]
    return max((divisor for divisor in divisors if divisor <= limit), default=min(divisors, default=rows))


def _merge_precision(config: dict[str, Any], file_merge: FileMerge, hardware: Hardware) -> None:
    for name, is_active in (("bf16", hardware.computes_in_bf16), ("fp16", hardware.computes_in_fp16)):
        section = config.setdefault(name, {})
        file_merge.require_equal(
            f"{name}.enabled",
            section.get("enabled"),
            f"{name} on {hardware.name}, from training.mixedPrecision,",
            is_active,
        )
        section["enabled"] = is_active


def _merge_optimizer(config: dict[str, Any], file_merge: FileMerge, run: RunConfig, options: DeepspeedOptions) -> None:
    """Replace the Adam optimizer of the JSON with torch's AdamW with the same parameters."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    check_keys(CONFIG_FILE_FIELD, "optimizer", section, TYPED_SECTION_KEYS, allows_auto=True)
    optimizer_type, parameters, training = (
        str(section.get("type", "without a type")),
        dict(section.get("params") or {}),
        run.spec.training,
    )
    if optimizer_type.lower() not in ("adam", "adamw") or parameters.get("adam_w_mode", True) is False:
        raise ConfigError(
            "ConfigFileInvalid", f"{CONFIG_FILE_FIELD}: DeepSpeed compiles optimizer {optimizer_type} on first use, but the image has no C++ or CUDA compiler",
            hint="write AdamW, or remove the section and name training.optimizer",
        )  # fmt: skip
    check_keys(CONFIG_FILE_FIELD, "optimizer.params", parameters, ADAM_PARAMETERS, allows_auto=True)
    optimizer_name = training.optimizer
    if optimizer_name not in TORCH_ADAMW:
        optimizer_name = file_merge.merge("optimizer.type", FUSED_ADAMW, "training.optimizer", optimizer_name, file_text=optimizer_type)
    betas = parameters.get("betas", AUTO_VALUE)
    beta1, beta2 = (AUTO_VALUE, AUTO_VALUE) if betas == AUTO_VALUE else betas
    options.training_arguments |= {
        "optim": optimizer_name,
        "adam_beta1": file_merge.merge("optimizer.params.betas[0]", beta1, "training.adamBeta1", training.adam_beta1),
        "adam_beta2": file_merge.merge("optimizer.params.betas[1]", beta2, "training.adamBeta2", training.adam_beta2),
        "learning_rate": file_merge.merge("optimizer.params.lr", parameters.get("lr"), "training.learningRate", training.learning_rate),
        "adam_epsilon": file_merge.merge("optimizer.params.eps", parameters.get("eps"), "training.adamEpsilon", training.adam_epsilon),
        "weight_decay": file_merge.merge("optimizer.params.weight_decay", parameters.get("weight_decay"), "training.weightDecay", training.weight_decay),
    }  # fmt: skip
    file_merge.notes.append(f"optimizer {optimizer_type} of the DeepSpeed JSON runs as torch's AdamW ({optimizer_name})")


def _merge_scheduler(config: dict[str, Any], file_merge: FileMerge, run: RunConfig, options: DeepspeedOptions) -> None:
    """Replace the scheduler of the JSON with the equivalent scheduler of transformers."""
    section = config.pop("scheduler", None)
    if section is None:
        return
    check_keys(CONFIG_FILE_FIELD, "scheduler", section, TYPED_SECTION_KEYS, allows_auto=True)
    scheduler_type, parameters, training = (
        str(section.get("type", "without a type")),
        dict(section.get("params") or {}),
        run.spec.training,
    )
    if scheduler_type not in DEEPSPEED_SCHEDULERS:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{CONFIG_FILE_FIELD}: scheduler {scheduler_type} is not supported",
            hint=f"write one of {', '.join(DEEPSPEED_SCHEDULERS)}, or training.scheduler",
        )
    check_keys(CONFIG_FILE_FIELD, "scheduler.params", parameters, WARMUP_PARAMETERS, allows_auto=True)
    from finetune_trainer.schedules import SCHEDULER_NAMES

    scheduler = file_merge.merge(
        "scheduler.type",
        DEEPSPEED_SCHEDULERS[scheduler_type],
        "training.scheduler",
        training.scheduler,
        file_text=f"{scheduler_type} ({DEEPSPEED_SCHEDULERS[scheduler_type]})",
    )
    options.training_arguments["lr_scheduler_type"] = SCHEDULER_NAMES[scheduler]
    _merge_warmup(parameters.get("warmup_num_steps"), file_merge, run, options)
    learning_rate = file_merge.undo_adaptation(
        "training.learningRate", training.learning_rate, options.training_arguments.get("learning_rate", training.learning_rate)
    )
    for key, path, actual_value in (
        ("warmup_max_lr", "training.learningRate", learning_rate),
        ("warmup_min_lr", "the first learning rate of the warm-up", 0),
        ("total_num_steps", "training.maxSteps", training.max_steps),
        ("warmup_type", "the shape of the warm-up", "linear"),
    ):
        file_merge.require_equal(f"scheduler.params.{key}", parameters.get(key), path, actual_value)
    file_merge.notes.append(f"scheduler {scheduler_type} of the DeepSpeed JSON runs as {scheduler}")


def _merge_warmup(steps: Any, file_merge: FileMerge, run: RunConfig, options: DeepspeedOptions) -> None:
    """Use the file's warm-up steps, if it has any. These steps conflict with a warm-up ratio that the user set, but replace a default ratio."""
    training, key = run.spec.training, "scheduler.params.warmup_num_steps"
    if steps in (None, AUTO_VALUE):
        return
    if training.warmup_ratio and "training.warmupRatio" not in run.defaults:
        file_merge.conflicts.append(f"{key} is {steps}, training.warmupRatio is {training.warmup_ratio:g}")
    options.training_arguments["warmup_steps"] = file_merge.merge(key, steps, "training.warmupSteps", training.warmup_steps)
    if "training.warmupSteps" in file_merge.file_values:
        file_merge.file_values["training.warmupRatio"] = None


def _merge_zero_options(config: dict[str, Any], file_merge: FileMerge, run: RunConfig, options: DeepspeedOptions) -> None:
    spec = run.spec.distributed.deepspeed
    zero_section = config.setdefault("zero_optimization", {})
    stage = file_merge.merge(
        "zero_optimization.stage",
        zero_section.get("stage"),
        "distributed.deepspeed.zeroStage",
        spec.zero_stage if spec else None,
    )
    options.stage = zero_section["stage"] = DEFAULT_STAGE if stage is None else stage
    for key, path, attribute in OFFLOAD_FIELDS:
        section, requested_offload = zero_section.get(key) or {}, getattr(spec, attribute) if spec else None
        if section.get("device") == "nvme":
            raise ConfigError(
                "ConfigFileInvalid",
                f"{CONFIG_FILE_FIELD}: {key}.device nvme needs code that DeepSpeed compiles on first use, but the image has no C++ or CUDA compiler",
                hint="write cpu",
            )
        file_value = None if key not in zero_section else section.get("device", "none") != "none"
        if file_merge.merge(f"zero_optimization.{key}", file_value, f"distributed.deepspeed.{path}", requested_offload):
            zero_section[key] = {**section, "device": "cpu"}
        else:
            zero_section.pop(key, None)
    if "offload_param" in zero_section and options.stage != 3:
        raise ConfigError(
            "OffloadNeedsStage3", f"offloadParameters is true, but the ZeRO stage is {options.stage}, which does not shard parameters",
            hint="write `zeroStage: 3`, or remove offloadParameters",
        )  # fmt: skip
    if "offload_optimizer" in zero_section and options.stage == 0:
        raise ConfigError(
            "OffloadNeedsStage1", "offloadOptimizer is true, but with ZeRO stage 0 DeepSpeed does not hold the optimizer's state",
            hint="write `zeroStage: 1` or more, or remove offloadOptimizer",
        )  # fmt: skip
    if options.stage == 3:
        file_merge.require_equal(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save", zero_section.get("stage3_gather_16bit_weights_on_model_save"),
            "the value that a loadable checkpoint needs", True,
        )  # fmt: skip
        zero_section["stage3_gather_16bit_weights_on_model_save"] = True
    # With these two values, DeepSpeed accepts torch's optimizer even with offloading. Otherwise, DeepSpeed would compile its own optimizer.
    for key, value in (("zero_allow_untested_optimizer", True), ("zero_force_ds_cpu_optimizer", False)):
        file_merge.require_equal(key, config.get(key), "the value that torch's optimizer needs", value)
        config[key] = value


def _require_no_auto(config: dict[str, Any]) -> None:
    unset_keys = [key for key in _find_auto_keys(config) if key.removeprefix("zero_optimization.") not in KEYS_THAT_MAY_BE_AUTO]
    if unset_keys:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{CONFIG_FILE_FIELD}: {', '.join(unset_keys)} is auto, and the spec has no value for it",
            hint="write a value, or remove it",
        )


def _find_auto_keys(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            nested_key
            for key, inner in value.items()
            for nested_key in _find_auto_keys(inner, f"{path}.{key}" if path else str(key))
        ]
    return [path] if value == AUTO_VALUE else []


def validate_with_deepspeed(config: dict[str, Any]) -> None:
    """Let DeepSpeed check the configuration before the model is loaded. Errors: ConfigError ConfigFileInvalid with DeepSpeed's message."""
    from deepspeed.runtime.config import DeepSpeedConfig

    checked_config = copy.deepcopy(config)
    # No process group exists yet, so DeepSpeed would check train_batch_size for a single rank.
    del checked_config["train_batch_size"]
    try:
        DeepSpeedConfig(checked_config)
    except Exception as error:
        message = str(error)
        if isinstance(error, ValidationError):
            message = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
            message = f"{error.title}: {message}"
        raise ConfigError(
            "ConfigFileInvalid", f"{CONFIG_FILE_FIELD}: DeepSpeed refuses the file: {' '.join(message.split())[:500]}",
            hint="correct the named key, or remove it",
        ) from error  # fmt: skip


class Deepspeed(DistributedStrategy):
    """Training with the model in DeepSpeed's engine."""

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
        raise_first_finding("StrategyAndMethod", find_deepspeed_conflicts(run.spec))
        if options.stage == 3:
            raise_first_finding("StrategyAndMethod", find_zero3_conflicts(run.spec))

    @property
    def trainer_mixins(self) -> tuple[type, ...]:
        """The mixin that loads the best weights and, with context parallelism, the mixin that shares sequences between ranks."""
        return (_create_best_weights_mixin(), *([context_parallel.context_parallel_mixin()] if self.context_parallel_size > 1 else []))

    def prepare_process(self) -> None:
        """Create the process group that DeepSpeed needs, even for one rank. On a CPU, accelerate would create the process group too late."""
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
        """Return DeepSpeed's fields of TrainingArguments."""
        arguments = {**self.options.training_arguments, "deepspeed": copy.deepcopy(self.options.config)}
        if self.context_parallel_size > 1:
            arguments["parallelism_config"] = context_parallel.parallelism_config(self.context_parallel_size, self.world_size)
        return arguments

    def verify_active(self, trainer: Any) -> str:
        """In addition to the strategy, check the stage, the number of ranks and the number of sharded parameters. Errors: InternalError StrategyNotActive."""
        strategy_name = super().verify_active(trainer)
        engine = trainer.deepspeed
        stage, rank_count = engine.zero_optimization_stage(), engine.world_size
        sharded_count = sum(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
        parameter_count = sum(1 for _ in trainer.model.parameters())
        expected_count = parameter_count if self.options.stage == 3 else 0
        if (stage, rank_count, sharded_count) != (self.options.stage, self.world_size, expected_count):
            raise InternalError(
                "StrategyNotActive",
                f"ZeRO stage {self.options.stage} over {self.world_size} ranks was requested; active: stage {stage} over {rank_count} ranks, "
                f"{sharded_count} of {parameter_count} parameters sharded",
                hint="this is a bug of the trainer image: report it with the versions of its packages",
            )  # fmt: skip
        if self.context_parallel_size > 1:
            context_parallel.require_sequence_group(self.context_parallel_size)
        return strategy_name


def _create_best_weights_mixin() -> type:
    """Return the mixin class. The class is defined in a function so that importing this module does not import torch."""
    from finetune_trainer.best import find_best_folder
    from finetune_trainer.distributed.weights import load_into_deepspeed
    from finetune_trainer.library_internals import OpenTrainer

    class BestWeightsFromFolder(OpenTrainer):
        """Loads the best weights from a plain folder. transformers would load DeepSpeed's own checkpoint, which may already be deleted."""

        def load_best_model(self) -> None:
            is_reader = self.accelerator.is_main_process
            load_into_deepspeed(self.model, find_best_folder(self) if is_reader else Path(), is_reader)
            self.accelerator.wait_for_everyone()

    return BestWeightsFromFolder
