"""Fully sharded data parallel, version 2: every rank holds a slice of each parameter, gradient and optimizer state.

Three things are made right here. On CPU (tests, small runs) accelerate never turns FSDP on, and two ranks would run DDP without
an error: the state is set by hand, by one override with a test of its own. Checkpoints keep the model or adapter as the same
plain folder that a single rank writes; only the optimizer stays sharded. And 4-bit weights are stored as floats, since
accelerate leaves integers unsharded with only a warning (`finetune_trainer.model` does that when `sharded_weights` is set).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, InternalError
from finetune_api.pod import RunConfig
from finetune_api.rules import incompatible_with_fsdp, raise_first_finding
from finetune_api.spec.enums import FsdpSharding, FsdpStateDict, GradientCheckpointing

from finetune_trainer.distributed.base import Plan
from finetune_trainer.distributed.userfile import COUNT, MAPPING, TEXT, Comparison, Kind, fitting, one_of, read
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs

FILE = "distributed.fsdp.configRef"
SHARDING = {
    "FULL_SHARD": FsdpSharding.FULL_SHARD, "SHARD_GRAD_OP": FsdpSharding.SHARD_GRAD_OP, "NO_SHARD": FsdpSharding.NO_SHARD,
    "1": FsdpSharding.FULL_SHARD, "2": FsdpSharding.SHARD_GRAD_OP, "3": FsdpSharding.NO_SHARD,
    "true": FsdpSharding.FULL_SHARD, "false": FsdpSharding.SHARD_GRAD_OP,
}  # fmt: skip
"""Words of accelerate's files for `sharding`; its version 2 says whether to reshard after the forward pass."""
STATE_DICT = {
    "FULL_STATE_DICT": FsdpStateDict.FULL, "SHARDED_STATE_DICT": FsdpStateDict.SHARDED, "LOCAL_STATE_DICT": FsdpStateDict.LOCAL,
}  # fmt: skip
LAUNCHER = (
    "compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "machine_rank", "main_process_ip", "main_process_port",
    "main_training_function", "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster", "tpu_use_sudo", "use_cpu", "gpu_ids",
    "tpu_name", "tpu_zone", "dynamo_config", "commands", "command_file", "deepspeed_config", "megatron_lm_config", "ipex_config",
)  # fmt: skip
"""Keys of accelerate's files that tell its launcher how to start ranks; here the operator starts them."""
BUILT_IN = ("backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers")
"""Keys of FSDP version 1 whose behaviour is part of version 2."""
WRAPS = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
BY_LAYER, BY_SIZE, _ = WRAPS
WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""Truth values, as accelerate's own questions write them."""
SWITCH = Kind("true or false", lambda found: str(found).lower() in WORDS)
SIZE = Kind(
    "a whole number of at least 0",
    lambda found: str(found).isdecimal() or isinstance(found, float) and found >= 0 and found.is_integer(),
)
LAYERS = Kind(
    "names of layer classes",
    lambda found: isinstance(found, str) or isinstance(found, list) and all(isinstance(one, str) for one in found),
)
ANYTHING = Kind("anything", lambda found: True)
KEYS = {
    "distributed_type": TEXT, "num_processes": COUNT, "num_machines": COUNT, "fsdp_config": MAPPING,
    "mixed_precision": one_of("no", "fp16", "bf16", "fp8", False), **dict.fromkeys(LAUNCHER, ANYTHING),
}  # fmt: skip
INNER_KEYS = {
    "version": one_of(1, 2, "1", "2"), "sharding_strategy": ANYTHING, "reshard_after_forward": ANYTHING, "state_dict_type": ANYTHING,
    "offload_params": SWITCH, "activation_checkpointing": SWITCH, "cpu_ram_efficient_loading": SWITCH, "transformer_layer_cls_to_wrap": LAYERS,
    "min_num_params": SIZE, "auto_wrap_policy": Kind(f"one of {', '.join(WRAPS)}", lambda found: str(found).upper() in WRAPS),
    **dict.fromkeys(BUILT_IN, ANYTHING),
}  # fmt: skip
"""Of fsdp_config, without the prefix; the words of `SHARDING` and `STATE_DICT` are looked up there."""


@dataclass
class Options:
    """What FSDP is told."""

    sharding: FsdpSharding = FsdpSharding.FULL_SHARD
    state_dict: FsdpStateDict = FsdpStateDict.SHARDED
    offload: bool = False
    wrap: dict[str, Any] = field(default_factory=lambda: {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"})
    notes: list[str] = field(default_factory=list)


def options(run: RunConfig, inputs: Inputs, hardware: Hardware, world_size: int) -> Options:
    """From the spec and the user's accelerate file.

    Errors: ConfigError ConfigsDisagree, ConfigFileInvalid, the codes of rules that
    the values of the file break, StateDictUnavailable.
    """
    spec = run.spec.distributed.fsdp
    result = Options()
    if spec is None:
        return result
    result.sharding = spec.sharding or result.sharding
    result.state_dict = spec.state_dict or result.state_dict
    if spec.config_ref is not None:
        _merge(result, read(spec.config_ref, inputs.config_maps, FILE), run, hardware, world_size)
    if result.state_dict is FsdpStateDict.LOCAL:
        raise ConfigError(
            "StateDictUnavailable", "distributed.fsdp.stateDict is local, which FSDP version 2 does not have",
            hint="write sharded, which is also one file a rank, or full",
        )  # fmt: skip
    return result


def _merge(result: Options, file: dict[str, Any], run: RunConfig, hardware: Hardware, world_size: int) -> None:
    """Put the user's accelerate file into `result`; every key has an effect, is told, or is refused."""
    both = Comparison(run)
    inner = _inner(file)
    kind = file.get("distributed_type", "FSDP")
    if str(kind).upper() != "FSDP":
        both.conflicts.append(f"distributed_type is {kind}, distributed.strategy is fsdp")
    both.must("num_processes", file.get("num_processes"), "the number of ranks", world_size)
    both.must("num_machines", file.get("num_machines"), "resources.nodes", run.world.nodes)
    active = "bf16" if hardware.bf16 else "fp16" if hardware.fp16 else "no"
    precision = file.get("mixed_precision")
    precision = "no" if precision is False else precision  # what YAML makes of no without quotes
    both.must("mixed_precision", precision, "training.mixedPrecision (as settled)", active)
    _merge_fsdp(result, inner, both, run)
    launcher = sorted(set(file) & set(LAUNCHER))
    if launcher:
        both.notes.append(
            f"of the accelerate file, {', '.join(launcher)} concern its launcher: the operator starts the ranks"
        )
    both.settle("the accelerate file")
    result.notes += both.notes


def _inner(file: dict[str, Any]) -> dict[str, Any]:
    """The group fsdp_config without prefixes and nulls. Errors: ConfigError ConfigFileInvalid."""
    fitting(FILE, "", file, KEYS)
    inner = {
        key.removeprefix("fsdp_"): value for key, value in (file.get("fsdp_config") or {}).items() if value is not None
    }
    fitting(FILE, "fsdp_config", inner, INNER_KEYS)
    return inner


def _merge_fsdp(result: Options, inner: dict[str, Any], both: Comparison, run: RunConfig) -> None:
    if str(inner.get("version", 2)) != "2":
        raise ConfigError(
            "ConfigFileInvalid", f"{FILE}: fsdp_version 1 is gone from the libraries", hint="write 2, or remove it"
        )
    said = {
        key: _word(inner.get(key), SHARDING, f"fsdp_{key}") for key in ("sharding_strategy", "reshard_after_forward")
    }
    words = {key: word for key, word in said.items() if word is not None}
    if len(set(words.values())) > 1:
        both.conflicts.append(
            f"fsdp_sharding_strategy means {words['sharding_strategy']}, fsdp_reshard_after_forward {words['reshard_after_forward']}"
        )
    for key, word in words.items():
        result.sharding = both.same(f"fsdp_{key}", word, "distributed.fsdp.sharding", result.sharding)
    found = _word(inner.get("state_dict_type"), STATE_DICT, "fsdp_state_dict_type")
    result.state_dict = both.same("fsdp_state_dict_type", found, "distributed.fsdp.stateDict", result.state_dict)
    result.offload = _true(inner.get("offload_params"))
    result.wrap = _wrap(inner)
    if (recompute := inner.get("activation_checkpointing")) is not None:
        asked = both.before("training.gradientCheckpointing", run.spec.training.gradient_checkpointing)
        wanted = asked not in (None, GradientCheckpointing.DISABLED)
        both.must("fsdp_activation_checkpointing", _true(recompute), "training.gradientCheckpointing", wanted)
    if _true(inner.get("cpu_ram_efficient_loading")):
        raise ConfigError(
            "ConfigFileInvalid", f"{FILE}: fsdp_cpu_ram_efficient_loading is true, but every rank reads the weights itself here",
            hint="remove it, and give the pod memory for one copy of the weights a rank",
        )  # fmt: skip
    built_in = [f"fsdp_{key}" for key in BUILT_IN if key in inner]
    if built_in:
        both.notes.append(f"{', '.join(built_in)} belong to FSDP version 1; version 2 always works so, or better")


def _wrap(inner: dict[str, Any]) -> dict[str, Any]:
    """Which modules are sharded as one. Errors: ConfigError ConfigFileInvalid for what the policy does not read."""
    policy = str(inner.get("auto_wrap_policy", BY_LAYER)).upper()
    named, least = inner.get("transformer_layer_cls_to_wrap") or (), int(inner.get("min_num_params") or 0)
    layers = [name.strip() for name in (named.split(",") if isinstance(named, str) else named) if name.strip()]
    for key, given, reader in (
        ("transformer_layer_cls_to_wrap", layers, BY_LAYER),
        ("min_num_params", least, BY_SIZE),
    ):
        if given and policy != reader:
            raise ConfigError(
                "ConfigFileInvalid", f"{FILE}: fsdp_{key} is only read with {reader}, and fsdp_auto_wrap_policy is {policy}",
                hint=f"remove it, or write `fsdp_auto_wrap_policy: {reader}`",
            )  # fmt: skip
    wrap: dict[str, Any] = {"auto_wrap_policy": policy}
    if layers:
        wrap["transformer_layer_cls_to_wrap"] = layers
    if least:
        wrap["min_num_params"] = least
    return wrap


def _word(found: Any, words: dict[str, Any], key: str) -> Any:
    if found is None:
        return None
    text = str(found)
    value = words.get(text.upper(), words.get(text.lower()))
    if value is None:
        names = ", ".join(word for word in words if word.isupper())
        raise ConfigError("ConfigFileInvalid", f"{FILE}: {key} is {found}", hint=f"write one of {names}")
    return value


def _true(value: Any) -> bool:
    return WORDS[str(value).lower()] if value is not None else False


class Fsdp(Plan):
    """Slices of everything on every rank."""

    name = "fsdp"
    sharded_weights = True

    def __init__(self, run: RunConfig, hardware: Hardware, world_size: int, chosen: Options):
        super().__init__(run, hardware, world_size)
        self.chosen = chosen
        self.notes += chosen.notes
        raise_first_finding("StrategyAndMethod", incompatible_with_fsdp(run.spec))

    @property
    def trainer_bases(self) -> tuple[type, ...]:
        """Saving and loading of sharded state."""
        return (_sharded_checkpoints_mixin(),)

    def arguments(self) -> dict[str, Any]:
        """Fields of TrainingArguments. What is saved as the model is always whole; see `ShardedCheckpoints`."""
        config = {
            "version": 2, "reshard_after_forward": self.chosen.sharding is FsdpSharding.FULL_SHARD,
            "state_dict_type": "FULL_STATE_DICT", "cpu_offload": self.chosen.offload, **self.chosen.wrap,
        }  # fmt: skip
        return {"fsdp": True, "fsdp_config": config, "ddp_backend": "gloo" if self.hardware.is_cpu else "nccl"}

    def after_accelerator(self, trainer: Any) -> None:
        """On CPU, enable FSDP, which accelerate enables on GPUs only. In 16 bits, reduce gradients in 32.

        accelerate would also sum the gradients and round the loss in 16 bits; DDP sums them in 32.
        Errors: ConfigError ConfigFileInvalid for layer classes that the model does not have.
        """
        self._require_layers(trainer.model)
        if self.hardware.is_cpu:
            from accelerate.utils import FullyShardedDataParallelPlugin

            from finetune_trainer.library_internals import enable_fsdp_on_cpu

            enable_fsdp_on_cpu(FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args))
            trainer.is_fsdp_enabled = True
        if self.hardware.bf16 or self.hardware.fp16:
            import torch
            from torch.distributed.fsdp import MixedPrecisionPolicy

            narrow = torch.bfloat16 if self.hardware.bf16 else torch.float16
            trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=narrow, reduce_dtype=torch.float32
            )

    def _require_layers(self, model: Any) -> None:
        """Whether the model has the layers that the user's file names. Errors: ConfigError ConfigFileInvalid."""
        asked = self.chosen.wrap.get("transformer_layer_cls_to_wrap", ())
        there = sorted({type(module).__name__ for module in model.modules()}) if asked else []
        missing = [name for name in asked if name not in there]
        if missing:
            raise ConfigError(
                "ConfigFileInvalid", f"{FILE}: fsdp_transformer_layer_cls_to_wrap names {', '.join(missing)}, which the model does not have",
                hint=f"remove it, or write one of {', '.join(there)}",
            )  # fmt: skip

    def verify(self, trainer: Any) -> str:
        """Every parameter must be sharded over all ranks. Errors: InternalError StrategyNotActive."""
        from torch.distributed.tensor import DTensor

        parameters = dict(trainer.model.named_parameters())
        whole = [
            name
            for name, one in parameters.items()
            if not (isinstance(one, DTensor) and one.device_mesh.size() == self.world_size)
        ]
        if whole:
            raise InternalError(
                "StrategyNotActive",
                f"fsdp was asked for over {self.world_size} ranks, but {len(whole)} of {len(parameters)} parameters are whole on every rank, "
                f"first {whole[0]}",
                hint="this is a fault of the trainer image: report it with its versions",
            )  # fmt: skip
        return super().verify(trainer)


def _sharded_checkpoints_mixin() -> type:
    """The mix-in; made here so that this module loads without torch."""
    from finetune_trainer.best import best_folder
    from finetune_trainer.distributed.weights import load_whole
    from finetune_trainer.library_internals import OpenTrainer

    class ShardedCheckpoints(OpenTrainer):
        """Checkpoints with the weights or the adapter in one plain folder, and the optimizer's state sharded unless asked otherwise.

        transformers 5.23 writes either complete safetensors and complete states, or shards, which no library loads as a model.
        """

        plan: Fsdp

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            """Gather the trained weights (adapter) or all weights (model), and write them as a single rank would."""
            import torch
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            adapter = hasattr(self.model, "peft_config")
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
            with torch.no_grad():
                state = get_model_state_dict(self.model, options=whole)
            self.save_files(output_dir or self.args.output_dir, state)
            self.accelerator.wait_for_everyone()

        def save_optimizer_and_scheduler(self, output_dir: str) -> None:
            import torch
            from accelerate.utils import save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            with self._optimizer_layout(plugin):
                save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

        def load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            with self._optimizer_layout(self.accelerator.state.fsdp_plugin, checkpoint):
                super().load_optimizer_and_scheduler(checkpoint)

        def load_checkpoint_weights(self, folder: str, model: Any = None) -> None:
            """Load the weights of a plain folder into the sharded model. Errors: NoCheckpointError CheckpointForeign."""
            load_whole(model or self.model, Path(folder), self.accelerator.is_main_process)
            self.accelerator.wait_for_everyone()

        def load_best_model(self) -> None:
            reader = self.accelerator.is_main_process
            load_whole(self.model, best_folder(self) if reader else Path(), reader)
            self.accelerator.wait_for_everyone()

        @contextmanager
        def _optimizer_layout(self, plugin: Any, checkpoint: str | None = None) -> Iterator[None]:
            """Set the layout of the optimizer's state for one call: accelerate reads it from the plugin, as that of the model."""
            sharded = self.plan.chosen.state_dict is FsdpStateDict.SHARDED
            if checkpoint is not None:
                sharded = not (Path(checkpoint) / "optimizer.bin").exists()
            before = plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config
            plugin.state_dict_config = plugin.optim_state_dict_config = None
            plugin.set_state_dict_type("SHARDED_STATE_DICT" if sharded else "FULL_STATE_DICT")
            try:
                yield
            finally:
                plugin.state_dict_type, plugin.state_dict_config, plugin.optim_state_dict_config = before

    return ShardedCheckpoints
