"""Fully sharded data parallel (FSDP), version 2: every rank holds a shard of each parameter, gradient and optimizer state.

This module works around three limits of the libraries:
* On a CPU (tests, small runs), accelerate does not enable FSDP, and two ranks would silently run DDP. `enable_fsdp_on_cpu` enables FSDP on a CPU.
* transformers cannot save unsharded weights together with a sharded optimizer state. `ShardedCheckpoints` saves both in one checkpoint.
* accelerate does not shard integer weights, and only warns. So `finetune_trainer.model` stores 4-bit weights as floats if the strategy has
  `shards_weights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.rules import find_fsdp_conflicts, raise_first_finding
from finetune_api.spec.enums import FsdpSharding, FsdpStateDict, GradientCheckpointing

from finetune_trainer.distributed.base import DistributedStrategy, set_single_rank_variables
from finetune_trainer.distributed.user_config import (
    COUNT_TYPE,
    MAPPING_TYPE,
    TEXT_TYPE,
    FileMerge,
    ValueType,
    check_keys,
    one_of,
    read_config_file,
)
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs

CONFIG_FILE_FIELD = "distributed.fsdp.configRef"
SHARDING_BY_FILE_VALUE = {
    "FULL_SHARD": FsdpSharding.FULL_SHARD, "SHARD_GRAD_OP": FsdpSharding.SHARD_GRAD_OP, "NO_SHARD": FsdpSharding.NO_SHARD,
    "1": FsdpSharding.FULL_SHARD, "2": FsdpSharding.SHARD_GRAD_OP, "3": FsdpSharding.NO_SHARD,
    "true": FsdpSharding.FULL_SHARD, "false": FsdpSharding.SHARD_GRAD_OP,
}  # fmt: skip
"""The spec's `sharding` for each value in accelerate's file. In files for FSDP version 2, the value is a boolean: whether to reshard after the
forward pass."""
STATE_DICT_BY_FILE_VALUE = {
    "FULL_STATE_DICT": FsdpStateDict.FULL, "SHARDED_STATE_DICT": FsdpStateDict.SHARDED, "LOCAL_STATE_DICT": FsdpStateDict.LOCAL,
}  # fmt: skip
LAUNCHER_KEYS = (
    "compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "machine_rank", "main_process_ip", "main_process_port",
    "main_training_function", "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu", "gpu_ids",
    "tpu_name", "tpu_zone", "dynamo_config", "commands", "command_file", "deepspeed_config", "megatron_lm_config", "ipex_config",
)  # fmt: skip
"""Keys that only accelerate's launcher reads. These keys are ignored, because the operator starts the ranks."""
VERSION_1_KEYS = ("backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers")
"""Keys that only FSDP version 1 has. FSDP version 2 always behaves as if these keys were set."""
WRAP_POLICIES = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
WRAP_BY_LAYER, WRAP_BY_SIZE, _ = WRAP_POLICIES
BOOLEAN_SPELLINGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""The spellings of booleans that `accelerate config` writes, in lower case."""
BOOLEAN_TEXT_TYPE = ValueType("true or false", lambda value: str(value).lower() in BOOLEAN_SPELLINGS)
SIZE_TYPE = ValueType(
    "a whole number of at least 0",
    lambda value: str(value).isdecimal() or isinstance(value, float) and value >= 0 and value.is_integer(),
)
LAYER_CLASSES_TYPE = ValueType(
    "names of layer classes",
    lambda value: isinstance(value, str) or isinstance(value, list) and all(isinstance(name, str) for name in value),
)
ANY_TYPE = ValueType("anything", lambda value: True)
TOP_LEVEL_KEYS = {
    "distributed_type": TEXT_TYPE, "num_processes": COUNT_TYPE, "num_machines": COUNT_TYPE, "fsdp_config": MAPPING_TYPE,
    "mixed_precision": one_of("no", "fp16", "bf16", "fp8", False), **dict.fromkeys(LAUNCHER_KEYS, ANY_TYPE),
}  # fmt: skip
FSDP_KEYS = {
    "version": one_of(1, 2, "1", "2"), "sharding_strategy": ANY_TYPE, "reshard_after_forward": ANY_TYPE, "state_dict_type": ANY_TYPE,
    "offload_params": BOOLEAN_TEXT_TYPE, "activation_checkpointing": BOOLEAN_TEXT_TYPE, "cpu_ram_efficient_loading": BOOLEAN_TEXT_TYPE,
    "transformer_layer_cls_to_wrap": LAYER_CLASSES_TYPE,
    "min_num_params": SIZE_TYPE, "auto_wrap_policy": ValueType(f"one of {', '.join(WRAP_POLICIES)}", lambda value: str(value).upper() in WRAP_POLICIES),
    **dict.fromkeys(VERSION_1_KEYS, ANY_TYPE),
}  # fmt: skip
"""The type of each key of fsdp_config. The keys are written without the prefix `fsdp_`. `_find_spec_value` checks the values of keys about sharding
and state dict."""


@dataclass
class FsdpOptions:
    """The settings of FSDP."""

    sharding: FsdpSharding = FsdpSharding.FULL_SHARD
    state_dict: FsdpStateDict = FsdpStateDict.SHARDED
    offloads_to_cpu: bool = False
    wrap_policy: dict[str, Any] = field(default_factory=lambda: {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})
    notes: list[str] = field(default_factory=list)


def build_options(run: RunConfig, inputs: Inputs, hardware: Hardware, world_size: int) -> FsdpOptions:
    """Return the settings of a run, from the spec and the user's accelerate file.

    Errors: ConfigError ConfigsDisagree, ConfigFileInvalid, StateDictUnavailable, or the code of an API rule that a value of the
    file breaks.
    """
    spec = run.spec.distributed.fsdp
    options = FsdpOptions()
    if spec is None:
        return options
    options.sharding = spec.sharding or options.sharding
    options.state_dict = spec.state_dict or options.state_dict
    if spec.config_ref is not None:
        _merge_file(
            options, read_config_file(spec.config_ref, inputs.config_maps, CONFIG_FILE_FIELD), run, hardware, world_size
        )
    if options.state_dict is FsdpStateDict.LOCAL:
        raise ConfigError(
            "StateDictUnavailable", "distributed.fsdp.stateDict is local, which FSDP version 2 does not have",
            hint="write sharded (one file per rank) or full",
        )  # fmt: skip
    return options


def _merge_file(options: FsdpOptions, file_config: dict[str, Any], run: RunConfig, hardware: Hardware, world_size: int) -> None:
    """Merge the user's accelerate file into `options`. A note lists the keys that have no effect; unknown keys are refused."""
    file_merge = FileMerge(run)
    fsdp_config = _read_fsdp_section(file_config)
    distributed_type = file_config.get("distributed_type", "FSDP")
    if str(distributed_type).upper() != "FSDP":
        file_merge.conflicts.append(f"distributed_type is {distributed_type}, distributed.strategy is fsdp")
    file_merge.require_equal("num_processes", file_config.get("num_processes"), "the number of ranks", world_size)
    file_merge.require_equal("num_machines", file_config.get("num_machines"), "resources.nodes", run.world.nodes)
    active_precision = "bf16" if hardware.computes_in_bf16 else "fp16" if hardware.computes_in_fp16 else "no"
    file_precision = file_config.get("mixed_precision")
    file_precision = "no" if file_precision is False else file_precision  # YAML parses an unquoted `no` as false.
    file_merge.require_equal("mixed_precision", file_precision, "the precision from training.mixedPrecision", active_precision)
    _merge_fsdp(options, fsdp_config, file_merge, run)
    launcher_keys = sorted(set(file_config) & set(LAUNCHER_KEYS))
    if launcher_keys:
        file_merge.notes.append(
            f"keys of the accelerate file for its launcher are ignored, because the operator starts the ranks: {', '.join(launcher_keys)}"
        )
    file_merge.check_merged_values("the accelerate file")
    options.notes += file_merge.notes


def _read_fsdp_section(file_config: dict[str, Any]) -> dict[str, Any]:
    """Return the section fsdp_config without the prefixes of its keys and without null values. Errors: ConfigError ConfigFileInvalid."""
    check_keys(CONFIG_FILE_FIELD, "", file_config, TOP_LEVEL_KEYS)
    fsdp_config = {
        key.removeprefix("fsdp_"): value for key, value in (file_config.get("fsdp_config") or {}).items() if value is not None
    }
    check_keys(CONFIG_FILE_FIELD, "fsdp_config", fsdp_config, FSDP_KEYS)
    return fsdp_config


def _merge_fsdp(options: FsdpOptions, fsdp_config: dict[str, Any], file_merge: FileMerge, run: RunConfig) -> None:
    if str(fsdp_config.get("version", 2)) != "2":
        raise ConfigError(
            "ConfigFileInvalid",
            f"{CONFIG_FILE_FIELD}: the libraries in the image no longer support fsdp_version 1",
            hint="write 2, or remove it",
        )
    shardings = {
        key: _find_spec_value(fsdp_config.get(key), SHARDING_BY_FILE_VALUE, f"fsdp_{key}") for key in ("sharding_strategy", "reshard_after_forward")
    }
    sharding_by_file_key = {key: sharding for key, sharding in shardings.items() if sharding is not None}
    if len(set(sharding_by_file_key.values())) > 1:
        file_merge.conflicts.append(
            f"fsdp_sharding_strategy means {sharding_by_file_key['sharding_strategy']}, "
            f"fsdp_reshard_after_forward means {sharding_by_file_key['reshard_after_forward']}"
        )
    for key, sharding in sharding_by_file_key.items():
        options.sharding = file_merge.merge(f"fsdp_{key}", sharding, "distributed.fsdp.sharding", options.sharding)
    state_dict_type = _find_spec_value(fsdp_config.get("state_dict_type"), STATE_DICT_BY_FILE_VALUE, "fsdp_state_dict_type")
    options.state_dict = file_merge.merge(
        "fsdp_state_dict_type", state_dict_type, "distributed.fsdp.stateDict", options.state_dict
    )
    options.offloads_to_cpu = _is_true(fsdp_config.get("offload_params"))
    options.wrap_policy = _read_wrap_policy(fsdp_config)
    if (file_recomputes := fsdp_config.get("activation_checkpointing")) is not None:
        checkpointing_before_adaptation = file_merge.before_adaptation("training.gradientCheckpointing", run.spec.training.gradient_checkpointing)
        is_enabled = checkpointing_before_adaptation not in (None, GradientCheckpointing.DISABLED)
        file_merge.require_equal(
            "fsdp_activation_checkpointing", _is_true(file_recomputes), "training.gradientCheckpointing", is_enabled
        )
    if _is_true(fsdp_config.get("cpu_ram_efficient_loading")):
        raise ConfigError(
            "ConfigFileInvalid", f"{CONFIG_FILE_FIELD}: fsdp_cpu_ram_efficient_loading is true, but here every rank reads the weights, "
            "from files that the ranks of a pod share",
            hint="remove it: each rank needs host memory for its shard only",
        )  # fmt: skip
    built_in_keys = [f"fsdp_{key}" for key in VERSION_1_KEYS if key in fsdp_config]
    if built_in_keys:
        file_merge.notes.append(
            f"{', '.join(built_in_keys)} belong to FSDP version 1 and are ignored, because version 2 always behaves as if they were set"
        )


def _read_wrap_policy(fsdp_config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of the wrap policy, which decides which modules are sharded as one unit.

    Errors: ConfigError ConfigFileInvalid if the file has a key of another policy.
    """
    policy = str(fsdp_config.get("auto_wrap_policy", WRAP_BY_LAYER)).upper()
    named_layers, min_parameters = fsdp_config.get("transformer_layer_cls_to_wrap") or (), int(fsdp_config.get("min_num_params") or 0)
    layer_classes = [name.strip() for name in (named_layers.split(",") if isinstance(named_layers, str) else named_layers) if name.strip()]
    for key, value, reading_policy in (
        ("transformer_layer_cls_to_wrap", layer_classes, WRAP_BY_LAYER),
        ("min_num_params", min_parameters, WRAP_BY_SIZE),
    ):
        if value and policy != reading_policy:
            raise ConfigError(
                "ConfigFileInvalid", f"{CONFIG_FILE_FIELD}: fsdp_{key} is only read with {reading_policy}, and fsdp_auto_wrap_policy is {policy}",
                hint=f"remove it, or write `fsdp_auto_wrap_policy: {reading_policy}`",
            )  # fmt: skip
    wrap_policy: dict[str, Any] = {"auto_wrap_policy": policy}
    if layer_classes:
        wrap_policy["transformer_layer_cls_to_wrap"] = layer_classes
    if min_parameters:
        wrap_policy["min_num_params"] = min_parameters
    return wrap_policy


def _find_spec_value(file_value: Any, values_by_name: dict[str, Any], key: str) -> Any:
    """Return the value of the spec that means the same as `file_value`; None if the file does not set `key`. Errors: ConfigError ConfigFileInvalid."""
    if file_value is None:
        return None
    file_text = str(file_value)
    value = values_by_name.get(file_text.upper(), values_by_name.get(file_text.lower()))
    if value is None:
        accepted_names = ", ".join(name for name in values_by_name if name.isupper())
        raise ConfigError("ConfigFileInvalid", f"{CONFIG_FILE_FIELD}: {key} is {file_value}", hint=f"write one of {accepted_names}")
    return value


def _is_true(value: Any) -> bool:
    return BOOLEAN_SPELLINGS[str(value).lower()] if value is not None else False


class Fsdp(DistributedStrategy):
    """Every rank holds a shard of each parameter, gradient and optimizer state."""

    name = "fsdp"
    shards_weights = True

    def __init__(self, run: RunConfig, hardware: Hardware, world_size: int, options: FsdpOptions):
        super().__init__(run, hardware, world_size)
        self.options = options
        self.notes += options.notes
        raise_first_finding("StrategyAndMethod", find_fsdp_conflicts(run.spec))

    @property
    def trainer_mixins(self) -> tuple[type, ...]:
        """The mixin that saves and loads sharded weights and optimizer states."""
        return (_create_sharded_checkpoints_mixin(),)

    def prepare_process(self) -> None:
        """Create the process group that FSDP needs, even for one rank. On a CPU, accelerate would not create a process group."""
        if self.world_size > 1:
            return
        import torch

        set_single_rank_variables()
        if self.hardware.is_cpu and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")

    def training_arguments(self) -> dict[str, Any]:
        """Return FSDP's fields of TrainingArguments. The weights are always saved unsharded: see `ShardedCheckpoints`."""
        config = {
            "version": 2, "reshard_after_forward": self.options.sharding is FsdpSharding.FULL_SHARD,
            "state_dict_type": "FULL_STATE_DICT", "cpu_offload": self.options.offloads_to_cpu, **self.options.wrap_policy,
        }  # fmt: skip
        return {"fsdp": True, "fsdp_config": config, "ddp_backend": "gloo" if self.hardware.is_cpu else "nccl"}

    def on_accelerator_created(self, trainer: Any) -> None:
        """Enable FSDP on a CPU, because accelerate enables it only on GPUs. In 16-bit training, let the ranks add up gradients in 32 bits.

        By default, accelerate would add up gradients in 16 bits, and round the loss to 16 bits. DDP adds up gradients in 32 bits.
        Errors: ConfigError ConfigFileInvalid for layer classes that the model does not have.
        """
        self._require_layers(trainer.model)
        if self.hardware.is_cpu:
            from accelerate.utils import FullyShardedDataParallelPlugin

            from finetune_trainer.library_internals import enable_fsdp_on_cpu

            enable_fsdp_on_cpu(FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args))
            trainer.is_fsdp_enabled = True
        if self.hardware.computes_in_bf16 or self.hardware.computes_in_fp16:
            import torch
            from torch.distributed.fsdp import MixedPrecisionPolicy

            compute_dtype = torch.bfloat16 if self.hardware.computes_in_bf16 else torch.float16
            trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=compute_dtype, reduce_dtype=torch.float32
            )

    def _require_layers(self, model: Any) -> None:
        """Refuse layer classes of the user's file that the model does not have. Errors: ConfigError ConfigFileInvalid."""
        requested_classes = self.options.wrap_policy.get("transformer_layer_cls_to_wrap", ())
        model_classes = sorted({type(module).__name__ for module in model.modules()}) if requested_classes else []
        missing_classes = [name for name in requested_classes if name not in model_classes]
        if missing_classes:
            raise ConfigError(
                "ConfigFileInvalid",
                f"{CONFIG_FILE_FIELD}: fsdp_transformer_layer_cls_to_wrap names {', '.join(missing_classes)}, which the model does not have",
                hint=f"remove it, or write one of these classes: {', '.join(model_classes)}",
            )  # fmt: skip

    def verify_active(self, trainer: Any) -> str:
        """In addition to the strategy, check that every parameter is sharded over all ranks. Errors: InternalError StrategyNotActive."""
        from torch.distributed.tensor import DTensor

        parameters = dict(trainer.model.named_parameters())
        unsharded_names = [
            name
            for name, parameter in parameters.items()
            if not (isinstance(parameter, DTensor) and parameter.device_mesh.size() == self.world_size)
        ]
        if unsharded_names:
            raise InternalError(
                "StrategyNotActive",
                f"fsdp was requested over {self.world_size} ranks, but {len(unsharded_names)} of {len(parameters)} parameters are not sharded; "
                f"the first one is `{unsharded_names[0]}`",
                hint="this is a bug of the trainer image: report it with the versions of its packages",
            )  # fmt: skip
        return super().verify_active(trainer)


def _create_sharded_checkpoints_mixin() -> type:
    """Return the mixin class. The class is defined in a function so that importing this module does not import torch."""
    from finetune_trainer.best import find_best_folder
    from finetune_trainer.distributed.weights import load_into_fsdp
    from finetune_trainer.library_internals import OpenTrainer

    class ShardedCheckpoints(OpenTrainer):
        """Saves the weights unsharded in a plain folder, and the optimizer state in shards unless the spec requests `stateDict: full`.

        transformers 5.23 saves weights and optimizer state either both unsharded or both in shards, and no library loads sharded weights as a model.
        """

        strategy: Fsdp

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            """Gather the weights (of a PEFT model, only the trained ones), and write them as a single rank would."""
            import torch
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            has_adapter = hasattr(self.model, "peft_config")
            state_dict_options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapter)
            with torch.no_grad():
                state_dict = get_model_state_dict(self.model, options=state_dict_options)
            self.save_files(output_dir or self.args.output_dir, state_dict)
            self.accelerator.wait_for_everyone()

        def save_optimizer_and_scheduler(self, output_dir: str) -> None:
            import torch
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            with self._use_optimizer_state_type(plugin):
                save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

        def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            with self._use_optimizer_state_type(self.accelerator.state.fsdp_plugin, checkpoint):
                super().load_optimizer_and_scheduler(checkpoint)

        def load_checkpoint_weights(self, folder: str, model: Any = None) -> None:
            """Load the weights of a plain folder into the sharded model. Errors: NoCheckpointError CheckpointForeign."""
            load_into_fsdp(model or self.model, Path(folder), self.accelerator.is_main_process)
            self.accelerator.wait_for_everyone()

        def load_best_model(self) -> None:
            is_reader = self.accelerator.is_main_process
            load_into_fsdp(self.model, find_best_folder(self) if is_reader else Path(), is_reader)
            self.accelerator.wait_for_everyone()

        @contextmanager
        def _use_optimizer_state_type(self, plugin: Any, checkpoint: str | None = None) -> Iterator[None]:
            """Within the context, set accelerate's state dict type to the type for the optimizer, because accelerate has one setting for model and optimizer.

            If `checkpoint` is given, its files decide the type. Without `checkpoint`, the spec decides the type.
            """
            is_sharded = self.strategy.options.state_dict is FsdpStateDict.SHARDED
            if checkpoint is not None:
                is_sharded = not (Path(checkpoint) / "optimizer.bin").exists()
            settings_before = plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config
            plugin.state_dict_config = plugin.optim_state_dict_config = None
            plugin.set_state_dict_type("SHARDED_STATE_DICT" if is_sharded else "FULL_STATE_DICT")
            try:
                yield
            finally:
                plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config = settings_before

    return ShardedCheckpoints
