"""DeepSpeed ZeRO: stage 1 shards the optimizer, 2 gradients too, 3 parameters too; 0 is plain data parallelism.

The configuration is made from one source. A user's JSON keeps every option of DeepSpeed's own; where it speaks of something the
spec also says (batch, clipping, rate, precision, stage, offload), both must agree, or the JSON says `auto`. Optimizer and scheduler
sections are read and run by torch: DeepSpeed's own ones are compiled on first use, which a pod cannot do. DeepSpeed itself ignores
keys that it does not know at the top, and ends with a trace where a value has the wrong type: both are refused here by name.
"""

from __future__ import annotations

import copy
import os
import socket
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
from finetune_api.spec.enums import Scheduler
from pydantic import ValidationError

from finetune_trainer.distributed.base import Plan
from finetune_trainer.distributed.userfile import (
    AUTO,
    COUNT,
    FLAG,
    MAPPING,
    NOT_NEGATIVE,
    POSITIVE,
    STEPS,
    TEXT,
    Comparison,
    Kind,
    fitting,
    one_of,
    read,
)
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs

FILE = "distributed.deepspeed.configRef"
DEFAULT_STAGE = 2
FILLED_LATER = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of zero_optimization whose `auto` transformers fills in from the model's size."""
_NO_METRICS = "metrics go where `tracking` says"
_GONE = "this version of DeepSpeed does not have it"
REFUSED = {
    "tensor_parallel": "tensor parallelism is not offered here", "sequence_parallel_size": "sequence parallelism is not offered here",
    "expert_parallel": "expert parallelism is not offered here", "elasticity": "the operator decides on the number of ranks",
    "pipeline": "pipeline parallelism is not offered here", "curriculum_learning": "the order of the rows is not DeepSpeed's to choose here",
    "data_efficiency": "the order of the rows is not DeepSpeed's to choose here",
    "activation_checkpointing": "recomputation is asked for by training.gradientCheckpointing",
    "torch_autocast": "precision is asked for by training.mixedPrecision", "bfloat16": "the key is called bf16",
    "aio": "nvme is not offered here", "autotuning": "the operator starts the ranks", "hybrid_engine": "answers are not written by DeepSpeed here",
    "tensorboard": _NO_METRICS, "wandb": _NO_METRICS, "comet": _NO_METRICS, "csv_monitor": _NO_METRICS,
} | dict.fromkeys(
    ("amp", "compression_training", "eigenvalue", "nebula", "progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    _GONE,
)  # fmt: skip
"""Sections that cannot be had, unless the file turns them off itself."""
REFUSED_OF_ZERO = {
    "cpu_offload": "the key is called offload_optimizer", "cpu_offload_param": "the key is called offload_param",
    "cpu_offload_use_pin_memory": "the key is called pin_memory, in offload_optimizer and offload_param",
}  # fmt: skip
ROWS, ROWS_PATH = "train_micro_batch_size_per_gpu", "training.batchSizePerDevice"
ACCUMULATION, ACCUMULATION_PATH = "gradient_accumulation_steps", "training.gradientAccumulationSteps"
LARGEST = 65536
"""Of both, as the API has it."""
BATCH = Kind(f"a whole number from 1 to {LARGEST}", lambda found: COUNT.fits(found) and found <= LARGEST)
KEYS = {
    "train_batch_size": COUNT, ROWS: BATCH, ACCUMULATION: BATCH, "gradient_clipping": NOT_NEGATIVE,
    "bf16": MAPPING, "fp16": MAPPING, "zero_optimization": MAPPING, "optimizer": MAPPING, "scheduler": MAPPING, "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG, "communication_data_type": TEXT, "data_types": MAPPING, "prescale_gradients": FLAG,
    "gradient_predivide_factor": POSITIVE, "gradient_allreduce_op": TEXT, "checkpoint": MAPPING, "comms_logger": MAPPING, "flops_profiler": MAPPING,
    "timers": MAPPING, "steps_per_print": POSITIVE, "wall_clock_breakdown": FLAG, "memory_breakdown": FLAG, "dump_state": FLAG,
    "disable_python_gc": FLAG, "log_level": TEXT,
}  # fmt: skip
"""What the JSON may say at the top. Keys inside the sections that DeepSpeed reads are checked by DeepSpeed, see `read_by_deepspeed`."""
SECTION = {"type": TEXT, "params": MAPPING}
DECAY = Kind("a number from 0 to below 1", lambda found: found == AUTO or NOT_NEGATIVE.fits(found) and found < 1)
BETAS = Kind(
    "two numbers from 0 to below 1",
    lambda found: isinstance(found, list) and len(found) == 2 and all(map(DECAY.fits, found)),
)
ADAM = {
    "lr": POSITIVE, "betas": BETAS, "eps": POSITIVE, "weight_decay": NOT_NEGATIVE, "adam_w_mode": FLAG, "torch_adam": FLAG,
}  # fmt: skip
WARMUP = {
    "warmup_num_steps": STEPS, "warmup_min_lr": NOT_NEGATIVE, "warmup_max_lr": NOT_NEGATIVE, "total_num_steps": COUNT, "warmup_type": TEXT,
}  # fmt: skip
DEVICE = one_of("none", "cpu", "nvme")
FUSED = "adamw_torch_fused"
TORCHS_ADAMW = ("adamw_torch", FUSED)
OFFLOADS = (
    ("offload_optimizer", "offloadOptimizer", "offload_optimizer"), ("offload_param", "offloadParameters", "offload_parameters"),
)  # fmt: skip
"""Section of zero_optimization, name in the spec, attribute of it."""
SCHEDULERS = {
    "WarmupLR": Scheduler.CONSTANT_WITH_WARMUP, "WarmupDecayLR": Scheduler.LINEAR, "WarmupCosineLR": Scheduler.COSINE,
}  # fmt: skip


@dataclass
class Options:
    """DeepSpeed's configuration, and what of it the Trainer has to know."""

    stage: int
    config: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingArguments that the JSON decides."""
    notes: list[str] = field(default_factory=list)


def options(run: RunConfig, inputs: Inputs, hardware: Hardware, world_size: int) -> Options:
    """From the spec and the user's JSON.

    Errors: ConfigError ConfigsDisagree (with all conflicts), ConfigFileInvalid, OffloadNeedsStage3, the codes of rules that the
    values of the file break; NotFoundError ConfigMapMissing.
    """
    spec = run.spec.distributed.deepspeed
    both = Comparison(run)
    config = _checked(read(spec.config_ref, inputs.config_maps, FILE) if spec and spec.config_ref else {}, both)
    result = Options(DEFAULT_STAGE, config)
    _batches(config, both, run, result, world_size)
    _precision(config, both, hardware)
    _optimizer(config, both, run, result)
    _scheduler(config, both, run, result)
    _zero(config, both, run, result)
    both.settle("the DeepSpeed JSON")
    result.notes += both.notes
    _no_auto_left(config)
    return result


def _checked(given: dict[str, Any], both: Comparison) -> dict[str, Any]:
    """A copy of the file without what it leaves open or turns off. Errors: ConfigError ConfigFileInvalid."""
    config: dict[str, Any] = _without_nulls(given)
    off = [key for key in REFUSED if isinstance(config.get(key), dict) and config[key].get("enabled") is False]
    for key in off:
        del config[key]
    if off:
        both.notes.append(f"the DeepSpeed JSON turns {', '.join(off)} off: left out")
    _refuse(REFUSED, "", config)
    fitting(FILE, "", config, KEYS, auto=True)
    for name in ("bf16", "fp16"):
        _inner(name, config.get(name), {"enabled": FLAG})
    zero = config.get("zero_optimization", {})
    _refuse(REFUSED_OF_ZERO, "zero_optimization.", zero)
    _inner("zero_optimization", zero, {"stage": one_of(0, 1, 2, 3), **{section: MAPPING for section, _, _ in OFFLOADS}})
    for section, _, _ in OFFLOADS:
        _inner(f"zero_optimization.{section}", zero.get(section), {"device": DEVICE}, auto=False)
    return config


def _refuse(keys: dict[str, str], prefix: str, section: dict[str, Any]) -> None:
    found = [f"{prefix}{key} ({reason})" for key, reason in keys.items() if key in section]
    if found:
        raise ConfigError("ConfigFileInvalid", f"{FILE}: {'; '.join(found)}", hint="remove it")


def _without_nulls(value: Any) -> Any:
    """null stands for what DeepSpeed does anyway."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return copy.deepcopy(value)


def _inner(group: str, section: Any, kinds: dict[str, Kind], *, auto: bool = True) -> None:
    """Check the keys that are read here; the others are DeepSpeed's."""
    fitting(FILE, group, {key: value for key, value in (section or {}).items() if key in kinds}, kinds, auto=auto)


def _batches(config: dict[str, Any], both: Comparison, run: RunConfig, result: Options, world_size: int) -> None:
    rows, steps = _rows_and_steps(config, both, run)
    clip = both.same(
        "gradient_clipping", config.get("gradient_clipping"), "training.maxGradNorm", run.spec.training.max_grad_norm
    )
    whole = rows * steps * world_size
    both.must("train_batch_size", config.get("train_batch_size"), "micro-batch x accumulation x ranks", whole)
    config |= {ROWS: rows, ACCUMULATION: steps, "train_batch_size": whole, "gradient_clipping": clip}
    result.training |= {
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": steps,
        "max_grad_norm": clip,
    }


def _rows_and_steps(config: dict[str, Any], both: Comparison, run: RunConfig) -> tuple[int, int]:
    """Micro-batch and accumulation. What memory could not hold goes down with the spec's, with the same effective batch."""
    training = run.spec.training
    asked = training.batch_size_per_device
    before = both.before(ROWS_PATH, asked)
    adapted = before != asked
    more = training.gradient_accumulation_steps
    of_spec = both.before(ACCUMULATION_PATH, more) if adapted else more
    rows = both.same(ROWS, config.get(ROWS), ROWS_PATH, before)
    steps = both.same(ACCUMULATION, config.get(ACCUMULATION), ACCUMULATION_PATH, of_spec)
    if not adapted or both.conflicts:
        return rows, steps
    both.settled |= {ROWS_PATH: rows, ACCUMULATION_PATH: steps}
    fewer = _fewer(rows, steps, rows * asked / before, both, run)
    if (rows, steps) != (before, of_spec):
        why = f"as {ROWS_PATH} went from {before} to {asked}"
        if fewer == rows:
            told = (
                f"{ROWS} {rows} of the file stays, though not {why}: it has no smaller divisor that can be trained with"
            )
        else:
            told = f"{ROWS} {rows} of the file becomes {fewer}, {why}, and {ACCUMULATION} {steps} becomes {steps * rows // fewer}"
        both.notes.append(told)
    steps = steps * rows // fewer
    both.settled |= {ROWS_PATH: fewer, ACCUMULATION_PATH: steps}
    return fewer, steps


def _fewer(rows: int, steps: int, wanted: float, both: Comparison, run: RunConfig) -> int:
    """The largest divisor of a micro-batch at or below what is wanted, else the smallest there is; `rows` itself if none is smaller.

    None is taken that a rule would refuse: a job whose memory ran out is not to end for what nobody wrote.
    """
    divisors = [
        part
        for part in range(min_batch_size_per_device(run.spec), rows)
        if rows % part == 0
        and steps * rows // part <= LARGEST
        and both.allowed({ROWS_PATH: part, ACCUMULATION_PATH: steps * rows // part})
    ]
    return max((part for part in divisors if part <= wanted), default=min(divisors, default=rows))


def _precision(config: dict[str, Any], both: Comparison, hardware: Hardware) -> None:
    for name, active in (("bf16", hardware.bf16), ("fp16", hardware.fp16)):
        section = config.setdefault(name, {})
        both.must(
            f"{name}.enabled",
            section.get("enabled"),
            f"{name} on {hardware.name}, as training.mixedPrecision settles it,",
            active,
        )
        section["enabled"] = active


def _optimizer(config: dict[str, Any], both: Comparison, run: RunConfig, result: Options) -> None:
    """Adam of the JSON is run by torch, with its numbers."""
    section = config.pop("optimizer", None)
    if section is None:
        return
    fitting(FILE, "optimizer", section, SECTION, auto=True)
    kind, given, training = (
        str(section.get("type", "without a type")),
        dict(section.get("params") or {}),
        run.spec.training,
    )
    if kind.lower() not in ("adam", "adamw") or given.get("adam_w_mode", True) is False:
        raise ConfigError(
            "ConfigFileInvalid", f"{FILE}: optimizer {kind} is compiled by DeepSpeed on first use, which a pod cannot do",
            hint="write AdamW, or remove the section and name training.optimizer",
        )  # fmt: skip
    fitting(FILE, "optimizer.params", given, ADAM, auto=True)
    name = training.optimizer
    if name not in TORCHS_ADAMW:
        name = both.same("optimizer.type", FUSED, "training.optimizer", name, shown=kind)
    betas = given.get("betas", AUTO)
    first, second = (AUTO, AUTO) if betas == AUTO else betas
    result.training |= {
        "optim": name,
        "adam_beta1": both.same("optimizer.params.betas[0]", first, "training.adamBeta1", training.adam_beta1),
        "adam_beta2": both.same("optimizer.params.betas[1]", second, "training.adamBeta2", training.adam_beta2),
        "learning_rate": both.same("optimizer.params.lr", given.get("lr"), "training.learningRate", training.learning_rate),
        "adam_epsilon": both.same("optimizer.params.eps", given.get("eps"), "training.adamEpsilon", training.adam_epsilon),
        "weight_decay": both.same("optimizer.params.weight_decay", given.get("weight_decay"), "training.weightDecay", training.weight_decay),
    }  # fmt: skip
    both.notes.append(f"optimizer {kind} of the DeepSpeed JSON runs as torch's AdamW ({name})")


def _scheduler(config: dict[str, Any], both: Comparison, run: RunConfig, result: Options) -> None:
    """Warm-up schedules of the JSON are run by transformers."""
    section = config.pop("scheduler", None)
    if section is None:
        return
    fitting(FILE, "scheduler", section, SECTION, auto=True)
    kind, given, training = (
        str(section.get("type", "without a type")),
        dict(section.get("params") or {}),
        run.spec.training,
    )
    if kind not in SCHEDULERS:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE}: scheduler {kind} is not offered here",
            hint=f"write one of {', '.join(SCHEDULERS)}, or training.scheduler",
        )
    fitting(FILE, "scheduler.params", given, WARMUP, auto=True)
    from finetune_trainer.schedules import SCHEDULER_NAMES

    scheduler = both.same(
        "scheduler.type",
        SCHEDULERS[kind],
        "training.scheduler",
        training.scheduler,
        shown=f"{kind} ({SCHEDULERS[kind]})",
    )
    result.training["lr_scheduler_type"] = SCHEDULER_NAMES[scheduler]
    _warmup(given.get("warmup_num_steps"), both, run, result)
    rate = both.undone(
        "training.learningRate", training.learning_rate, result.training.get("learning_rate", training.learning_rate)
    )
    for key, path, actual in (
        ("warmup_max_lr", "training.learningRate", rate),
        ("warmup_min_lr", "the rate that warm-up begins with", 0),
        ("total_num_steps", "training.maxSteps", training.max_steps),
        ("warmup_type", "the course of the warm-up", "linear"),
    ):
        both.must(f"scheduler.params.{key}", given.get(key), path, actual)
    both.notes.append(f"scheduler {kind} of the DeepSpeed JSON runs as {scheduler}")


def _warmup(steps: Any, both: Comparison, run: RunConfig, result: Options) -> None:
    """Steps of the file win over a ratio that nobody wrote."""
    training, key = run.spec.training, "scheduler.params.warmup_num_steps"
    if steps in (None, AUTO):
        return
    if training.warmup_ratio and "training.warmupRatio" not in run.defaults:
        both.conflicts.append(f"{key} is {steps}, training.warmupRatio is {training.warmup_ratio:g}")
    result.training["warmup_steps"] = both.same(key, steps, "training.warmupSteps", training.warmup_steps)
    if "training.warmupSteps" in both.settled:
        both.settled["training.warmupRatio"] = None


def _zero(config: dict[str, Any], both: Comparison, run: RunConfig, result: Options) -> None:
    spec = run.spec.distributed.deepspeed
    zero = config.setdefault("zero_optimization", {})
    stage = both.same(
        "zero_optimization.stage",
        zero.get("stage"),
        "distributed.deepspeed.zeroStage",
        spec.zero_stage if spec else None,
    )
    result.stage = zero["stage"] = DEFAULT_STAGE if stage is None else stage
    for key, path, attribute in OFFLOADS:
        section, asked = zero.get(key) or {}, getattr(spec, attribute) if spec else None
        if section.get("device") == "nvme":
            raise ConfigError(
                "ConfigFileInvalid",
                f"{FILE}: {key}.device nvme is compiled on first use, which a pod cannot do",
                hint="write cpu",
            )
        found = None if key not in zero else section.get("device", "none") != "none"
        if both.same(f"zero_optimization.{key}", found, f"distributed.deepspeed.{path}", asked):
            zero[key] = {**section, "device": "cpu"}
        else:
            zero.pop(key, None)
    if "offload_param" in zero and result.stage != 3:
        raise ConfigError(
            "OffloadNeedsStage3", f"parameters are to be offloaded, but the ZeRO stage is {result.stage}, which does not shard them",
            hint="write `zeroStage: 3`, or remove offloadParameters",
        )  # fmt: skip
    if "offload_optimizer" in zero and result.stage == 0:
        raise ConfigError(
            "OffloadNeedsStage1", "the optimizer is to be offloaded, but with ZeRO stage 0 DeepSpeed does not own its state",
            hint="write `zeroStage: 1` or more, or remove offloadOptimizer",
        )  # fmt: skip
    if result.stage == 3:
        both.must(
            "zero_optimization.stage3_gather_16bit_weights_on_model_save", zero.get("stage3_gather_16bit_weights_on_model_save"),
            "what a checkpoint that anyone can load needs", True,
        )  # fmt: skip
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    # The optimizer is torch's, also where its state lies in host memory: DeepSpeed's own would have to be compiled.
    for key, value in (("zero_allow_untested_optimizer", True), ("zero_force_ds_cpu_optimizer", False)):
        both.must(key, config.get(key), "what torch's own optimizer needs", value)
        config[key] = value


def _no_auto_left(config: dict[str, Any]) -> None:
    left = [key for key in _autos(config) if key.removeprefix("zero_optimization.") not in FILLED_LATER]
    if left:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE}: {', '.join(left)} is auto, and nothing says what that is",
            hint="write a value, or remove it",
        )


def _autos(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in _autos(inner, f"{path}.{key}" if path else str(key))]
    return [path] if value == AUTO else []


def read_by_deepspeed(config: dict[str, Any]) -> None:
    """Let DeepSpeed read the settled configuration, before anything is loaded. Errors: ConfigError ConfigFileInvalid with its words."""
    from deepspeed.runtime.config import DeepSpeedConfig

    trial = copy.deepcopy(config)
    del trial["train_batch_size"]  # it is counted again from the other two, with as many ranks as there are by now
    try:
        DeepSpeedConfig(trial)
    except Exception as error:
        told = str(error)
        if isinstance(error, ValidationError):
            told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            told = f"{error.title}: {told}"
        raise ConfigError(
            "ConfigFileInvalid", f"{FILE}: DeepSpeed does not take it: {' '.join(told.split())[:500]}",
            hint="mend what is named, or remove it",
        ) from error  # fmt: skip


class Deepspeed(Plan):
    """DeepSpeed's engine around the model."""

    name = "deepspeed"

    def __init__(self, run: RunConfig, hardware: Hardware, world_size: int, chosen: Options):
        super().__init__(run, hardware, world_size)
        self.chosen = chosen
        self.sharded_weights = self.keep_adapter_dtype = chosen.stage == 3
        self.notes += [*chosen.notes, f"DeepSpeed ZeRO stage {chosen.stage}"]
        raise_first_finding("StrategyAndMethod", incompatible_with_deepspeed(run.spec))
        if chosen.stage == 3:
            raise_first_finding("StrategyAndMethod", incompatible_with_zero3(run.spec))

    @property
    def trainer_bases(self) -> tuple[type, ...]:
        """Loading of the best weights at the end."""
        return (_best_weights_mixin(),)

    def before(self) -> None:
        """DeepSpeed wants a process group even for one rank. On CPU nobody else makes it before the model is loaded."""
        import deepspeed
        import torch

        read_by_deepspeed(self.chosen.config)
        if self.world_size == 1:
            alone = {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }
            os.environ |= alone
        if self.hardware.is_cpu:
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
            deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    def arguments(self) -> dict[str, Any]:
        """Fields of TrainingArguments."""
        return {**self.chosen.training, "deepspeed": copy.deepcopy(self.chosen.config)}

    def verify(self, trainer: Any) -> str:
        """The engine's own word on stage and ranks, and DeepSpeed's marks on parameters. Errors: InternalError StrategyNotActive."""
        name = super().verify(trainer)
        engine = trainer.deepspeed
        stage, ranks = engine.zero_optimization_stage(), engine.world_size
        sharded = sum(hasattr(one, "ds_id") for one in trainer.model.parameters())
        total = sum(1 for _ in trainer.model.parameters())
        wanted = total if self.chosen.stage == 3 else 0
        if (stage, ranks, sharded) != (self.chosen.stage, self.world_size, wanted):
            raise InternalError(
                "StrategyNotActive",
                f"ZeRO stage {self.chosen.stage} over {self.world_size} ranks was asked for; active: stage {stage} over {ranks} ranks, "
                f"{sharded} of {total} parameters sharded",
                hint="this is a fault of the trainer image: report it with its versions",
            )  # fmt: skip
        return name


def _best_weights_mixin() -> type:
    """The mix-in; made here so that this module loads without torch."""
    from finetune_trainer.best import best_folder
    from finetune_trainer.distributed.weights import load_gathered
    from finetune_trainer.library_internals import OpenTrainer

    class BestWeightsFromFolder(OpenTrainer):
        """Loads the best weights from a plain folder; transformers would load DeepSpeed's own checkpoint, which may be deleted."""

        def load_best_model(self) -> None:
            reader = self.accelerator.is_main_process
            load_gathered(self.model, best_folder(self) if reader else Path(), reader)
            self.accelerator.wait_for_everyone()

    return BestWeightsFromFolder


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
