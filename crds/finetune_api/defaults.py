"""Fill in the defaults of a spec and record which values were filled in.

The CRD's schema sets no defaults, because the operator could not distinguish such defaults from values of the user. Constant defaults are
declared with their fields (`spec_field(default=...)`). This module computes the defaults that depend on other fields.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from finetune_api.base import DEFAULT_KEY, Group, find_nested_group
from finetune_api.names import Origin
from finetune_api.objectives import FORMATS_WITHOUT_TURNS, OBJECTIVES
from finetune_api.rules import (
    BASE_WEIGHT_METHODS,
    LORA_METHODS,
    PROMPT_METHODS,
    can_be_cached,
    compute_batch_split,
    evaluates_during_training,
    find_warnings,
    generation_server,
    given_bits,
    gpus_per_node,
    has_validation_set,
    method_type_of,
    needs_preparation,
    trainer_type_of,
    uses_loftq,
    world_size,
)
from finetune_api.spec import FineTuneJobSpec, load_spec
from finetune_api.spec.cluster import StorageRoot
from finetune_api.spec.enums import (
    GenerationBackend,
    IntervalStrategy,
    LoraInit,
    MethodType,
    OnExistingResult,
    PrepareStrategy,
    StrategyType,
    TrainerBackend,
    TrainerType,
)
from finetune_api.spec.method import Method

LEARNING_RATE_FULL = 2e-5
LEARNING_RATE_ADAPTER = 2e-4
WARMUP_RATIO = 0.03
MAX_SEQUENCE_LENGTH = 2048
GENERATION_IMAGE_PATH = "trainer.grpo.generation.image"
"""Spec path of the field with the image of the vLLM server."""


@dataclass(frozen=True)
class PlatformDefaults:
    """Defaults that the operator's configuration sets or, for local runs, that depend on the machine."""

    storage: StorageRoot | None = None
    gpu_resource: str = "nvidia.com/gpu"
    node_pool: str | None = None
    cpu: str | None = None
    memory: str | None = None
    ephemeral_storage: str | None = None
    shared_memory: str | None = None
    prepare_strategy: str | None = None
    prepare_cpu: str | None = None
    prepare_memory: str | None = None
    prepare_ephemeral_storage: str | None = None
    model_cache: str | None = None
    generation_image: str | None = None
    """Image of the vLLM server."""


@dataclass(frozen=True)
class ResolvedSpec:
    """The result of `resolve_defaults`: a spec with all defaults filled in, the filled-in values, and notes for the user."""

    spec: FineTuneJobSpec
    defaults: dict[str, Any] = field(default_factory=dict)
    """Filled-in values, by spec path in camelCase."""
    notes: list[str] = field(default_factory=list)


METHOD_GROUPS = frozenset(
    f"method.{info.alias or name}" for name, info in Method.model_fields.items() if find_nested_group(info.annotation)
)
"""Spec paths of the groups of `spec.method`.

`resolve_defaults` adds only the group of the job's method, because a rule refuses the groups of all other methods.
"""
OPTIONAL_GROUPS = METHOD_GROUPS | frozenset({
    "model.tokenSecretRef", "model.storage", "model.quantization", "method.lora.loftq",
    "trainer.dpo", "trainer.grpo", "trainer.grpo.generation", "dataset.storage", "dataset.columns", "dataset.split", "dataset.chatTemplate", "dataset.mcq", "dataset.checks",
    "dataset.images",
    "training.earlyStopping", "distributed.deepspeed", "distributed.fsdp", "output.hub", "output.runName", "evaluation.judge", "evaluation.comparison",
    "evaluation.metricModels",
    "tracking.mlflow", "tracking.wandb", "tracking.mongodb",
})  # fmt: skip
"""Spec paths of groups that are not filled with defaults.

Each of these groups is present only if the user sets it, or if the job's method or objective needs it.
"""


def resolve_defaults(
    spec: FineTuneJobSpec, *, platform_defaults: PlatformDefaults | None = None, choices: Mapping[str, Any] | None = None
) -> ResolvedSpec:
    """Return the spec with every default filled in. This function does not check the spec: call `rules.check_spec` first.

    `choices`: values that the plan chose for fields that the user left out, by spec path. The chosen values take precedence over defaults.
    """
    platform_defaults = platform_defaults or PlatformDefaults()
    applied_choices = {path: chosen_value for path, chosen_value in (choices or {}).items() if spec.value(path) is None}
    micro_batch_before_plan = compute_batch_split(spec)[0]
    spec = spec.with_values(applied_choices)
    spec_values = spec.to_wire()
    filled_values: dict[str, Any] = {}
    notes: list[str] = []
    computed_defaults = _compute_defaults(spec, platform_defaults)
    # The plan does not include the memory of evaluations. If the plan chooses a larger micro-batch, evaluations keep the size from before the plan.
    computed_defaults["evaluation.batchSizePerDevice"] = min(micro_batch_before_plan, computed_defaults["evaluation.batchSizePerDevice"])
    for path, default in computed_defaults.items():
        _fill_in_default(spec_values, path, default, filled_values)
    filled_values |= applied_choices
    method = method_type_of(spec)
    if f"method.{method}" in METHOD_GROUPS:
        spec_values.setdefault("method", {}).setdefault(method.value, {})
    _fill_in_constants(FineTuneJobSpec, spec_values, "", filled_values)
    if spec.training.max_steps is not None:
        filled_values.pop("training.epochs", None)
    notes += [f"{warning.path} {warning.message}" for warning in find_warnings(spec)]
    if method is MethodType.LORA and spec.model.quantization and spec.model.quantization.bits == 4:
        notes.append("method lora on a 4-bit base model is equivalent to method qlora")
    if spec.distributed.strategy is StrategyType.DDP and world_size(spec) == 1:
        notes.append("distributed.strategy ddp has no effect with a single rank")
    return ResolvedSpec(FineTuneJobSpec.model_validate(spec_values), filled_values, notes)


def _compute_defaults(spec: FineTuneJobSpec, platform_defaults: PlatformDefaults) -> dict[str, Any]:
    """Return the defaults that depend on other fields or on the platform, by spec path."""
    method, objective, gpu_count = method_type_of(spec), trainer_type_of(spec), gpus_per_node(spec)
    default_by_path: dict[str, Any] = {
        "model.tokenizer": spec.model.source,
        "model.cache": platform_defaults.model_cache if can_be_cached(spec) else None,
        "training.learningRate": _choose_default_learning_rate(method, objective),
        "training.gradientCheckpointing": "disabled" if gpu_count == 0 or method is MethodType.PREFIX_TUNING else "enabled",
        "resources.processesPerNode": gpu_count or 1,
        "resources.gpuResource": platform_defaults.gpu_resource,
        "resources.nodePool": platform_defaults.node_pool,
        "resources.cpu": platform_defaults.cpu,
        "resources.memory": platform_defaults.memory,
        "resources.ephemeralStorage": platform_defaults.ephemeral_storage,
        "resources.sharedMemory": platform_defaults.shared_memory,
        "prepare.strategy": platform_defaults.prepare_strategy,
        "policy.onExistingResult": _choose_default_on_existing_result(spec, platform_defaults),
        "prepare.resources.cpu": platform_defaults.prepare_cpu,
        "prepare.resources.memory": platform_defaults.prepare_memory,
        "prepare.resources.ephemeralStorage": platform_defaults.prepare_ephemeral_storage,
        "distributed.strategy": "ddp" if world_size(spec) > 1 else "none",
        "evaluation.strategy": "steps" if has_validation_set(spec) else "no",
        "evaluation.batchSizePerDevice": compute_batch_split(spec)[0],
        "phases.evaluate": bool(spec.evaluation.metrics or spec.evaluation.benchmarks),
        "dataset.responseOnly.enabled": spec.dataset.format not in FORMATS_WITHOUT_TURNS,
    }
    if spec.trainer.backend is TrainerBackend.UNSLOTH:
        default_by_path["model.ligerKernels"] = True
    if spec.training.effective_batch_size is not None:
        default_by_path["training.batchSizePerDevice"], default_by_path["training.gradientAccumulationSteps"] = compute_batch_split(spec)
    if spec.training.warmup_steps is None:
        default_by_path["training.warmupRatio"] = WARMUP_RATIO
    if generation_server(spec) is not None:
        default_by_path[GENERATION_IMAGE_PATH] = platform_defaults.generation_image
    if evaluates_during_training(spec) and spec.evaluation.strategy in (None, IntervalStrategy.STEPS):
        default_by_path["evaluation.steps"] = spec.checkpoint.steps or 100
    default_by_path |= _compute_method_defaults(spec, method) | dict(OBJECTIVES[objective].defaults) | _compute_storage_defaults(spec, platform_defaults)
    return {path: default for path, default in default_by_path.items() if default is not None}


def _choose_default_on_existing_result(spec: FineTuneJobSpec, platform_defaults: PlatformDefaults) -> str | None:
    """Return the default of `policy.onExistingResult`, or None for a local run.

    The default of a job without a preparation is `train`, because only a preparation pod looks for earlier results.
    """
    if platform_defaults.prepare_strategy is None:
        return None
    strategy = spec.prepare.strategy or PrepareStrategy(platform_defaults.prepare_strategy)
    return OnExistingResult.ADOPT.value if needs_preparation(spec, strategy) else OnExistingResult.TRAIN.value


def _choose_default_learning_rate(method: MethodType, objective: TrainerType) -> float:
    objective_default = OBJECTIVES[objective].learning_rate
    if objective_default is not None:
        return objective_default
    return LEARNING_RATE_FULL if method in BASE_WEIGHT_METHODS else LEARNING_RATE_ADAPTER


def _compute_method_defaults(spec: FineTuneJobSpec, method: MethodType) -> dict[str, Any]:
    default_by_path: dict[str, Any] = {}
    if method is MethodType.QLORA:
        default_by_path["model.quantization.bits"] = 4
    if uses_loftq(spec):
        default_by_path["model.quantization.bits"] = 4
    bits = 4 if method is MethodType.QLORA or uses_loftq(spec) else given_bits(spec)
    if bits == 4:
        default_by_path |= {"model.quantization.type": "nf4", "model.quantization.doubleQuant": True}
        default_by_path["model.quantization.computeDtype"] = "bfloat16" if gpus_per_node(spec) else "float32"
    if method in LORA_METHODS and method is not MethodType.ADAPTER:
        default_by_path |= {"method.lora.targetModules": ["all-linear"], "method.lora.useDora": method is MethodType.DORA}
        if spec.method.lora and spec.method.lora.loftq:
            default_by_path["method.lora.init"] = LoraInit.LOFTQ.value
    if method in PROMPT_METHODS:
        default_by_path["method.promptLength"] = 20
    return default_by_path


def _compute_storage_defaults(spec: FineTuneJobSpec, platform_defaults: PlatformDefaults) -> dict[str, Any]:
    """Return defaults of `spec.storage` from the operator's configuration.

    If the job sets its own endpoint, only `uri` has a default, because the configured region and credentials belong to
    the endpoint in the operator's configuration.
    """
    if platform_defaults.storage is None:
        return {}
    default_storage = platform_defaults.storage.to_wire()
    if spec.storage.endpoint is not None:
        default_storage = {key: value for key, value in default_storage.items() if key == "uri"}
    return {f"storage.{key}": value for key, value in default_storage.items()}


PLATFORM_DEFAULT_PATHS = (
    "resources.gpuResource", "resources.nodePool", "resources.cpu", "resources.memory", "resources.ephemeralStorage", "resources.sharedMemory",
    GENERATION_IMAGE_PATH,
)  # fmt: skip
"""Spec paths of defaults that come from the operator's configuration. In addition, all defaults of `spec.storage` come from this configuration."""

LATE_DEFAULT_PATHS = ("dataset.maxSequenceLength", "dataset.useChatTemplate", "dataset.numProc")
"""Spec paths of defaults that depend on the model or the pod. The trainer fills in these defaults and reports them for `status.resolved.defaults`."""


def keep_valid_late_defaults(reported_defaults: Any) -> dict[str, Any]:
    """Return the values that a pod reported for LATE_DEFAULT_PATHS, without invalid values. Pods run user code, so a report can contain any value."""
    valid_defaults: dict[str, Any] = {}
    for path in LATE_DEFAULT_PATHS:
        group, _, name = path.partition(".")
        try:
            value = load_spec({group: {name: reported_defaults.get(path)}}).value(path) if isinstance(reported_defaults, dict) else None
        except ValidationError:
            continue
        if value is not None:
            valid_defaults[path] = value
    return valid_defaults


REMOVED_DEFAULT_PATHS = ("model.ligerKernels",)
"""Spec paths of fields that had a constant default in an earlier release. Jobs that began with the earlier release keep its default."""
GROUPS_WITH_CURRENT_DEFAULTS = ("resources", "placement", "policy", "storage")
"""Groups whose defaults may change between two attempts of a job.

These groups decide where and for how long an attempt runs, but not how the model is trained.
"""
FIELDS_WITH_CURRENT_DEFAULTS = ("model.cache",)
"""Fields whose defaults may change between two attempts of a job. An earlier default of `model.cache` may name a volume that no longer exists."""


def keep_recorded_defaults(resolved_spec: ResolvedSpec, recorded_defaults: Mapping[str, Any]) -> ResolvedSpec:
    """Return the resolved spec with the defaults that the job's first attempt recorded, because a new release can have other defaults.

    Errors: pydantic's ValidationError if this release does not accept a recorded default.
    """
    restored_values = {
        path: recorded_value for path, recorded_value in recorded_defaults.items()
        if path.partition(".")[0] not in GROUPS_WITH_CURRENT_DEFAULTS and path not in FIELDS_WITH_CURRENT_DEFAULTS
        and _must_restore_default(resolved_spec, path, recorded_value)
    }  # fmt: skip
    if not restored_values:
        return resolved_spec
    return replace(resolved_spec, spec=resolved_spec.spec.with_values(restored_values), defaults={**resolved_spec.defaults, **restored_values})


def _must_restore_default(resolved_spec: ResolvedSpec, path: str, recorded_value: Any) -> bool:
    """Whether the recorded default of a field has to replace the current default, because this release changed or removed the recorded default.

    False for a field that the user set.
    """
    if path in resolved_spec.defaults:
        return bool(resolved_spec.defaults[path] != recorded_value)
    return path in REMOVED_DEFAULT_PATHS and resolved_spec.spec.value(path) is None


def find_origins(filled_paths: Iterable[str], chosen_paths: Collection[str] = ()) -> dict[str, Origin]:
    """Return the origin of each filled-in value, by spec path. Values of origin `default` are omitted. `chosen_paths`: paths of the plan's choices."""
    platform_paths = {path for path in filled_paths if path in PLATFORM_DEFAULT_PATHS or path.startswith("storage.")}
    return dict.fromkeys(platform_paths, Origin.PLATFORM) | {path: Origin.PLAN for path in filled_paths if path in chosen_paths}


DEFAULT_CONDITIONS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "checkpoint.steps": lambda group: group.get("strategy") in (None, "steps"),
    "training.epochs": lambda group: group.get("maxSteps") is None,
    "trainer.maxCompletionLength": lambda group: (
        "maxCompletionLength" in OBJECTIVES[TrainerType(group.get("type") or "sft")].options
    ),
    "dataset.maxBadRowRatio": lambda group: group.get("badRows") == "skip",
    "output.layout": lambda group: group.get("dir") is not None,
    "method.spectrum.snrThreshold": lambda group: group.get("layers") is None,
    "method.spectrum.metric": lambda group: group.get("layers") is None,
    **{
        f"trainer.grpo.generation.{name}": lambda group: group.get("backend") == GenerationBackend.VLLM
        for name in ("gpus", "gpuMemoryUtilization", "cpu", "memory", "startTimeoutSeconds", "requestTimeoutSeconds")
    },
}
"""For each constant default that does not always apply, by spec path: a function that returns whether the default applies. The argument of the function
is the values of the field's group, by camelCase name."""
COMPUTED_DEFAULT_PATHS = frozenset({"method.promptLength", "model.quantization.type", "model.quantization.doubleQuant"})
"""Spec paths of constant defaults that apply only with certain values of other groups. `_compute_defaults` fills in these defaults."""


class _Field(NamedTuple):
    """A field of the spec, as `_fill_in_constants` needs it."""

    wire_name: str
    group: type[Group] | None
    can_be_empty: bool
    """Whether the field is a group without required fields."""
    metadata: Mapping[str, Any]


@cache
def _list_group_fields(model: type[BaseModel]) -> tuple[_Field, ...]:
    fields = []
    for name, info in model.model_fields.items():
        group = find_nested_group(info.annotation)
        can_be_empty = group is not None and not any(field.is_required() for field in group.model_fields.values())
        metadata = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        fields.append(_Field(info.alias or name, group, can_be_empty, metadata))
    return tuple(fields)


def _fill_in_constants(model: type[BaseModel], group_values: dict[str, Any], path_prefix: str, filled_values: dict[str, Any]) -> None:
    """Fill in every constant default of a group and of the groups nested in it. `group_values`: the values of the group, by camelCase name."""
    for wire_name, group, can_be_empty, metadata in _list_group_fields(model):
        path = f"{path_prefix}{wire_name}"
        if group is not None:
            if can_be_empty and path not in OPTIONAL_GROUPS:
                group_values.setdefault(wire_name, {})
            if isinstance(group_values.get(wire_name), dict):
                _fill_in_constants(group, group_values[wire_name], f"{path}.", filled_values)
        elif DEFAULT_KEY in metadata and group_values.get(wire_name) is None and _default_applies(path, group_values):
            group_values[wire_name] = filled_values[path] = metadata[DEFAULT_KEY]


def _default_applies(path: str, group_values: dict[str, Any]) -> bool:
    return path not in COMPUTED_DEFAULT_PATHS and (path not in DEFAULT_CONDITIONS or DEFAULT_CONDITIONS[path](group_values))


def _fill_in_default(spec_values: dict[str, Any], path: str, default: Any, filled_values: dict[str, Any]) -> None:
    """Set the value at `path` to `default` and record it in `filled_values`, unless a value is already set."""
    *group_names, name = path.split(".")
    group_values = spec_values
    for group_name in group_names:
        group_values = group_values.setdefault(group_name, {})
    if group_values.get(name) is None:
        group_values[name] = filled_values[path] = default
