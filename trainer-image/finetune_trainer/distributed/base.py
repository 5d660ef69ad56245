"""The strategy: chosen before anything is built, and verified after the model is wrapped.

A library that cannot do what was asked often falls back without an error (FSDP to DDP, two ranks to two single runs). So
the strategy really active is read from the wrapped model, and a difference ends the run.
"""

from __future__ import annotations

import os
from typing import Any

from finetune_api.errors import InternalError
from finetune_api.pod import RunConfig

from finetune_trainer.hardware import Hardware

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Plan:
    """One rank, or plain data parallelism. Other strategies override what differs."""

    name = "single"
    sharded_weights = False
    """Whether a rank holds only a part of the weights."""
    keep_adapter_dtype = False
    """Whether adapters must have the base's number type."""

    def __init__(self, run: RunConfig, hardware: Hardware, world_size: int):
        self.run, self.hardware, self.world_size = run, hardware, world_size
        self.notes: list[str] = []

    @property
    def trainer_bases(self) -> tuple[type, ...]:
        """Classes that the Trainer's class is derived from first."""
        return ()

    def before(self) -> None:
        """Prepare the process, before the first use of accelerate. One rank needs no process group."""
        if self.world_size == 1:
            for name in TORCHRUN:
                os.environ.pop(name, None)

    def arguments(self) -> dict[str, Any]:
        """Fields of TrainingArguments."""
        return {}

    def after_accelerator(self, trainer: Any) -> None:
        """Called when the Trainer has made its accelerator."""

    def verify(self, trainer: Any) -> str:
        """Name of the strategy really active; called when training begins. Errors: InternalError StrategyNotActive."""
        active = active_strategy(trainer)
        if active != self.name:
            raise InternalError(
                "StrategyNotActive", f"{self.name} was asked for over {self.world_size} ranks, but {active} is active",
                hint="this is a fault of the trainer image: report it with its versions",
            )  # fmt: skip
        return active


class Ddp(Plan):
    """Every rank holds the whole model; gradients are averaged."""

    name = "ddp"

    def arguments(self) -> dict[str, Any]:
        """DDP has every parameter in use (frozen ones do not count), so it need not search for unused ones."""
        return {"ddp_find_unused_parameters": False, "ddp_backend": "gloo" if self.hardware.is_cpu else "nccl"}


def connected(kind: type, plan: Plan, **attributes: Any) -> Any:
    """The Trainer class of an objective, connected to a plan."""
    return type(kind.__name__, (*plan.trainer_bases, kind), {"plan": plan, **attributes})


def active_strategy(trainer: Any) -> str:
    """What the wrapped model shows: deepspeed, fsdp, ddp, single, or `apart` (several ranks without any connection)."""
    from torch import distributed
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    wrapped = trainer.model_wrapped
    if trainer.is_deepspeed_enabled and getattr(trainer, "deepspeed", None) is not None:
        return "deepspeed"
    if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        return "fsdp"
    if isinstance(wrapped, DistributedDataParallel):
        return "ddp" if distributed.get_world_size() > 1 else "single"
    ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    return "single" if max(ranks, launched) == 1 else "apart"
