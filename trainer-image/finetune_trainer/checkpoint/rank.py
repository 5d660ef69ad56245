"""The part of checkpoints that lives in a rank: callbacks of the HF Trainer that report, stage and stop.

`callbacks` come last in the Trainer's list. A checkpoint carries the running means of its unfinished logging window
(`window`), so that a resumed run logs what an undisturbed one logs; a window or weights that are not finite end the run
before anything is saved.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from finetune_api.errors import PeerError
from finetune_api.names import Env, Reason
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Metrics, Progress, Stage
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from finetune_trainer.channel import Channel
from finetune_trainer.checkpoint.stop import Alone, Board, Gang, StopAgreement, Stopped
from finetune_trainer.checkpoint.window import Window
from finetune_trainer.disk import free_bytes
from finetune_trainer.inputs import Inputs

INCARNATION = "incarnation"
START_SECONDS = 1800.0
"""Other pods may still download."""
ALIVE_SECONDS = 1.0
"""Evaluation and long steps show that they are alive at most so often."""
DISK_RESERVE = 32 * 1024 * 1024
OPTIMIZER_BYTES = 8
"""Bytes of optimizer state per trained parameter, until the first checkpoint shows its size: Adam's two moments."""


def callbacks(run: RunConfig, channel: Channel, inputs: Inputs) -> list[TrainerCallback]:
    """What the Trainer needs for this run, in this order, after its own callbacks."""
    shared: Board = Gang(run.world.rendezvous_id) if channel.world_size > 1 else Alone()
    agree_on_start(channel, shared, inputs.restore.step if inputs.restore else 0)
    agreement = StopAgreement(channel, shared)
    return [Reporter(channel), Stager(channel, agreement, _incarnation(channel, shared), resume_path(inputs))]


def resume_path(inputs: Inputs) -> Path | None:
    """For `trainer.train(resume_from_checkpoint=...)`."""
    return inputs.restore.path if inputs.restore else None


def finish(run: RunConfig, channel: Channel, model_dir: Path, kind: OutputKind, extra: dict[str, Any]) -> None:
    """The final artefact is complete in `model_dir`: the supervisor uploads and commits it."""
    if channel.rank == 0:
        channel.stage(Stage.UPLOADING)
        channel.finished(model_dir, kind, extra)


def _incarnation(channel: Channel, shared: Board) -> str:
    """The name that rank 0's pod gave this life of the attempt, told to all."""
    own = os.environ.get(Env.INCARNATION, "a1-00000000")
    if channel.rank == 0:
        shared.set(INCARNATION, own)
        return own
    return shared.get_all([INCARNATION], START_SECONDS)[0]


def agree_on_start(channel: Channel, shared: Board, step: int) -> None:
    """Each pod found its checkpoint by itself; all must have found the same one.

    Errors: PeerError `StartsDiffer`, e.g. if a download was damaged on its way to one pod only.
    """
    shared.set(f"start-{channel.rank}", str(step))
    keys = [f"start-{rank}" for rank in range(channel.world_size)]
    steps = sorted({int(value) for value in shared.get_all(keys, START_SECONDS)})
    if len(steps) > 1:
        raise PeerError("StartsDiffer", f"pods found checkpoints of different steps to start from: {steps}")


class Reporter(TrainerCallback):
    """Steps, losses and pace, to the supervisor. Rank 0 of each pod reports; the other ranks only beat."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._speaks = channel.local_rank == 0
        self._alive = 0.0
        self._tokens: list[tuple[float, int]] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._channel.progress(Progress(step=state.global_step, total_steps=state.max_steps, epoch=state.epoch or 0.0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._channel.heartbeat(state.global_step)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._breathe()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._breathe()

    def _breathe(self) -> None:
        now = time.monotonic()
        if now - self._alive > ALIVE_SECONDS:
            self._alive = now
            self._channel.alive()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not self._speaks or not logs:
            return
        self._channel.log(state.global_step, {k: v for k, v in logs.items() if isinstance(v, int | float)})
        seen = int(state.num_input_tokens_seen or 0)
        self._channel.progress(
            Progress(
                step=state.global_step, total_steps=state.max_steps, epoch=round(state.epoch or 0.0, 4),
                tokens_seen=seen or None, tokens_per_second=_finite(logs.get("tokens_per_second"), 1) or self._pace(seen),
            )
        )  # fmt: skip
        self._channel.metrics(
            Metrics(
                train_loss=_finite(logs.get("loss")), learning_rate=_finite(logs.get("learning_rate"), 12),
                grad_norm=_finite(logs.get("grad_norm")),
            )
        )  # fmt: skip

    def _pace(self, seen: int) -> float | None:
        self._tokens = [*self._tokens[-9:], (time.monotonic(), seen)]
        (start, before), (now, after) = self._tokens[0], self._tokens[-1]
        return round((after - before) / (now - start), 1) if now > start and after > before else None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._speaks:
            return
        loss, best, step = eval_loss(state), *best_eval(state)
        self._channel.metrics(Metrics(eval_loss=_finite(loss), best_eval_loss=_finite(best), best_step=step))
        self._channel.stage(Stage.TRAINING)


class Stager(TrainerCallback):
    """Hands checkpoints over when they are complete on disk, and ends the run at the agreed step."""

    def __init__(
        self, channel: Channel, agreement: StopAgreement, incarnation: str, resumed: Path | None = None
    ) -> None:
        self._channel, self._agreement, self._incarnation = channel, agreement, incarnation
        self._resumed = resumed
        self._window: Window | None = None
        self._open_tokens = 0
        """Tokens of the open window, which the Trainer's state counts at its next log line."""
        self._stopping = False
        self._postponed = False
        """A checkpoint is due that waits for what happens at the epoch's end."""
        self._bytes = 0
        """Size of the last checkpoint on this pod's disk."""
        self._began = 0.0

    def on_trainer_created(self, trainer: Any) -> None:
        """Keep access to the Trainer's running sums, which transformers does not pass to callbacks."""
        self._window = Window(trainer, self._channel.rank, self._channel.world_size)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._resumed is not None and self._window is not None:
            self._window.read(self._resumed)
        self._agreement.start(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._agreement.end()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last window is logged however short it is
        if self._agreement.reached(state.global_step):
            self._stopping = True
            control.should_save = True
        if control.should_save and _waits_for_epoch_end(args, state):
            self._postponed, control.should_save = True, False
        self._before_save(args, state, control, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self._postponed:
            self._postponed, control.should_save = False, True
        self._before_save(args, state, control, model)

    def _before_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        if not control.should_save:
            return
        if not self._has_room(args, model):
            control.should_save = False
            self._channel.message(
                "skipped", step=state.global_step, reason=Reason.STAGING_DISK_FULL.value,
                sentence=f"the checkpoint of step {state.global_step} was skipped: the pod's disk is full",
            )  # fmt: skip
            if self._stopping:
                raise Stopped(state.global_step)
            return
        self._began = time.monotonic()
        self._open_tokens = 0
        if self._window is not None:
            tokens = self._window.settle(model, state.global_step)
            self._open_tokens = 0 if control.should_log else tokens  # a line that is logged here counts them

    def _has_room(self, args: TrainingArguments, model: Any) -> bool:
        """Whether every rank's disk can hold another checkpoint: all save, or none does."""
        room = free_bytes(Path(str(args.output_dir)).parent) > (self._bytes or _first_size(model)) + DISK_RESERVE
        if self._channel.world_size == 1:
            return room
        flag = torch.tensor([int(room)], device=args.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        folder = Path(str(args.output_dir)) / f"checkpoint-{step}"
        if self._window is not None:
            self._window.write(folder)
        if self._channel.local_rank == 0:
            self._bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self._channel.staged(
            step, folder, incarnation=self._incarnation, graceful=self._stopping, epoch=state.epoch,
            tokens=int(state.num_input_tokens_seen or 0) + self._open_tokens or None, evalLoss=_finite(eval_loss(state, step)),
            samples=step * args.train_batch_size * args.gradient_accumulation_steps * self._channel.world_size,
            stallSeconds=round(time.monotonic() - self._began, 4),
        )  # fmt: skip
        if self._stopping:
            raise Stopped(step)


def _first_size(model: Any) -> int:
    """What a checkpoint will need, before one was made: trained weights and the optimizer's moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] if model is not None else []
    return sum(one.numel() * (one.element_size() + OPTIMIZER_BYTES) for one in trained)


def _waits_for_epoch_end(args: TrainingArguments, state: TrainerState) -> bool:
    """At an epoch's last step, what is due at its end (evaluation, a log line) comes first: a resumed run would not do it."""
    due = IntervalStrategy.EPOCH in (args.eval_strategy, args.save_strategy, args.logging_strategy)
    return due and state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-9


def eval_loss(state: TrainerState, step: int | None = None) -> float | None:
    """The newest validation loss; with `step`, only one measured there."""
    for entry in reversed(state.log_history):
        if "eval_loss" in entry and step in (None, entry.get("step")):
            return float(entry["eval_loss"])
    return None


def best_eval(state: TrainerState) -> tuple[float | None, int | None]:
    """The lowest validation loss and its step, over the whole run (the history is part of the checkpoint)."""
    found = [(float(entry["eval_loss"]), int(entry["step"])) for entry in state.log_history if "eval_loss" in entry]
    return min((one for one in found if math.isfinite(one[0])), default=(None, None))


def _finite(value: Any, digits: int = 6) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(float(value), digits)
