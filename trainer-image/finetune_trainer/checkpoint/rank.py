"""The callbacks of the HF Trainer in each rank. The callbacks report progress, stage checkpoints and stop the run at the step on which all ranks agreed.

The Trainer must call these callbacks after all other callbacks. A checkpoint includes the sums of the current logging window (`window`),
so that a resumed run logs the same values as an uninterrupted run. If a loss or weight is not finite, the run ends before the
checkpoint is saved.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from finetune_api.errors import PeerError
from finetune_api.names import Env, Reason
from finetune_api.pod import RunConfig
from finetune_api.spec.enums import OutputKind
from finetune_api.status import Metrics, Progress, Stage
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from finetune_trainer.channel import Channel
from finetune_trainer.checkpoint import space
from finetune_trainer.checkpoint.background import BackgroundWriter
from finetune_trainer.checkpoint.stop import GangStore, SingleRankStore, StopAgreement, TcpGangStore, TrainingStopped
from finetune_trainer.checkpoint.window import LoggingWindow
from finetune_trainer.inputs import Inputs

INCARNATION_KEY = "incarnation"
START_TIMEOUT_SECONDS = 1800.0
"""Longest time that a rank waits for pods that are still downloading their inputs."""
MIN_HEARTBEAT_SECONDS = 1.0
"""Minimum time between two heartbeats during a step or an evaluation."""
GIGABYTE = 1e9
SLOW_DISK_NOTE = "checkpoints are due faster than the pod writes them to its disk: training waits for each of them"


def create_callbacks(run: RunConfig, channel: Channel, inputs: Inputs) -> list[TrainerCallback]:
    """Return the callbacks for this run. The Trainer must call them after all other callbacks, in this order."""
    gang_store: GangStore = TcpGangStore(run.world.rendezvous_id) if channel.world_size > 1 else SingleRankStore()
    require_same_start(channel, gang_store, inputs.restore.step if inputs.restore else 0)
    agreement = StopAgreement(channel, gang_store)
    stager = CheckpointStager(
        channel, agreement, _agree_on_incarnation(channel, gang_store), get_resume_folder(inputs),
        ranks_per_sequence=run.spec.distributed.context_parallel_size or 1,
    )  # fmt: skip
    return [ProgressReporter(channel), stager, PauseReporter(channel, stager)]


def get_resume_folder(inputs: Inputs) -> Path | None:
    """Return the folder for `trainer.train(resume_from_checkpoint=...)`, or None to start at step 0."""
    return inputs.restore.path if inputs.restore else None


def report_final_artefact(run: RunConfig, channel: Channel, model_folder: Path, output_kind: OutputKind, manifest_extra: dict[str, Any]) -> None:
    """Report to the supervisor that the final artefact is complete, so that the supervisor uploads and commits it. Only rank 0 reports."""
    if channel.rank == 0:
        channel.report_stage(Stage.UPLOADING)
        channel.report_output(model_folder, output_kind, manifest_extra)


def _agree_on_incarnation(channel: Channel, gang_store: GangStore) -> str:
    """Return the name of this incarnation. All ranks use the incarnation name of rank 0's pod."""
    own_incarnation = os.environ.get(Env.INCARNATION_FOLDER, "a1-00000000")
    if channel.rank == 0:
        gang_store.set(INCARNATION_KEY, own_incarnation)
        return own_incarnation
    return gang_store.get_all([INCARNATION_KEY], START_TIMEOUT_SECONDS)[0]


def require_same_start(channel: Channel, gang_store: GangStore, step: int) -> None:
    """Check that all ranks start from the same step. The check is needed because each pod restores a checkpoint by itself.

    Errors: PeerError `StartsDiffer`, for example if one pod restored an older checkpoint because its download was damaged.
    """
    gang_store.set(f"start-{channel.rank}", str(step))
    keys = [f"start-{rank}" for rank in range(channel.world_size)]
    steps = sorted({int(value) for value in gang_store.get_all(keys, START_TIMEOUT_SECONDS)})
    if len(steps) > 1:
        raise PeerError("StartsDiffer", f"the pods restored checkpoints of different steps: {steps}")


class ProgressReporter(TrainerCallback):
    """Reports the progress of a rank to the supervisor. Every rank reports its steps; only local rank 0 reports losses and throughput."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._is_reporting = channel.local_rank == 0
        self._last_heartbeat_time = 0.0
        self._token_counts: list[tuple[float, int]] = []
        """The monotonic time and the number of tokens so far, at the last ten log lines."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._channel.report_progress(Progress(step=state.global_step, total_steps=state.max_steps, epoch=state.epoch or 0.0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._channel.report_step(state.global_step)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._send_heartbeat()

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        now = time.monotonic()
        if now - self._last_heartbeat_time > MIN_HEARTBEAT_SECONDS:
            self._last_heartbeat_time = now
            self._channel.send_heartbeat()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if not self._is_reporting or not logs:
            return
        self._channel.report_log_line(state.global_step, {k: v for k, v in logs.items() if isinstance(v, int | float)})
        token_count = int(state.num_input_tokens_seen or 0)
        self._channel.report_progress(
            Progress(
                step=state.global_step, total_steps=state.max_steps, epoch=round(state.epoch or 0.0, 4),
                tokens_seen=token_count or None,
                tokens_per_second=_round_or_none(logs.get("tokens_per_second"), 1) or self._compute_recent_throughput(token_count),
            )
        )  # fmt: skip
        self._channel.report_metrics(
            Metrics(
                train_loss=_round_or_none(logs.get("loss")), learning_rate=_round_or_none(logs.get("learning_rate"), 12),
                grad_norm=_round_or_none(logs.get("grad_norm")),
            )
        )  # fmt: skip

    def _compute_recent_throughput(self, token_count: int) -> float | None:
        """Return the tokens per second over the last ten log lines, or None before the second log line."""
        self._token_counts = [*self._token_counts[-9:], (time.monotonic(), token_count)]
        (start_time, tokens_before), (end_time, tokens_after) = self._token_counts[0], self._token_counts[-1]
        return round((tokens_after - tokens_before) / (end_time - start_time), 1) if end_time > start_time and tokens_after > tokens_before else None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self._is_reporting:
            return
        loss, best_loss, best_step = find_eval_loss(state), *find_best_eval_loss(state)
        self._channel.report_metrics(Metrics(eval_loss=_round_or_none(loss), best_eval_loss=_round_or_none(best_loss), best_step=best_step))
        self._channel.report_stage(Stage.TRAINING)


class CheckpointStager(TrainerCallback):
    """Reports each checkpoint that is complete on the pod's disk, and ends the run at the agreed step."""

    def __init__(
        self, channel: Channel, stop_agreement: StopAgreement, incarnation: str, resumed_checkpoint: Path | None = None, *, ranks_per_sequence: int = 1
    ) -> None:
        """`ranks_per_sequence`: number of ranks that share each sequence."""
        self._parallel_batch_count = channel.world_size // ranks_per_sequence
        """Number of micro-batches that the ranks process at the same time."""
        self._channel, self._stop_agreement, self._incarnation = channel, stop_agreement, incarnation
        self._resumed_checkpoint = resumed_checkpoint
        self._window: LoggingWindow | None = None
        self._trainer: Any = None
        self._writer = BackgroundWriter()
        self._memory_suffices: bool | None = None
        """Whether host memory can hold a copy of the training state. None before the first checkpoint."""
        self._unlogged_token_count = 0
        """Tokens of the current logging window. The Trainer does not add them to its state before the next log line."""
        self._is_stopping = False
        self._is_save_postponed = False
        """Whether a due checkpoint waits for the evaluation or log line at the end of the epoch."""
        self._last_size_bytes = 0
        """Size in bytes of the last checkpoint on this pod's disk; 0 before the first checkpoint."""
        self._save_start_time = 0.0
        self.wait_seconds = 0.0
        """Seconds for which the last due checkpoint waited because the previous checkpoint was still being written."""

    def on_trainer_created(self, trainer: Any) -> None:
        """Keep a reference to the Trainer, because transformers does not pass the running sums to callbacks. Give the Trainer the writer of checkpoints."""
        self._trainer, trainer.checkpoint_writer = trainer, self._writer
        self._window = LoggingWindow(trainer, self._channel.rank, self._channel.world_size)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._resumed_checkpoint is not None and self._window is not None:
            self._window.read(self._resumed_checkpoint)
        self._stop_agreement.start(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop_agreement.stop_watching()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._writer.raise_failure()
        if state.global_step >= state.max_steps:
            control.should_log = True  # Log the last window even if it has fewer steps than the other windows.
        if self._stop_agreement.must_stop(state.global_step):
            self._is_stopping = True
            control.should_save = True
        if control.should_save and _waits_for_epoch_end(args, state):
            self._is_save_postponed, control.should_save = True, False
        self._prepare_save(args, state, control, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        if self._is_save_postponed:
            self._is_save_postponed, control.should_save = False, True
        self._prepare_save(args, state, control, model)

    def _prepare_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any) -> None:
        if not control.should_save:
            return
        self._save_start_time = time.monotonic()
        self._wait_for_last_checkpoint()
        self.wait_seconds = time.monotonic() - self._save_start_time
        if not space.has_disk_space(args, self._channel.world_size, self._last_size_bytes, model):
            control.should_save = False
            self._channel.send_message(
                "skipped", step=state.global_step, reason=Reason.STAGING_DISK_FULL.value,
                sentence=f"the checkpoint of step {state.global_step} was skipped: the pod's disk is full",
            )  # fmt: skip
            if self._is_stopping:
                raise TrainingStopped(state.global_step)
            return
        self._unlogged_token_count = 0
        if self._window is not None:
            tokens = self._window.require_finite(model, state.global_step)
            self._unlogged_token_count = 0 if control.should_log else tokens  # the log line at this step adds the tokens to the state
        is_last = self._is_stopping or state.global_step >= state.max_steps
        self._writer.writes_in_background = not is_last and self._copies_fit_in_memory()  # After the last step, there is no training to continue.
        if is_last:
            self._writer.release_copies()

    def _wait_for_last_checkpoint(self) -> None:
        if self._writer.is_busy and self._channel.rank == 0:
            self._channel.report_note(SLOW_DISK_NOTE)
        self._writer.wait()

    def _copies_fit_in_memory(self) -> bool:
        """Whether host memory can hold the copies of the training state.

        This is decided once, at the first checkpoint, because later checkpoints reuse the memory of the first copies.
        """
        if self._trainer is None:
            return False
        if self._memory_suffices is None:
            copy_space = space.measure_copy_space(self._trainer, self._channel.world_size)
            self._memory_suffices = copy_space.fits
            if not copy_space.fits and self._channel.rank == 0:
                self._channel.report_note(
                    "training waits until each checkpoint is written to the disk: a copy of the training state needs "
                    f"{copy_space.needed_bytes / GIGABYTE:.1f} GB of the pod's memory, and {copy_space.available_bytes / GIGABYTE:.1f} GB are available; "
                    "raise resources.memory for checkpoints in the background"
                )
        return self._memory_suffices

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        folder = Path(str(args.output_dir)) / f"checkpoint-{step}"
        if self._window is not None:
            self._window.write(folder)
        checkpoint_facts: dict[str, Any] = {
            "incarnation": self._incarnation, "graceful": self._is_stopping, "epoch": state.epoch,
            "tokens": int(state.num_input_tokens_seen or 0) + self._unlogged_token_count or None, "evalLoss": _round_or_none(find_eval_loss(state, step)),
            "samples": step * args.train_batch_size * args.gradient_accumulation_steps * self._parallel_batch_count,
            "stallSeconds": round(time.monotonic() - self._save_start_time, 4),
        }  # fmt: skip
        self._writer.run_after_files(lambda: self._report_files(step, folder, checkpoint_facts))
        self._writer.finish_checkpoint()
        if self._is_stopping:
            raise TrainingStopped(step)

    def _report_files(self, step: int, folder: Path, checkpoint_facts: dict[str, Any]) -> None:
        """Report that the files of this rank are complete. If the background thread wrote the files, the thread also calls this method."""
        if self._channel.local_rank == 0:
            self._last_size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self._channel.report_staged_files(step, folder, **checkpoint_facts)


class PauseReporter(TrainerCallback):
    """Reports for how long training waited for evaluations and checkpoints. The Trainer must call this callback after `CheckpointStager`."""

    def __init__(self, channel: Channel, stager: CheckpointStager) -> None:
        self._channel, self._stager = channel, stager
        self._last_event_time = time.monotonic()
        """Monotonic time of the end of the last step, epoch, evaluation or checkpoint."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last_event_time = time.monotonic()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last_event_time = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report("evaluation", 0.0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report("saving", self._stager.wait_seconds)
        self._stager.wait_seconds = 0.0

    def _report(self, pause_name: str, earlier_seconds: float) -> None:
        """Report a pause that ends now. `earlier_seconds`: duration of the part of the pause before `_last_event_time`."""
        now = time.monotonic()
        if self._channel.local_rank == 0:
            self._channel.report_pause(pause_name, now - self._last_event_time + earlier_seconds)
        self._last_event_time = now


def _waits_for_epoch_end(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether this save must wait for the evaluation or log line at the end of the epoch, so that a resumed run skips neither."""
    has_epoch_action = IntervalStrategy.EPOCH in (args.eval_strategy, args.save_strategy, args.logging_strategy)
    return has_epoch_action and state.epoch is not None and abs(state.epoch - round(state.epoch)) < 1e-9


def find_eval_loss(state: TrainerState, step: int | None = None) -> float | None:
    """Return the newest validation loss. If `step` is given, return the loss measured at this step, or None."""
    for entry in reversed(state.log_history):
        if "eval_loss" in entry and step in (None, entry.get("step")):
            return float(entry["eval_loss"])
    return None


def find_best_eval_loss(state: TrainerState) -> tuple[float | None, int | None]:
    """Return the lowest validation loss of the run and its step. The log history includes earlier attempts, because checkpoints contain it."""
    losses_and_steps = [(float(entry["eval_loss"]), int(entry["step"])) for entry in state.log_history if "eval_loss" in entry]
    return min(((loss, step) for loss, step in losses_and_steps if math.isfinite(loss)), default=(None, None))


def _round_or_none(value: Any, digits: int = 6) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(float(value), digits)
