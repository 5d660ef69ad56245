"""Which strategy a run has: from the spec, and from how many ranks there are."""

from __future__ import annotations

from finetune_api.pod import RunConfig
from finetune_api.spec.enums import FsdpSharding, Strategy

from finetune_trainer.distributed.base import Ddp, Plan
from finetune_trainer.hardware import Hardware
from finetune_trainer.inputs import Inputs


def choose(run: RunConfig, hardware: Hardware, inputs: Inputs, world_size: int) -> Plan:
    """The plan for a run. Errors: ConfigError for what cannot be combined, or where a file and the spec disagree."""
    strategy = run.spec.distributed.strategy or (Strategy.DDP if world_size > 1 else Strategy.NONE)
    match strategy:
        case Strategy.FSDP:
            return _fsdp(run, hardware, inputs, world_size)
        case Strategy.DEEPSPEED:
            from finetune_trainer.distributed import deepspeed

            return deepspeed.Deepspeed(run, hardware, world_size, deepspeed.options(run, inputs, hardware, world_size))
        case _:
            return (Ddp if world_size > 1 else Plan)(run, hardware, world_size)


def _fsdp(run: RunConfig, hardware: Hardware, inputs: Inputs, world_size: int) -> Plan:
    """FSDP, or DDP where nothing is to be sharded: version 2 has no unsharded mode, and DDP is what that mode was."""
    from finetune_trainer.distributed import fsdp

    chosen = fsdp.options(run, inputs, hardware, world_size)
    if chosen.sharding is not FsdpSharding.NO_SHARD:
        return fsdp.Fsdp(run, hardware, world_size, chosen)
    plan = Ddp(run, hardware, world_size)
    plan.notes += [
        *chosen.notes,
        "fsdp with noShard keeps everything whole on every rank: that is ddp, and runs as such",
    ]
    return plan
