"""The checks of GuardedTrainer, which all objectives share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api.errors import DivergedError, NoCheckpointError

torch = pytest.importorskip("torch")
from finetune_trainer import engine, speed  # noqa: E402 - the module needs torch
from finetune_trainer.engine import FiniteGuard, GuardedTrainer, LogLineWriter, logged_training_seconds  # noqa: E402 - the module needs torch
from finetune_trainer.speed import SpeedMeter  # noqa: E402 - the module needs torch
from safetensors.torch import load_file, save_file  # noqa: E402 - the module needs torch
from transformers import Trainer, TrainingArguments  # noqa: E402 - the module needs torch

LAST_STEP = 4
"""The run ends in the middle of an epoch, because an epoch has nine steps."""


class OneWeightModel(torch.nn.Module):  # type: ignore[name-defined]  # importorskip returns Any
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: Any) -> dict[str, Any]:
        return {"loss": (self.weight * x).square().mean()}


class PlainGuardedTrainer(GuardedTrainer):
    """A GuardedTrainer without a distributed strategy."""

    def create_accelerator_and_postprocess(self) -> None:
        Trainer.create_accelerator_and_postprocess(self)


def run_training(trainer_class: type[Trainer], folder: Path, resume: Path | None = None) -> tuple[int, float]:
    """Train and return the number of steps and the final weight."""
    args = TrainingArguments(
        output_dir=str(folder), max_steps=LAST_STEP, save_steps=LAST_STEP, per_device_train_batch_size=1, learning_rate=0.1, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(model=OneWeightModel(), args=args, train_dataset=[{"x": float(number)} for number in range(9)])
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.state.global_step, trainer.model.weight.item()


def test_resuming_at_the_last_step_does_not_train(tmp_path: Path) -> None:
    step, weight = run_training(PlainGuardedTrainer, tmp_path)
    assert step == LAST_STEP
    assert run_training(PlainGuardedTrainer, tmp_path / "again", tmp_path / f"checkpoint-{LAST_STEP}") == (LAST_STEP, weight)


def test_transformers_without_the_guard_trains_one_step_too_many(tmp_path: Path) -> None:
    """If this test fails, transformers itself stops at the last step, and `GuardedTrainer.run_epoch` can be removed."""
    run_training(Trainer, tmp_path)
    step, _ = run_training(Trainer, tmp_path / "again", tmp_path / f"checkpoint-{LAST_STEP}")
    assert step == LAST_STEP + 1


def change_weights(checkpoint: Path, name: str | None) -> None:
    """Add a copy of the model's only weight under the name `name`. If `name` is None, replace the weight by one that is called `other`."""
    weights = load_file(checkpoint / "model.safetensors")
    if name is not None:
        weights[name] = weights["weight"].clone()
    else:
        del weights["weight"]
    save_file(weights or {"other": torch.ones(1)}, checkpoint / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "reported_names"), [(None, "weight, other"), ("extra.weight", "extra.weight")], ids=["missing", "unexpected"]
)
def test_a_checkpoint_with_other_weights_is_refused(name: str | None, reported_names: str, tmp_path: Path) -> None:
    run_training(PlainGuardedTrainer, tmp_path)
    checkpoint = tmp_path / f"checkpoint-{LAST_STEP}"
    change_weights(checkpoint, name)
    with pytest.raises(NoCheckpointError) as caught:
        run_training(PlainGuardedTrainer, tmp_path / "again", checkpoint)
    assert caught.value.code == "CheckpointForeign"
    assert caught.value.message.endswith(f"do not match the weights of this run: {reported_names}")


def test_scales_of_frozen_4_bit_weights_may_be_in_a_checkpoint(tmp_path: Path) -> None:
    run_training(PlainGuardedTrainer, tmp_path)
    checkpoint = tmp_path / f"checkpoint-{LAST_STEP}"
    change_weights(checkpoint, "layer.weight.absmax")
    assert run_training(PlainGuardedTrainer, tmp_path / "again", checkpoint)[0] == LAST_STEP


@pytest.mark.parametrize(
    ("key", "code"), [("loss", "LossNotFinite"), ("eval_loss", "LossNotFinite"), ("grad_norm", "GradientNotFinite")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logged_value_that_is_not_finite_ends_the_run(key: str, code: str, value: float) -> None:
    args, state, control = SimpleNamespace(fp16=False), SimpleNamespace(global_step=3), SimpleNamespace()
    with pytest.raises(DivergedError) as caught:
        FiniteGuard().on_log(args, state, control, logs={"loss": 1.0, key: value})  # type: ignore[arg-type]
    assert caught.value.code == code
    assert "at step 3" in caught.value.message


def test_the_gradient_norm_of_fp16_may_be_infinite() -> None:
    """If the gradients are infinite, the gradient scaler skips the step and lowers its scale."""
    args, state, control = SimpleNamespace(fp16=True), SimpleNamespace(global_step=3), SimpleNamespace()
    FiniteGuard().on_log(args, state, control, logs={"loss": 1.0, "grad_norm": float("inf")})  # type: ignore[arg-type]
    with pytest.raises(DivergedError):
        FiniteGuard().on_log(args, state, control, logs={"loss": float("nan")})  # type: ignore[arg-type]


FETCH_SECONDS, COUNT_SECONDS, COMPUTE_SECONDS, TOKENS_PER_STEP = 0.25, 3.0, 1.75, 10


class ClockedTrainer(PlainGuardedTrainer):
    """Advances a virtual clock when the tokens of all ranks are counted, and when a step is computed. `SlowRows` advances this clock for each row."""

    now = 100.0

    def _get_num_items_in_batch(self, *args: Any, **options: Any) -> Any:
        ClockedTrainer.now += COUNT_SECONDS
        return super()._get_num_items_in_batch(*args, **options)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        ClockedTrainer.now += COMPUTE_SECONDS
        self.state.num_input_tokens_seen += TOKENS_PER_STEP
        return super().compute_loss(*args, **options)


class SlowRows(torch.utils.data.Dataset):  # type: ignore[name-defined]  # importorskip returns Any
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, float]:
        ClockedTrainer.now += FETCH_SECONDS
        return {"x": float(index)}


def use_virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the clocks of the trainer by `ClockedTrainer.now`. The wall clock is 1.7e9 seconds ahead of `now`."""
    clock = SimpleNamespace(perf_counter=lambda: ClockedTrainer.now, time=lambda: 1.7e9 + ClockedTrainer.now)
    monkeypatch.setattr(engine, "time", clock)
    monkeypatch.setattr(speed, "time", clock)


def test_data_wait_share_contains_only_the_time_until_a_batch_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_virtual_clock(monkeypatch)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=LAST_STEP, save_strategy="no", per_device_train_batch_size=1, logging_steps=1, report_to=[],
        use_cpu=True, disable_tqdm=True, include_num_input_tokens_seen="no",
    )  # fmt: skip
    trainer = ClockedTrainer(model=OneWeightModel(), args=args, train_dataset=SlowRows())
    trainer.meter = SpeedMeter(flops_of_token=1, peak_flops=None, rank_count=1)
    trainer.train()
    log_lines = [line for line in trainer.state.log_history if "data_wait_share" in line]
    step_seconds = FETCH_SECONDS + COUNT_SECONDS + COMPUTE_SECONDS
    assert [line["step"] for line in log_lines] == [2, 3, 4]  # throughput is measured from the first log line
    for line in log_lines:
        assert line["data_wait_share"] == FETCH_SECONDS / step_seconds
        assert line["tokens_per_second"] == TOKENS_PER_STEP / step_seconds


def run_clocked_training(folder: Path, last_step: int, resume: Path | None = None) -> list[dict[str, Any]]:
    """Train until `last_step`, save a checkpoint there, evaluate once more after training, and return the log history."""
    args = TrainingArguments(
        output_dir=str(folder), max_steps=last_step, save_steps=2, per_device_train_batch_size=1, logging_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    rows = SlowRows()
    trainer = ClockedTrainer(model=OneWeightModel(), args=args, train_dataset=rows, eval_dataset=rows)
    ClockedTrainer.now += 1000  # loading the model is not training
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    ClockedTrainer.now += 1000
    trainer.evaluate(metric_key_prefix="test")
    return list(trainer.state.log_history)


def test_seconds_of_training_add_up_over_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause between two attempts, loading and the test after training are not part of `training_seconds`."""
    use_virtual_clock(monkeypatch)
    run_clocked_training(tmp_path / "first", 2)
    ClockedTrainer.now += 5000  # the pause between the attempts
    log_lines = run_clocked_training(tmp_path / "second", 4, tmp_path / "first" / "checkpoint-2")
    # The lines are: training and evaluation at steps 2 and 4, the summary, and the test after training.
    kinds = [(line["step"], next(name for name in ("loss", "eval_runtime", "train_loss", "test_runtime") if name in line)) for line in log_lines]
    assert kinds == [(2, "loss"), (2, "eval_runtime"), (4, "loss"), (4, "eval_runtime"), (4, "train_loss"), (4, "test_runtime")]
    two_step_seconds, evaluation_seconds = 2 * (FETCH_SECONDS + COUNT_SECONDS + COMPUTE_SECONDS), 9 * FETCH_SECONDS
    prefetch_seconds = FETCH_SECONDS  # The data loader fetches the next row before the current step is computed.
    seconds = [line["training_seconds"] for line in log_lines]
    assert seconds[:2] == [two_step_seconds + prefetch_seconds, two_step_seconds + prefetch_seconds + evaluation_seconds]
    assert seconds[2] == seconds[1] + two_step_seconds + prefetch_seconds
    assert seconds[3:] == [seconds[2] + evaluation_seconds] * 3
    unix_times = [line["unix_time"] for line in log_lines]
    test_and_loading_seconds = 1000 + evaluation_seconds + 5000 + 1000
    assert unix_times[0] > 1.7e9 and unix_times[2] - unix_times[1] == test_and_loading_seconds + two_step_seconds + prefetch_seconds


def test_seconds_of_training_start_at_0_after_a_checkpoint_without_them() -> None:
    assert logged_training_seconds(SimpleNamespace(log_history=[{"loss": 1.0, "step": 1}])) == 0.0  # type: ignore[arg-type]
    history = [{"training_seconds": 2.5, "step": 1}, {"loss": 1.0, "step": 2}]
    assert logged_training_seconds(SimpleNamespace(log_history=history)) == 2.5  # type: ignore[arg-type]


def test_the_line_in_the_pod_log_shows_neither_time_nor_seconds(caplog: pytest.LogCaptureFixture) -> None:
    state = SimpleNamespace(global_step=3, max_steps=9, is_world_process_zero=True)
    with caplog.at_level("INFO", logger=engine.logger.name):
        LogLineWriter().on_log(SimpleNamespace(), state, SimpleNamespace(), logs={"loss": 1.5, "unix_time": 1.7e9, "training_seconds": 4.0})  # type: ignore[arg-type]
    assert caplog.messages == ["step 3/9  loss 1.5"]
