"""The real training, which also records the rows of each step, can pause a rank until a stop is requested, and can fail.

Tests select this module with FINETUNE_TRAINER_MODULE. `<work>/rows-<rank>.jsonl` has one line per step, with a hash for each sequence of each
micro-batch.

TRACE_HOLD is `<phase>:<step>`. The rank pauses at this point until all ranks have agreed on the step after which they stop. The file
`<work>/held` shows that the rank is paused. The phases are `forward` (before the first micro-batch of the step), `accumulation` (before the
other micro-batches), `save` (before the checkpoint), `copy` (between two copies of the state to host memory), `write` (after a file of the
checkpoint is written in the background), `evaluation` (in the evaluation after the step) and `end` (after the last step).

TRACE_BREAK simulates a failure. With `memory:<step>`, the step runs out of memory. With `nan:<step>`, the loss of this step is not finite.
With `memory-limit:<step>:<rank>:<rows>`, this rank has memory for at most `rows` rows in a micro-batch, from this step on.
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

HOLD_VARIABLE = "TRACE_HOLD"
BREAK_VARIABLE = "TRACE_BREAK"
preload = train.preload
agreements: list[StopAgreement] = []
"""The stop agreement of this rank. Empty until the agreement has started."""


def main(run: RunConfig, channel: Channel, inputs: Inputs) -> None:
    patch_trainer(channel)
    train.main(run, channel, inputs)


def patch_trainer(channel: Channel) -> None:
    """Wrap methods of the trainer so that they also record rows, pause the rank and simulate failures."""
    from finetune_trainer.checkpoint.background import BackgroundWriter
    from finetune_trainer.engine import GuardedTrainer

    get_batch_samples = GuardedTrainer.get_batch_samples
    defer_file = BackgroundWriter._defer
    micro_batch = saved_step = file_count = 0

    def record_batch_samples(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal micro_batch
        micro_batch = 0
        samples, count = get_batch_samples(self, *args, **options)
        if samples:
            entry = {"step": self.state.global_step + 1, "rows": [hash_rows(batch) for batch in samples]}
            with (channel.work_folder / f"rows-{channel.rank}.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
        return samples, count

    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal micro_batch
        micro_batch += 1
        wait_at_hold_point(channel, "forward" if micro_batch == 1 else "accumulation", self.state.global_step + 1)
        enforce_memory_limit(channel.rank, self.state.global_step + 1, args[1])
        loss = super(GuardedTrainer, self).training_step(*args, **options)
        return apply_failure(loss, self.model, self.state.global_step + 1)

    def prediction_step(self: Any, *args: Any, **options: Any) -> Any:
        wait_at_hold_point(channel, "evaluation", self.state.global_step)
        return super(GuardedTrainer, self).prediction_step(*args, **options)

    def save(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal saved_step, file_count
        saved_step, file_count = self.state.global_step, 0
        wait_at_hold_point(channel, "save", self.state.global_step)
        return super(GuardedTrainer, self)._save_checkpoint(*args, **options)

    def finalize(self: Any, *args: Any, **options: Any) -> Any:
        wait_at_hold_point(channel, "end", self.state.global_step)
        return super(GuardedTrainer, self)._finalize_training(*args, **options)

    def defer(self: BackgroundWriter, save: Any, values: Any, is_collective: bool) -> None:
        nonlocal file_count
        file_count, step = file_count + 1, saved_step
        if file_count > 1:
            wait_at_hold_point(channel, "copy", step)

        def save_and_wait(*args: Any, **options: Any) -> None:
            save(*args, **options)
            wait_at_hold_point(channel, "write", step)

        defer_file(self, save_and_wait, values, is_collective)

    def start(self: StopAgreement, step: int) -> None:
        agreements.append(self)
        start_agreement(self, step)

    start_agreement = StopAgreement.start
    BackgroundWriter._defer = defer  # type: ignore[method-assign]
    StopAgreement.start = start  # type: ignore[method-assign]
    GuardedTrainer.get_batch_samples = record_batch_samples  # type: ignore[method-assign]
    GuardedTrainer.training_step = training_step  # type: ignore[method-assign]
    GuardedTrainer.prediction_step = prediction_step  # type: ignore[method-assign]
    GuardedTrainer._finalize_training = finalize  # type: ignore[method-assign]
    GuardedTrainer._save_checkpoint = save  # type: ignore[method-assign]


def enforce_memory_limit(rank: int, step: int, batch: dict[str, Any]) -> None:
    """Raise torch.OutOfMemoryError, as CUDA does, if TRACE_BREAK limits this rank to fewer rows than the micro-batch has."""
    import torch

    failure, *numbers = os.environ.get(BREAK_VARIABLE, "").split(":")
    if failure != "memory-limit":
        return
    first_limited_step, limited_rank, max_rows = map(int, numbers)
    if rank == limited_rank and step >= first_limited_step and len(batch["input_ids"]) > max_rows:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")


def apply_failure(loss: Any, model: Any, step: int) -> Any:
    """Return the loss. If TRACE_BREAK names this step, raise torch.OutOfMemoryError, or make the gradients and the returned loss NaN."""
    import torch

    failure, _, failing_step = os.environ.get(BREAK_VARIABLE, "").partition(":")
    if failing_step != str(step):
        return loss
    if failure == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB")
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))
    return loss * float("nan")


def hash_rows(batch: dict[str, Any]) -> list[str]:
    """Return a short hash of each sequence without its padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    rows = [row if mask is None else row[mask[number].bool()] for number, row in enumerate(ids)]
    return [hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()[:12] for row in rows]


def wait_at_hold_point(channel: Channel, phase: str, step: int) -> None:
    """If TRACE_HOLD names this phase and step, wait until the ranks have agreed on the step after which they stop."""
    if os.environ.get(HOLD_VARIABLE) != f"{phase}:{step}":
        return
    (channel.work_folder / "held").touch()
    while not any(agreement.stop_step for agreement in agreements):
        time.sleep(0.005)
