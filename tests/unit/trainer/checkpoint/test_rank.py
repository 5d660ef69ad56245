"""The callbacks of a rank: they save, skip and report checkpoints, report log lines, and stop the run."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from finetune_api.errors import DivergedError  # noqa: E402 - likewise
from finetune_trainer.channel import STOP_FILE, Channel  # noqa: E402 - torch first: without it there is nothing to test
from finetune_trainer.checkpoint import rank as subject  # noqa: E402 - likewise
from finetune_trainer.checkpoint import space  # noqa: E402 - likewise
from finetune_trainer.checkpoint.stop import SingleRankStore, StopAgreement, TrainingStopped  # noqa: E402 - likewise
from transformers import TrainerControl, TrainerState, TrainingArguments  # noqa: E402 - likewise


class FakeTrainingLoop:
    """A loop that trains nothing, but calls the callbacks in the order of the Trainer."""

    def __init__(self, folder: Path, *, steps_per_epoch: int = 10, **arguments: Any) -> None:
        (folder / "work").mkdir()
        self.channel = Channel.create_recording(folder / "work")
        self.agreement = StopAgreement(self.channel, SingleRankStore(), poll_seconds=0.001)
        self.stager = subject.CheckpointStager(self.channel, self.agreement, "a1-00000000")
        self.reporter = subject.ProgressReporter(self.channel)
        defaults = {
            "logging_steps": 100,
            "save_strategy": "steps",
            "save_steps": 100,
            "eval_strategy": "no",
            "report_to": [],
        }
        self.args = TrainingArguments(output_dir=str(folder / "work/output"), use_cpu=True, **(defaults | arguments))
        Path(self.args.output_dir).mkdir()
        self.state, self.control = TrainerState(max_steps=1000), TrainerControl()
        self.state.train_batch_size = 1
        self.steps_per_epoch = steps_per_epoch
        self.model = torch.nn.Linear(2, 2)
        self.logged_steps: list[int] = []
        self.saved_steps: list[int] = []
        self.waits_for_writer = True
        """Whether each step waits until the checkpoint in the background is complete."""
        self.agreement.start(0)

    def request_stop(self) -> None:
        (self.channel.work_folder / STOP_FILE).write_text("")
        self.agreement._thread.join(10)

    def step(self, *, save: bool = False, log: bool = False) -> None:
        """Run one optimizer step. `save`, `log`: whether the Trainer's own settings request a checkpoint or a log line at this step."""
        self.control = TrainerControl(should_save=save, should_log=log)
        self.state.global_step += 1
        self.state.epoch = self.state.global_step / self.steps_per_epoch
        for callback in (self.reporter, self.stager):
            callback.on_step_end(self.args, self.state, self.control, model=self.model)
        self._log_and_save()

    def end_epoch(self) -> None:
        self.control = TrainerControl()
        self.stager.on_epoch_end(self.args, self.state, self.control, model=self.model)
        self._log_and_save()

    def _log_and_save(self) -> None:
        if self.control.should_log:
            self.logged_steps.append(self.state.global_step)
        if self.control.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            with self.stager._writer.begin_checkpoint():
                folder.mkdir()
                (folder / "optimizer.pt").write_bytes(b"x" * 100)
            self.saved_steps.append(self.state.global_step)
            self.stager.on_save(self.args, self.state, self.control)
            if self.waits_for_writer:
                self.stager._writer.wait()

    def list_sent(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.channel.sent if message["kind"] == kind]


def make_fake_trainer(run: FakeTrainingLoop, loss: Any, sums: dict[str, Any], *, last_logged_step: int = 0) -> Any:
    """An object with the attributes of the Trainer that the callbacks use."""
    optimizer = torch.optim.SGD(run.model.parameters())
    return SimpleNamespace(
        args=run.args, model=run.model, optimizer=optimizer, is_fsdp_enabled=False, is_deepspeed_enabled=False,
        _globalstep_last_logged=last_logged_step, _tr_loss=loss, _sums={"train": sums},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> FakeTrainingLoop:
    return FakeTrainingLoop(tmp_path)


def test_a_checkpoint_is_reported_and_adds_no_log_line(run: FakeTrainingLoop) -> None:
    run.step()
    run.step(save=True)
    run.step()
    assert run.logged_steps == [] and run.saved_steps == [2]
    (message,) = run.list_sent("staged")
    assert (message["step"], message["graceful"], message["incarnation"]) == (2, False, "a1-00000000")
    assert message["folder"] == str(Path(run.args.output_dir) / "checkpoint-2")
    assert [beat["step"] for beat in run.list_sent("heartbeat")] == [1, 2, 3]


def test_a_stop_request_saves_and_ends_after_the_next_step(run: FakeTrainingLoop) -> None:
    run.step()
    run.request_stop()
    with pytest.raises(TrainingStopped) as caught:
        run.step()
    assert caught.value.step == 2 and run.saved_steps == [2] and run.logged_steps == []
    assert run.list_sent("staged")[0]["graceful"] is True
    assert run.list_sent("stopping")[0]["step"] == 2


def test_the_last_step_is_logged_even_if_its_window_is_short(run: FakeTrainingLoop) -> None:
    run.state.max_steps = 2
    run.step()
    run.step()
    run.step()
    assert run.logged_steps == [2, 3]


def test_a_checkpoint_includes_the_current_logging_window(tmp_path: Path) -> None:
    run = FakeTrainingLoop(tmp_path)
    sums = {"tokens": torch.tensor(7), "nll": torch.tensor(0.3)}
    trainer = make_fake_trainer(run, torch.tensor(0.1) + torch.tensor(0.2), sums)
    run.stager.on_trainer_created(trainer)
    run.state.num_input_tokens_seen = 100
    run.step()
    run.step(save=True)
    (message,) = run.list_sent("staged")
    assert message["tokens"] == 107
    later_trainer = make_fake_trainer(run, torch.tensor(0.0), {}, last_logged_step=2)
    later_stager = subject.CheckpointStager(run.channel, run.agreement, "a2-00000000", Path(message["folder"]))
    later_stager.on_trainer_created(later_trainer)
    run.agreement.start = lambda step: None  # type: ignore[method-assign] # the thread runs already
    later_stager.on_train_begin(run.args, run.state, run.control)
    assert later_trainer._globalstep_last_logged == 0
    assert later_trainer._tr_loss.item() == trainer._tr_loss.item() and later_trainer._tr_loss.dtype == torch.float32
    assert later_trainer._sums["train"] == {"tokens": 7, "nll": torch.tensor(0.3).item()}


@pytest.mark.parametrize(
    ("loss", "weight", "code"),
    [("nan", 1.0, "LossNotFinite"), ("inf", 1.0, "LossNotFinite"), ("1", float("nan"), "WeightsNotFinite")],
)
def test_a_training_state_with_non_finite_values_is_never_saved(run: FakeTrainingLoop, loss: str, weight: float, code: str) -> None:
    run.stager.on_trainer_created(make_fake_trainer(run, torch.tensor(float(loss)), {}))
    run.model.weight.data[0, 0] = weight
    with pytest.raises(DivergedError) as caught:
        run.step(save=True)
    assert (caught.value.code, run.saved_steps) == (code, [])


def test_weights_are_checked_at_a_step_with_a_log_line_too(run: FakeTrainingLoop) -> None:
    """The last update may have made weights non-finite, although the logged loss, which was computed before this update, was finite."""
    run.stager.on_trainer_created(make_fake_trainer(run, torch.tensor(1.0), {"tokens": torch.tensor(7)}))
    run.step(save=True, log=True)
    assert run.saved_steps == [1] and "tokens" not in run.list_sent("staged")[0], (
        "the tokens of the log line are not counted twice"
    )
    run.model.weight.data[0, 0] = float("inf")
    with pytest.raises(DivergedError) as caught:
        run.step(save=True, log=True)
    assert (caught.value.code, run.saved_steps) == ("WeightsNotFinite", [1])


def test_a_checkpoint_at_the_end_of_an_epoch_is_saved_after_the_evaluation(tmp_path: Path) -> None:
    """If the checkpoint were saved before the evaluation, a run that resumed from it would skip the evaluation.

    Early stopping could then decide differently than in an uninterrupted run.
    """
    run = FakeTrainingLoop(tmp_path, steps_per_epoch=2, eval_strategy="epoch")
    run.step(save=True)
    run.step(save=True)
    assert run.saved_steps == [1]
    run.end_epoch()
    assert run.saved_steps == [1, 2]
    run.step()
    run.end_epoch()
    assert run.saved_steps == [1, 2]


def test_a_stop_is_not_caught_by_except_exception(run: FakeTrainingLoop) -> None:
    assert not issubclass(TrainingStopped, Exception)


def test_a_stop_at_the_end_of_an_epoch_waits_for_the_evaluation(tmp_path: Path) -> None:
    """A run that resumes at the end of an epoch starts with the next epoch.

    If the stop did not wait for the evaluation, the validation loss of the ended epoch would never be measured.
    """
    run = FakeTrainingLoop(tmp_path, steps_per_epoch=2, eval_strategy="epoch")
    run.step()
    run.request_stop()
    run.step()
    assert run.saved_steps == []
    with pytest.raises(TrainingStopped):
        run.end_epoch()
    assert run.saved_steps == [2]


def test_a_stop_at_the_end_of_an_epoch_without_evaluation_is_immediate(tmp_path: Path) -> None:
    run = FakeTrainingLoop(tmp_path, steps_per_epoch=2)
    run.step()
    run.request_stop()
    with pytest.raises(TrainingStopped):
        run.step()


def set_free_bytes(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda work: free_bytes)


def test_a_full_disk_skips_the_checkpoint_and_training_goes_on(run: FakeTrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_bytes(monkeypatch, space.DISK_RESERVE_BYTES)
    run.step(save=True)
    run.step()
    assert run.saved_steps == []
    (message,) = run.list_sent("skipped")
    assert (message["step"], message["reason"]) == (1, "StagingDiskFull")
    set_free_bytes(monkeypatch, 10 * space.DISK_RESERVE_BYTES)
    run.step(save=True)
    assert run.saved_steps == [3]


def test_a_full_disk_at_a_stop_ends_without_a_checkpoint(run: FakeTrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free_bytes(monkeypatch, 0)
    run.step()
    run.request_stop()
    with pytest.raises(TrainingStopped):
        run.step()
    assert run.saved_steps == [] and run.list_sent("skipped")


def start_slow_checkpoint(run: FakeTrainingLoop, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Save a checkpoint that stays in the background until the returned event is set."""
    may_finish = threading.Event()
    run.stager.on_trainer_created(make_fake_trainer(run, torch.tensor(1.0), {}))
    monkeypatch.setattr(run.stager, "_report_files", lambda *_: may_finish.wait(60))
    run.waits_for_writer = False
    run.step(save=True)
    assert run.stager._writer.is_busy
    return may_finish


def test_the_next_checkpoint_waits_for_the_last_one(run: FakeTrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    may_finish = start_slow_checkpoint(run, monkeypatch)
    run.step()
    assert run.stager._writer.is_busy and run.list_sent("note") == [], "a step without a checkpoint does not wait"
    writer, first_thread = run.stager._writer, run.stager._writer._thread
    original_wait = writer.wait
    monkeypatch.setattr(writer, "wait", lambda: (may_finish.set(), original_wait()))
    run.step(save=True)
    assert first_thread is not None and not first_thread.is_alive() and run.saved_steps == [1, 3]
    assert [message["text"] for message in run.list_sent("note")] == [subject.SLOW_DISK_NOTE]
    original_wait()


def test_a_failure_in_the_background_ends_the_run_at_the_next_step(run: FakeTrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stager.on_trainer_created(make_fake_trainer(run, torch.tensor(1.0), {}))

    def fail(*_: Any, **facts: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.channel, "report_staged_files", fail)
    run.waits_for_writer = False
    run.step(save=True)
    with contextlib.suppress(OSError):
        run.stager._writer.wait()
    with pytest.raises(OSError, match="No space left on device"):
        run.step()
    assert run.list_sent("staged") == []


def test_without_memory_for_a_copy_training_waits_for_each_checkpoint(run: FakeTrainingLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    run.stager.on_trainer_created(make_fake_trainer(run, torch.tensor(1.0), {}))
    monkeypatch.setattr(space, "available_bytes", lambda: space.MEMORY_RESERVE_BYTES)
    run.step(save=True)
    run.step(save=True)
    assert run.stager._writer.writes_in_background is False and [message["step"] for message in run.list_sent("staged")] == [1, 2]
    (note,) = run.list_sent("note")
    assert note["text"] == (
        "training waits until each checkpoint is written to the disk: a copy of the training state needs 0.0 GB of the pod's memory, and 0.3 GB are "
        "available; raise resources.memory for checkpoints in the background"
    )


@pytest.mark.parametrize("is_stop", [True, False])
def test_the_last_checkpoint_is_written_at_once(run: FakeTrainingLoop, is_stop: bool) -> None:
    """No training step follows the last checkpoint, so it would save no time to write this checkpoint in the background."""
    run.stager.on_trainer_created(make_fake_trainer(run, torch.tensor(1.0), {}))
    run.step(save=True)
    assert run.stager._writer.writes_in_background is True
    if is_stop:
        run.request_stop()
        with pytest.raises(TrainingStopped):
            run.step()
    else:
        run.state.max_steps = 2
        run.step(save=True)
    assert run.stager._writer.writes_in_background is False and [message["step"] for message in run.list_sent("staged")] == [1, 2]


def test_only_finite_values_are_reported(run: FakeTrainingLoop) -> None:
    run.state.global_step, run.state.num_input_tokens_seen = 3, 500
    run.reporter.on_log(
        run.args, run.state, run.control, logs={"loss": 1.23456789, "grad_norm": float("nan"), "text": "x"}
    )
    assert run.list_sent("metrics")[0]["value"] == {"trainLoss": 1.234568}
    assert run.list_sent("log")[0]["values"] == {"loss": 1.23456789, "grad_norm": "nan"}
    assert run.list_sent("progress")[0]["value"] | {"updateTime": ""} == {
        "step": 3, "totalSteps": 1000, "epoch": 0.0, "tokensSeen": 500, "updateTime": ""
    }  # fmt: skip


def test_the_best_validation_loss_is_known_after_a_resume(run: FakeTrainingLoop) -> None:
    run.state.log_history = [
        {"step": 2, "eval_loss": 1.0}, {"step": 3, "loss": 9.0}, {"step": 4, "eval_loss": 0.5}, {"step": 6, "eval_loss": 0.7}
    ]  # fmt: skip
    run.reporter.on_evaluate(run.args, run.state, run.control)
    assert run.list_sent("metrics")[0]["value"] == {"evalLoss": 0.7, "bestEvalLoss": 0.5, "bestStep": 4}
    assert subject.find_eval_loss(run.state, 4) == 0.5 and subject.find_eval_loss(run.state, 5) is None


def test_pods_that_restored_different_steps_do_not_start(tmp_path: Path) -> None:
    from finetune_api.errors import PeerError

    shared_store = SingleRankStore()
    shared_store.set("start-1", "5")
    with pytest.raises(PeerError) as caught:
        subject.require_same_start(Channel.create_recording(tmp_path, world_size=2), shared_store, 10)
    assert caught.value.code == "StartsDiffer" and "[5, 10]" in caught.value.message
    subject.require_same_start(Channel.create_recording(tmp_path, world_size=2), shared_store, 5)


def test_pauses_are_measured_from_the_end_of_the_last_step_evaluation_or_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeTrainingLoop(tmp_path)
    clock_seconds = [100.0]
    monkeypatch.setattr(subject.time, "monotonic", lambda: clock_seconds[0])
    reporter = subject.PauseReporter(run.channel, run.stager)
    callbacks = (reporter.on_step_end, reporter.on_evaluate, reporter.on_save, reporter.on_epoch_end, reporter.on_evaluate)
    run.stager.wait_seconds = 2.0
    for callback, seconds in zip(callbacks, (9.0, 5.0, 3.0, 4.0, 1.0), strict=True):
        clock_seconds[0] += seconds
        callback(run.args, run.state, run.control)
    pauses = [(message["part"], message["seconds"]) for message in run.channel.sent if message["kind"] == "pause"]
    assert pauses == [("evaluation", 5.0), ("saving", 5.0), ("evaluation", 1.0)]
    assert run.stager.wait_seconds == 0.0
    other_rank_reporter = subject.PauseReporter(Channel.create_recording(tmp_path, local_rank=1), run.stager)
    other_rank_reporter.on_evaluate(run.args, run.state, run.control)
    assert other_rank_reporter._channel.sent == []


@pytest.mark.parametrize(("ranks_per_sequence", "sample_count"), [(1, 8), (4, 2)])
def test_a_row_that_several_ranks_share_is_counted_once(ranks_per_sequence: int, sample_count: int, tmp_path: Path) -> None:
    run = FakeTrainingLoop(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    run.channel.world_size = 4
    run.stager = subject.CheckpointStager(run.channel, run.agreement, "a1-00000000", ranks_per_sequence=ranks_per_sequence)
    run.channel.world_size = 1  # this test runs one of the four ranks
    run.step(save=True)
    (staged_message,) = run.list_sent("staged")
    assert staged_message["samples"] == sample_count
