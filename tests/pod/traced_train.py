"""The real training, with a record of each step's rows and points at which a test may hold it until a stop is requested.

Used through FINETUNE_TRAINER_MODULE. `<work>/rows-<rank>.jsonl` has one line per step, with a hash for each sequence of each
micro-batch. TRACE_HOLD, `<phase>:<step>`, holds this rank there until all ranks have agreed on the step to stop at: `forward`,
`accumulation` (before the second micro-batch of the step), `save`, `evaluation` (after the step), `end` (after the
last step). `<work>/held` then exists.
TRACE_BREAK, `memory:<step>` or `nan:<step>`, lets a micro-batch of that step run out of memory or return a non-finite loss;
`room:<step>:<rank>:<rows>` limits one rank, from that step on, to this many rows per micro-batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any

from finetune_api.pod import RunConfig
from finetune_trainer import train
from finetune_trainer.channel import Channel
from finetune_trainer.checkpoint.stop import StopAgreement
from finetune_trainer.inputs import Inputs

HOLD = "TRACE_HOLD"
BREAK = "TRACE_BREAK"
preload = train.preload
agreements: list[StopAgreement] = []
"""The stop agreement of this rank, once it is started."""


def main(run: RunConfig, channel: Channel, inputs: Inputs) -> None:
    watch(channel)
    train.main(run, channel, inputs)


def watch(channel: Channel) -> None:
    """Replace methods of the trainer by ones that record and hold."""
    from finetune_trainer.engine import GuardedTrainer

    before = GuardedTrainer.get_batch_samples
    micro = 0

    def batches(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal micro
        micro = 0
        found, count = before(self, *args, **options)
        if found:
            entry = {"step": self.state.global_step + 1, "rows": [rows_of(batch) for batch in found]}
            with (channel.work / f"rows-{channel.rank}.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return found, count

    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal micro
        micro += 1
        hold(channel, "forward" if micro == 1 else "accumulation", self.state.global_step + 1)
        require_room(channel.rank, self.state.global_step + 1, args[1])
        loss = super(GuardedTrainer, self).training_step(*args, **options)
        return broken(loss, self.model, self.state.global_step + 1)

    def prediction_step(self: Any, *args: Any, **options: Any) -> Any:
        hold(channel, "evaluation", self.state.global_step)
        return super(GuardedTrainer, self).prediction_step(*args, **options)

    def save(self: Any, *args: Any, **options: Any) -> Any:
        hold(channel, "save", self.state.global_step)
        return super(GuardedTrainer, self)._save_checkpoint(*args, **options)

    def finalize(self: Any, *args: Any, **options: Any) -> Any:
        hold(channel, "end", self.state.global_step)
        return super(GuardedTrainer, self)._finalize_training(*args, **options)

    def start(self: StopAgreement, step: int) -> None:
        agreements.append(self)
        begin(self, step)

    begin = StopAgreement.start
    StopAgreement.start = start  # type: ignore[method-assign] # recorded through it
    GuardedTrainer.get_batch_samples = batches  # type: ignore[method-assign] # likewise
    GuardedTrainer.training_step = training_step  # type: ignore[method-assign] # likewise
    GuardedTrainer.prediction_step = prediction_step  # type: ignore[method-assign] # likewise
    GuardedTrainer._finalize_training = finalize  # type: ignore[method-assign] # likewise
    GuardedTrainer._save_checkpoint = save  # type: ignore[method-assign] # likewise


def require_room(rank: int, step: int, batch: dict[str, Any]) -> None:
    """Errors: torch.OutOfMemoryError, as CUDA raises it, for a micro-batch that is larger than this rank's limit."""
    import torch

    what, *numbers = os.environ.get(BREAK, "").split(":")
    if what != "room":
        return
    first, short, rows = map(int, numbers)
    if rank == short and step >= first and len(batch["input_ids"]) > rows:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")


def broken(loss: Any, model: Any, step: int) -> Any:
    """The loss, or the failure that TRACE_BREAK asks for at this step."""
    import torch

    what, _, when = os.environ.get(BREAK, "").partition(":")
    if when != str(step):
        return loss
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))
    return loss * float("nan")


def rows_of(batch: dict[str, Any]) -> list[str]:
    """A short hash of each sequence without its padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    rows = [row if mask is None else row[mask[number].bool()] for number, row in enumerate(ids)]
    return [hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()[:12] for row in rows]


def hold(channel: Channel, phase: str, step: int) -> None:
    """Wait until the gang has agreed on the step to stop at, if TRACE_HOLD names this point."""
    if os.environ.get(HOLD) != f"{phase}:{step}":
        return
    (channel.work / "held").touch()
    while not any(one.stop for one in agreements):
        time.sleep(0.005)
