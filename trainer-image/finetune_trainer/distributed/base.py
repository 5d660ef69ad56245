"""The interface of a distributed strategy. A strategy is chosen before the model is loaded, and verified after the model is wrapped.

Libraries often fall back to another strategy without an error: FSDP to DDP, or two ranks to two independent runs. `verify_active`
therefore detects the active strategy from the wrapped model, and ends the run if the active strategy is not the chosen one.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from finetune_api.errors import InternalError
from finetune_api.pod import RunConfig

from finetune_trainer.hardware import Hardware

TORCHRUN_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Environment variables that make accelerate create a process group."""


class DistributedStrategy:
    """How a rank trains together with the other ranks. The base class is for a single rank without a process group."""

    name = "single"
    shards_weights = False
    """Whether a rank holds only a part of each weight."""
    keeps_base_dtype = False
    """Whether adapters must have the dtype of the base model."""
    uses_autocast = True
    """Whether 16-bit training runs the forward pass under torch's autocast."""

    def __init__(self, run: RunConfig, hardware: Hardware, world_size: int):
        self.run, self.hardware, self.world_size = run, hardware, world_size
        self.context_parallel_size = run.spec.distributed.context_parallel_size or 1
        """Number of ranks that share each sequence."""
        self.data_parallel_size = world_size // self.context_parallel_size
        """Number of ranks that train on different rows. With context parallelism, all ranks of a group have the same rows, so this property is the
        number of groups."""
        self.gradient_factor = 1
        """Factor by which the gradients, after the ranks have combined them, are larger than the mean over all ranks."""
        self.notes: list[str] = []
        """Sentences for the status."""

    @property
    def trainer_mixins(self) -> tuple[type, ...]:
        """The mixins for the Trainer class. Methods of a mixin override methods of the objective's class."""
        return ()

    def prepare_process(self) -> None:
        """Prepare the process before accelerate is first used.

        For a single rank, remove the environment variables that make accelerate create a process group.
        """
        if self.world_size == 1:
            for name in TORCHRUN_VARIABLES:
                os.environ.pop(name, None)

    def training_arguments(self) -> dict[str, Any]:
        """Return the strategy's fields of TrainingArguments."""
        return {}

    def on_accelerator_created(self, trainer: Any) -> None:
        """Change the Trainer's accelerator. The Trainer calls this method as soon as it has created the accelerator."""

    def verify_active(self, trainer: Any) -> str:
        """Check that this strategy is active, and return its name. This method is called when training begins. Errors: InternalError StrategyNotActive."""
        active_strategy = detect_strategy(trainer)
        if active_strategy != self.name:
            raise InternalError(
                "StrategyNotActive", f"{self.name} was requested over {self.world_size} ranks, but {active_strategy} is active",
                hint="this is a bug of the trainer image: report it with the versions of its packages",
            )  # fmt: skip
        return active_strategy


class Ddp(DistributedStrategy):
    """Every rank holds a complete copy of the model; gradients are averaged."""

    name = "ddp"

    def training_arguments(self) -> dict[str, Any]:
        """Return DDP's fields of TrainingArguments. DDP need not search for unused parameters, because each step uses every trained parameter."""
        return {"ddp_find_unused_parameters": False, "ddp_backend": "gloo" if self.hardware.is_cpu else "nccl"}


def set_single_rank_variables() -> None:
    """Set torchrun's environment variables for a single rank, so that accelerate and DeepSpeed create a process group for it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    rank_variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= rank_variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def connect_trainer_class(trainer_class: type, strategy: DistributedStrategy, **attributes: Any) -> Any:
    """Return a subclass of `trainer_class` with the mixins of the strategy. `attributes`: further class attributes."""
    return type(trainer_class.__name__, (*strategy.trainer_mixins, trainer_class), {"strategy": strategy, **attributes})


def detect_strategy(trainer: Any) -> str:
    """Return the strategy of the wrapped model: deepspeed, fsdp, ddp, single, or `independent` (several ranks without a process group)."""
    from torch import distributed
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    wrapped_model = trainer.model_wrapped
    if trainer.is_deepspeed_enabled and getattr(trainer, "deepspeed", None) is not None:
        return "deepspeed"
    if any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()):
        return "fsdp"
    if isinstance(wrapped_model, DistributedDataParallel):
        return "ddp" if distributed.get_world_size() > 1 else "single"
    connected_rank_count = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    launched_rank_count = int(os.environ.get("WORLD_SIZE", "1"))
    return "single" if max(connected_rank_count, launched_rank_count) == 1 else "independent"
