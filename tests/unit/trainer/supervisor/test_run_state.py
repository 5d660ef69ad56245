"""The state of the run: progress, estimates, stages and checkpoints from the messages of ranks."""

from __future__ import annotations

import pytest
from finetune_api.status import Checkpoint, Metrics, Progress, ResolvedConfig, Stage
from finetune_trainer.supervisor.run_state import RunState, format_duration, newest_and_best

from tests.unit.trainer.supervisor.conftest import FakeClock


def test_progress_has_percentage_and_remaining_time(clock: FakeClock) -> None:
    state = RunState()
    state.merge_progress(Progress(step=0, total_steps=500, epoch=0.0))
    for step in range(1, 121):
        clock.now += 2
        state.record_step(step)
    progress = state.report().progress
    assert (progress.display, progress.percent, progress.seconds_remaining, progress.eta) == (
        "120/500 (24%)",
        24,
        760,
        "12m40s",
    )
    clock.now += 5
    health = state.report().health
    assert (health.median_step_seconds, health.seconds_since_step) == (2.0, 5.0)


def test_a_late_message_does_not_lower_the_step(clock: FakeClock) -> None:
    state = RunState()
    for step in (1, 2, 3, 2):
        state.record_step(step)
    assert state.step == 3


def test_missing_fields_keep_their_earlier_value(clock: FakeClock) -> None:
    state = RunState()
    state.merge_metrics(Metrics(train_loss=1.0))
    state.merge_metrics(Metrics(eval_loss=2.0))
    state.merge_resolved(ResolvedConfig(strategy="ddp"))
    state.merge_resolved(ResolvedConfig(device="cpu"))
    state.add_note("once")
    state.add_note("once")
    report = state.report()
    assert (report.metrics.train_loss, report.metrics.eval_loss) == (1.0, 2.0)
    assert (report.resolved.strategy, report.resolved.device, report.resolved.notes) == ("ddp", "cpu", ["once"])


def test_time_is_measured_per_stage(clock: FakeClock) -> None:
    state = RunState()
    clock.now += 1
    state.enter_stage(Stage.DOWNLOADING)
    clock.now += 3
    state.enter_stage(Stage.TRAINING)
    clock.now += 4
    assert state.report().timings == {"starting": 1.0, "downloading": 3.0, "training": 4.0}


def test_the_newest_five_checkpoints_and_the_best_are_reported() -> None:
    checkpoints = [Checkpoint(step=step, uri="u", eval_loss=abs(step - 2)) for step in range(9, 0, -1)]
    assert [one.step for one in newest_and_best(checkpoints)] == [9, 8, 7, 6, 5, 2]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59, "59s"), (200, "3m20s"), (4320, "1h12m"), (-3, "0s")])
def test_durations_are_formatted(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_last_heartbeat_may_be_newer_than_the_last_step(clock: FakeClock) -> None:
    state = RunState()
    state.record_activity()
    assert state.report().health.seconds_since_heartbeat is None
    state.record_step(1)
    clock.now += 700
    state.record_activity()
    clock.now += 5
    health = state.report().health
    assert (health.seconds_since_step, health.seconds_since_heartbeat) == (705.0, 5.0)
    state.record_step(2)
    assert state.report().health.seconds_since_heartbeat == 0.0
