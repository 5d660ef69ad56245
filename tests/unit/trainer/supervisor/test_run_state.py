"""The state of the run: progress, estimates, stages and checkpoints from the messages of ranks."""

from __future__ import annotations

import pytest
from finetune_api.status import (
    Checkpoint,
    MeasuredRun,
    MemoryParts,
    MemoryPlan,
    Metrics,
    Progress,
    ResolvedConfig,
    RunPlan,
    Stage,
)
from finetune_trainer.supervisor.run_state import RunState, choose_newest_and_best, format_duration

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


def test_the_time_in_each_stage_is_measured(clock: FakeClock) -> None:
    state = RunState()
    clock.now += 1
    state.enter_stage(Stage.DOWNLOADING)
    clock.now += 3
    state.enter_stage(Stage.TRAINING)
    clock.now += 4
    assert state.report().timings == {"starting": 1.0, "downloading": 3.0, "training": 4.0}


def test_the_newest_five_checkpoints_and_the_best_are_reported() -> None:
    checkpoints = [Checkpoint(step=step, uri="u", eval_loss=abs(step - 2)) for step in range(9, 0, -1)]
    assert [checkpoint.step for checkpoint in choose_newest_and_best(checkpoints)] == [9, 8, 7, 6, 5, 2]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59, "59s"), (200, "3m20s"), (4320, "1h12m"), (-3, "0s")])
def test_durations_are_formatted(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text


def test_the_last_heartbeat_may_be_newer_than_the_last_step(clock: FakeClock) -> None:
    state = RunState()
    state.record_heartbeat()
    assert state.report().health.seconds_since_heartbeat is None
    state.record_step(1)
    clock.now += 700
    state.record_heartbeat()
    clock.now += 5
    health = state.report().health
    assert (health.seconds_since_step, health.seconds_since_heartbeat) == (705.0, 5.0)
    state.record_step(2)
    assert state.report().health.seconds_since_heartbeat == 0.0


def test_a_step_is_measured_only_after_the_step_before_it(clock: FakeClock) -> None:
    state = RunState()
    assert (state.median_step_seconds(), state.seconds_since_step(), state.seconds_since_heartbeat()) == (None, None, None)
    for step, seconds in ((1, 9), (2, 3), (2, 9), (4, 9), (5, 4)):
        clock.now += seconds
        state.record_step(step)
    assert (state.median_step_seconds(), state.step) == (3.5, 5)
    for step in range(6, 56):
        clock.now += 7
        state.record_step(step)
    assert state.median_step_seconds() == 7.0, "only the newest 50 steps are measured"


@pytest.mark.parametrize(
    ("step", "total", "display"),
    [(0, 3, "0/3 (0%)"), (1, 3, "1/3 (33%)"), (3, 3, "3/3 (100%)"), (4, 3, "4/3 (100%)"), (None, 3, None), (1, None, None), (1, 0, None)],
)
def test_percentages_are_rounded_down(step: int | None, total: int | None, display: str | None) -> None:
    state = RunState()
    state.merge_progress(Progress(step=step, total_steps=total))
    progress = state.report().progress
    assert (progress.display, progress.seconds_remaining) == (display, None)


def test_remaining_time_is_never_negative(clock: FakeClock) -> None:
    state = RunState()
    state.merge_progress(Progress(total_steps=3))
    for step in (1, 2, 3, 4):
        clock.now += 1.4
        state.record_step(step)
        progress = state.report().progress
        assert (progress.seconds_remaining, progress.eta) == ((None, None) if step == 1 else (max(0, 3 - step), f"{max(0, 3 - step)}s"))


def test_timings_and_counters_of_the_same_name_are_summed(clock: FakeClock) -> None:
    state = RunState()
    for seconds in (1.25, 2.0):
        state.add_timing("fetch", seconds)
        state.increment_counter("checkpoints")
    clock.now += 2
    state.enter_stage(Stage.STARTING, "again")
    clock.now += 1
    report = state.report()
    assert (report.timings, report.detail, state.counters) == ({"fetch": 3.25, "starting": 3.0}, "again", {"checkpoints": 2})
    assert (report.attempt, report.uid, report.latest_checkpoint, report.resolved.notes) == (1, "", None, None)


def test_checkpoints_are_listed_from_the_newest_to_the_oldest() -> None:
    state = RunState()
    for step in (5, 15, 10):
        state.add_checkpoint(Checkpoint(step=step, uri=f"u{step}"), upload_seconds=1.23456)
    state.mark_checkpoint_healthy(10)
    state.mark_checkpoint_healthy(11)
    state.remove_checkpoint(5)
    state.remove_checkpoint(6)
    assert [(checkpoint.step, bool(checkpoint.healthy)) for checkpoint in state.checkpoints] == [(15, False), (10, True)]
    assert (state.last_save_seconds, state.report().latest_checkpoint) == (1.235, "u15")
    state.add_checkpoint(Checkpoint(step=20, uri="u20"))
    assert state.last_save_seconds == 1.235


def test_a_checkpoint_problem_makes_the_run_unhealthy_until_it_is_cleared() -> None:
    state = RunState()
    assert state.report().health.healthy is True
    state.record_checkpoint_problem("Reason", "why")
    assert (state.report().health.healthy, state.checkpoint_problem) == (False, "Reason: why")
    state.clear_checkpoint_problem()
    assert (state.report().health.healthy, state.checkpoint_problem) == (True, None)


def test_the_earlier_of_two_checkpoints_with_equal_loss_is_the_best() -> None:
    losses = {9: None, 8: 0.5, 7: 0.5, 6: 0.5, 5: 0.5, 4: 0.25, 3: 0.0, 2: 0.0, 1: None}
    checkpoints = [Checkpoint(step=step, uri="u", eval_loss=loss) for step, loss in losses.items()]
    assert [checkpoint.step for checkpoint in choose_newest_and_best(checkpoints)] == [9, 8, 7, 6, 5, 2]
    assert choose_newest_and_best(checkpoints[:3]) == checkpoints[:3] and choose_newest_and_best([]) == []


@pytest.mark.parametrize(("seconds", "text"), [(60, "1m0s"), (3599, "59m59s"), (3600, "1h0m"), (90061, "25h1m")])
def test_long_durations_are_formatted(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text


def test_seconds_are_rounded(clock: FakeClock) -> None:
    state = RunState()
    for step in (300, 301):
        clock.now += 1.23456
        state.record_step(step)
        state.record_heartbeat()
    clock.now += 0.12345
    health = state.report().health
    assert (health.median_step_seconds, health.seconds_since_step, health.seconds_since_heartbeat) == (1.2346, 0.123, 0.123)


def test_plan_and_measured_memory_are_merged() -> None:
    state = RunState()
    assert state.report().plan is None
    state.merge_plan(RunPlan(memory=MemoryPlan(expected_bytes=5, upper_bytes=6)))
    state.merge_plan(RunPlan(measured=MeasuredRun(memory_bytes=4)))
    assert state.report().to_wire()["plan"] == {
        "memory": {"expectedBytes": 5, "upperBytes": 6, "parts": dict.fromkeys(MemoryParts.model_fields, 0)}, "measured": {"memoryBytes": 4},
    }  # fmt: skip
