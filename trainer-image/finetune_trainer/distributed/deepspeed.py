"""DeepSpeed ZeRO: stage 1 shards the optimizer, 2 gradients too, 3 parameters too; 0 is plain data parallelism.

The configuration is made from one source. A user's JSON keeps every option of DeepSpeed's own; where it speaks of something the
spec also says (batch, clipping, rate, precision, stage, offload), both must agree, or the JSON says `auto`. Optimizer and scheduler
sections are read and run by torch: DeepSpeed's own ones are compiled on first use, which a pod cannot do.
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
from finetune_api.rules import refuse, unfit_for_deepspeed, unfit_for_zero3
from finetune_api.spec.enums import Scheduler

from finetune_trainer.distributed.base import Plan
from finetune_trainer.distributed.userfile import AUTO, Comparison, read
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs

FILE = "distributed.deepspeed.configRef"
DEFAULT_STAGE = 2
FILLED_LATER = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
"""Keys of zero_optimization whose `auto` transformers fills in from the model's size."""
REFUSED = {
    "tensor_parallel": "tensor parallelism is not offered here", "sequence_parallel_size": "sequence parallelism is not offered here",
    "elasticity": "the operator decides on the number of ranks", "pipeline": "pipeline parallelism is not offered here",
    "curriculum_learning": "the order of the rows is not DeepSpeed's to choose here",
    "data_efficiency": "the order of the rows is not DeepSpeed's to choose here",
    "activation_checkpointing": "recomputation is asked for by training.gradientCheckpointing",
}  # fmt: skip
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

    Errors: ConfigError ConfigsDisagree (with all conflicts), ConfigFileInvalid, OffloadNeedsStage3; NotFoundError ConfigMapMissing.
    """
    spec = run.spec.distributed.deepspeed
    given = read(spec.config_ref, inputs.config_maps, FILE) if spec and spec.config_ref else {}
    config, both = copy.deepcopy(given), Comparison(run)
    _refuse(config)
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


def _refuse(config: dict[str, Any]) -> None:
    found = [f"{key} ({reason})" for key, reason in REFUSED.items() if key in config]
    if found:
        raise ConfigError("ConfigFileInvalid", f"{FILE}: {'; '.join(found)}", hint="remove it")


def _batches(config: dict[str, Any], both: Comparison, run: RunConfig, result: Options, world_size: int) -> None:
    training = run.spec.training
    micro = both.same(
        "train_micro_batch_size_per_gpu",
        config.get("train_micro_batch_size_per_gpu"),
        "training.batchSizePerDevice",
        training.batch_size_per_device,
    )
    steps = both.same(
        "gradient_accumulation_steps",
        config.get("gradient_accumulation_steps"),
        "training.gradientAccumulationSteps",
        training.gradient_accumulation_steps,
    )
    clip = both.same(
        "gradient_clipping", config.get("gradient_clipping"), "training.maxGradNorm", training.max_grad_norm
    )
    whole = micro * steps * world_size
    both.must("train_batch_size", config.get("train_batch_size"), "micro-batch x accumulation x ranks", whole)
    config |= {
        "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps, "train_batch_size": whole,
        "gradient_clipping": clip,
    }  # fmt: skip
    result.training |= {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": steps,
        "max_grad_norm": clip,
    }


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
    kind, given, training = str(section.get("type")), dict(section.get("params") or {}), run.spec.training
    adamw = given.pop("adam_w_mode", True) is True and kind.lower() in ("adam", "adamw")
    given.pop("torch_adam", None)
    if not adamw:
        raise ConfigError(
            "ConfigFileInvalid", f"{FILE}: optimizer {kind} is compiled by DeepSpeed on first use, which a pod cannot do",
            hint="write AdamW, or remove the section and name training.optimizer",
        )  # fmt: skip
    name = both.same("optimizer.type", "adamw_torch_fused", "training.optimizer", training.optimizer)
    betas = given.pop("betas", AUTO)
    first, second = (AUTO, AUTO) if betas == AUTO else betas
    result.training |= {
        "optim": name,
        "adam_beta1": both.same("optimizer.params.betas[0]", first, "training.adamBeta1", training.adam_beta1),
        "adam_beta2": both.same("optimizer.params.betas[1]", second, "training.adamBeta2", training.adam_beta2),
        "learning_rate": both.same("optimizer.params.lr", given.pop("lr", None), "training.learningRate", training.learning_rate),
        "adam_epsilon": both.same("optimizer.params.eps", given.pop("eps", None), "training.adamEpsilon", training.adam_epsilon),
        "weight_decay": both.same("optimizer.params.weight_decay", given.pop("weight_decay", None), "training.weightDecay", training.weight_decay),
    }  # fmt: skip
    if given:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE}: optimizer.params {', '.join(sorted(given))} would have no effect",
            hint="remove it",
        )
    both.notes.append(f"optimizer {kind} of the DeepSpeed JSON runs as torch's fused AdamW")


def _scheduler(config: dict[str, Any], both: Comparison, run: RunConfig, result: Options) -> None:
    """Warm-up schedules of the JSON are run by transformers."""
    section = config.pop("scheduler", None)
    if section is None:
        return
    kind, given, training = str(section.get("type")), dict(section.get("params") or {}), run.spec.training
    if kind not in SCHEDULERS:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE}: scheduler {kind} is not offered here",
            hint=f"write one of {', '.join(SCHEDULERS)}, or training.scheduler",
        )
    from finetune_trainer.schedules import SCHEDULERS as NAMES

    scheduler = both.same("scheduler.type", SCHEDULERS[kind], "training.scheduler", training.scheduler)
    result.training["lr_scheduler_type"] = NAMES[scheduler]
    steps = given.pop("warmup_num_steps", None)
    if steps not in (None, AUTO):
        if training.warmup_ratio and "training.warmupRatio" not in run.defaults:
            both.conflicts.append(
                f"scheduler.params.warmup_num_steps is {steps}, training.warmupRatio is {training.warmup_ratio:g}"
            )
        result.training["warmup_steps"] = both.same(
            "scheduler.params.warmup_num_steps", steps, "training.warmupSteps", training.warmup_steps
        )
    rate = both.undone(
        "training.learningRate", training.learning_rate, result.training.get("learning_rate", training.learning_rate)
    )
    both.must("scheduler.params.warmup_max_lr", given.pop("warmup_max_lr", None), "training.learningRate", rate)
    both.must(
        "scheduler.params.warmup_min_lr", given.pop("warmup_min_lr", None), "the rate that warm-up begins with", 0
    )
    both.must(
        "scheduler.params.total_num_steps", given.pop("total_num_steps", None), "training.maxSteps", training.max_steps
    )
    both.must("scheduler.params.warmup_type", given.pop("warmup_type", None), "the course of the warm-up", "linear")
    if given:
        raise ConfigError(
            "ConfigFileInvalid",
            f"{FILE}: scheduler.params {', '.join(sorted(given))} would have no effect",
            hint="remove it",
        )
    both.notes.append(f"scheduler {kind} of the DeepSpeed JSON runs as {scheduler}")


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
    for key, path, asked in (
        ("offload_optimizer", "offloadOptimizer", spec.offload_optimizer if spec else None),
        ("offload_param", "offloadParameters", spec.offload_parameters if spec else None),
    ):
        section = zero.get(key) or {}
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
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


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


class Deepspeed(Plan):
    """DeepSpeed's engine around the model."""

    name = "deepspeed"

    def __init__(self, run: RunConfig, hardware: Hardware, world_size: int, chosen: Options):
        super().__init__(run, hardware, world_size)
        self.chosen = chosen
        self.sharded_weights = self.keep_adapter_dtype = chosen.stage == 3
        self.notes += [*chosen.notes, f"DeepSpeed ZeRO stage {chosen.stage}"]
        refuse("StrategyAndMethod", unfit_for_deepspeed(run.spec))
        if chosen.stage == 3:
            refuse("StrategyAndMethod", unfit_for_zero3(run.spec))

    @property
    def trainer_bases(self) -> tuple[type, ...]:
        """Loading of the best weights at the end."""
        return (_best_of_slices(),)

    def before(self) -> None:
        """DeepSpeed wants a process group even for one rank. On CPU nobody else makes it before the model is loaded."""
        import deepspeed
        import torch

        if self.world_size == 1:
            alone = {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()),
            }
            os.environ |= alone
        if self.hardware.cpu:
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


def _best_of_slices() -> type:
    """The mix-in; made here so that this module loads without torch."""
    from transformers import Trainer

    from finetune_trainer.best import best_folder
    from finetune_trainer.distributed.weights import load_gathered

    class BestOfSlices(Trainer):  # type: ignore[misc]  # transformers ships no types
        """The best weights come from the plain folder; the engine's own checkpoint of that step may be gone."""

        def _load_best_model(self) -> None:
            reader = self.accelerator.is_main_process
            load_gathered(self.model, best_folder(self) if reader else Path(), reader)
            self.accelerator.wait_for_everyone()

    return BestOfSlices


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
