"""Chooses a run's strategy from the spec and the number of ranks."""

from __future__ import annotations

from finetune_api.pod import RunConfig
from finetune_api.spec.enums import FsdpSharding, StrategyType

from finetune_trainer.distributed.base import Ddp, DistributedStrategy
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs


def choose_strategy(run: RunConfig, hardware: Hardware, inputs: Inputs, world_size: int) -> DistributedStrategy:
    """Choose the strategy of a run. Errors: ConfigError if the settings cannot be combined, or if a configuration file contradicts the spec."""
    strategy_type = run.spec.distributed.strategy or (StrategyType.DDP if world_size > 1 else StrategyType.NONE)
    match strategy_type:
        case StrategyType.FSDP:
            return _choose_fsdp_or_ddp(run, hardware, inputs, world_size)
        case StrategyType.DEEPSPEED:
            from finetune_trainer.distributed import deepspeed

            return deepspeed.Deepspeed(run, hardware, world_size, deepspeed.build_options(run, inputs, hardware, world_size))
        case _:
            return (Ddp if world_size > 1 else DistributedStrategy)(run, hardware, world_size)


def _choose_fsdp_or_ddp(run: RunConfig, hardware: Hardware, inputs: Inputs, world_size: int) -> DistributedStrategy:
    """Return FSDP, or DDP for `sharding: noShard`. FSDP version 2 does not have the mode `noShard`, which did the same as DDP in version 1."""
    from finetune_trainer.distributed import fsdp

    options = fsdp.build_options(run, inputs, hardware, world_size)
    if options.sharding is not FsdpSharding.NO_SHARD:
        return fsdp.Fsdp(run, hardware, world_size, options)
    strategy = Ddp(run, hardware, world_size)
    strategy.notes += [
        *options.notes,
        "fsdp with sharding noShard keeps all weights on every rank, as ddp does, so the run uses ddp",
    ]
    return strategy
