"""The estimate of the time to the end of training."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest
from finetune_api.status import Progress, Stage
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.results.log_entry import LogEntry
from finetune_trainer.supervisor.remaining_time import RemainingTime, estimate_step_seconds
from finetune_trainer.supervisor.run_state import RunState

from tests.unit.trainer.supervisor.conftest import FakeClock

PUBLISHED_RUNS = json.loads((Path(__file__).parent / "data" / "published_step_seconds.json").read_text())["runs"]
"""For each of 63 published runs of 5,000 steps: the seconds of every 250 steps, and of the evaluation that follows these steps."""
WINDOW_STEPS, TOTAL_STEPS = 250, 5000


def estimate_after_first_window(step_seconds: float, evaluation_seconds: float | None) -> float:
    """Replay the first 250 of 5,000 steps, and return the estimate of the remaining seconds."""
    remaining_time, now = RemainingTime(), 0.0
    for step in range(1, WINDOW_STEPS + 1):
        now += step_seconds / WINDOW_STEPS
        remaining_time.record_step(step, now)
    if evaluation_seconds is not None:
        remaining_time.record_pause("evaluation", WINDOW_STEPS, evaluation_seconds)
    estimate = remaining_time.estimate(WINDOW_STEPS, TOTAL_STEPS)
    assert estimate is not None
    return estimate


def test_the_training_time_of_published_runs_is_estimated_after_five_percent_of_the_steps() -> None:
    errors = [
        abs(estimate_after_first_window(run["steps"][0], None) / sum(run["steps"][1:]) - 1) for run in PUBLISHED_RUNS.values()
    ]
    assert len(errors) == 63
    assert (round(statistics.median(errors), 4), round(max(errors), 4)) == (0.0059, 0.056)


def test_the_training_time_with_evaluations_of_published_runs_is_estimated() -> None:
    """The evaluations of the published runs generate answers.

    Trained models generate shorter answers, so the first evaluation takes longer than the later ones.
    """
    errors = []
    for run in PUBLISHED_RUNS.values():
        actual_seconds = sum(run["steps"][1:]) + sum(run["evaluations"][1:])
        errors.append(abs(estimate_after_first_window(run["steps"][0], run["evaluations"][0]) / actual_seconds - 1))
    assert (round(statistics.median(errors), 3), round(max(errors), 3)) == (0.046, 0.09)


def test_rows_of_different_lengths_and_a_few_slow_steps_change_the_estimate_little() -> None:
    """The step durations are random numbers, because the published logs contain only means of 250 steps."""
    generator = random.Random(16)
    durations = [generator.lognormvariate(0, 0.6) for _ in range(TOTAL_STEPS)]
    remaining_time, now = RemainingTime(), 0.0
    for step, seconds in enumerate(durations[: TOTAL_STEPS // 10], 1):
        now += seconds + (300 if step == 77 else 0)
        remaining_time.record_step(step, now)
    estimate = remaining_time.estimate(TOTAL_STEPS // 10, TOTAL_STEPS)
    assert estimate == pytest.approx(sum(durations[TOTAL_STEPS // 10 :]), rel=0.05)
    assert statistics.median(durations) < 0.9 * statistics.fmean(durations), "the median would be wrong"


@pytest.mark.parametrize(
    ("pauses", "step", "expected_seconds"),
    [
        ([], 40, 60.0), ([(20, 4.0)], 20, 80 + 4 * 4.0), ([(20, 4.0), (40, 6.0)], 40, 60 + 3 * 5.0), ([(20, 4.0)], 39, 61 + 4 * 4.0),
        ([(60, 4.0), (80, 4.0)], 100, 0 + 4.0), ([(100, 4.0)], 100, 0.0), ([(0, 4.0)], 10, 90.0), ([(30, 1.0), (60, 1.0)], 60, 40 + 1.0),
    ],
)  # fmt: skip
def test_further_pauses_are_expected_at_the_mean_interval(pauses: list[tuple[int, float]], step: int, expected_seconds: float) -> None:
    remaining_time = RemainingTime()
    for number in range(1, 12):
        remaining_time.record_step(number, float(number))
    for pause_step, seconds in pauses:
        remaining_time.record_pause("evaluation", pause_step, seconds)
    assert remaining_time.estimate(step, 100) == expected_seconds


def test_a_pause_does_not_count_as_a_step(clock: FakeClock) -> None:
    state = RunState()
    state.enter_stage(Stage.TRAINING)
    state.merge_progress(Progress(step=0, total_steps=20))
    for step in range(1, 11):
        clock.now += 2
        state.record_step(step)
        if step % 5 == 0:
            clock.now += 7
            state.record_pause("evaluation", 7.0)
    assert state.report().progress.seconds_remaining == 10 * 2 + 2 * 7
    time_use = state.report().time_use
    assert time_use is not None and time_use.seconds() == {"firstStep": 2.0, "steps": 18.0, "evaluation": 14.0}


def test_a_pause_after_a_stop_request_counts_as_time_of_stopping(clock: FakeClock) -> None:
    state = RunState(seconds_since_process_start=1.5)
    clock.now += 0.5
    state.enter_stage(Stage.TRAINING)
    clock.now += 3
    time_use = state.report().time_use
    assert time_use is not None and time_use.seconds() == {"starting": 2.0, "firstStep": 3.0}, "the first step is not done"
    state.record_step(1)
    clock.now += 4
    state.record_pause("saving", 100.0)
    state.enter_stage(Stage.STOPPING)
    clock.now += 5
    state.record_pause("saving", 5.0)
    time_use = state.report().time_use
    assert time_use is not None and time_use.seconds() == {"starting": 2.0, "saving": 7.0, "stopping": 5.0}, "a pause is at most as long as training"


def make_log_entries(*lines: tuple[int, float | None]) -> list[LogEntry]:
    return [LogEntry(step=step, training_seconds=seconds) for step, seconds in lines]


@pytest.mark.parametrize(
    ("entries", "world_size", "effective_batch", "expected_seconds"),
    [
        (make_log_entries((10, 30.0), (20, 50.0), (30, 70.0)), 2, 16, 2.0), (make_log_entries((10, 30.0), (30, 70.0)), 4, 16, 1.0),
        (make_log_entries((10, 30.0), (30, 70.0)), 4, 32, 2.0),
        (make_log_entries((10, 30.0), (30, 70.0)), 1, 16, 4.0),
        (make_log_entries((10, 30.0)), 2, 16, 3.0), (make_log_entries((10, None)), 2, 16, None), ([], 2, 16, None),
    ],
)  # fmt: skip
def test_a_resumed_run_uses_the_steps_of_earlier_attempts(
    entries: list[LogEntry], world_size: int, effective_batch: int, expected_seconds: float | None
) -> None:
    saved_facts, current_facts = RunFacts(world_size=2, effective_batch=16), RunFacts(world_size=world_size, effective_batch=effective_batch)
    assert estimate_step_seconds(entries, saved_facts, current_facts) == expected_seconds


def test_the_estimate_after_a_resume_changes_to_the_measured_steps(clock: FakeClock) -> None:
    state = RunState()
    state.set_expected_step_seconds(3.0)
    state.merge_progress(Progress(step=40, total_steps=100))
    assert state.report().progress.seconds_remaining == 180
    for step in range(41, 48):
        clock.now += 2
        state.record_step(step)
        steps_left = 100 - step
        assert state.report().progress.seconds_remaining == (2 if step > 45 else 3) * steps_left
