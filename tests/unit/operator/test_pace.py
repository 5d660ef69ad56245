"""When a status that changed is written, and who has the next turn."""

from __future__ import annotations

import pytest
from finetune_operator.pace import (
    ENDING,
    LATEST,
    LONGEST_PAUSE,
    LONGEST_WAIT,
    RUSH_COUNT,
    RUSH_SECONDS,
    SHARE,
    STEP,
    Pace,
    Rush,
    Turns,
    Untold,
)


def rushing(pace: Pace, now: float) -> None:
    """Transitions of other jobs are seen, as many as make a rush."""
    for _ in range(RUSH_COUNT):
        pace.transition(Untold(), pods_over=False, now=now)


def test_a_rush_is_many_in_a_short_time() -> None:
    rush = Rush()
    for number in range(RUSH_COUNT):
        assert not rush.on(100.0)
        rush.note(100.0 + number / 10)
    assert rush.on(100.0 + RUSH_SECONDS)
    assert not rush.on(100.1 + RUSH_SECONDS)


def test_what_comes_alone_is_told_at_once() -> None:
    pace = Pace(15.0)
    assert pace.transition(Untold(), pods_over=False, now=50.0) == 0.0


def test_in_a_rush_a_transition_waits_for_the_next_of_its_job() -> None:
    pace, untold = Pace(15.0), Untold()
    rushing(pace, 50.0)
    assert pace.transition(untold, pods_over=False, now=50.0) == STEP
    assert untold.news == 50.0


def test_it_waits_no_longer_than_the_rush() -> None:
    pace, untold = Pace(15.0), Untold()
    rushing(pace, 50.0)
    pace.transition(untold, pods_over=False, now=50.0)
    assert pace.transition(untold, pods_over=False, now=50.1 + RUSH_SECONDS) == 0.0


@pytest.mark.parametrize(
    ("passed", "pods_over", "wait"),
    [(LATEST - STEP - 1, False, STEP), (LATEST - 2, False, 2.0), (LATEST, False, 0.0), (LATEST - 2, True, ENDING)],
    ids=["it goes on", "the last seconds", "the end", "pods that are over wait for the longer of both"],
)
def test_a_rush_that_does_not_end_keeps_a_transition_back_for_a_while_only(
    passed: float, pods_over: bool, wait: float
) -> None:
    pace, untold = Pace(15.0), Untold()
    rushing(pace, 50.0)
    pace.transition(untold, pods_over=False, now=50.0)
    rushing(pace, 50.0 + passed)
    assert pace.transition(untold, pods_over=pods_over, now=50.0 + passed) == wait


def test_pods_that_are_over_wait_for_their_job() -> None:
    pace, untold = Pace(15.0), Untold()
    assert pace.transition(untold, pods_over=True, now=50.0) == ENDING
    assert pace.transition(untold, pods_over=True, now=50.0 + ENDING) == 0.0


def test_figures_are_told_once_a_period_and_are_no_news() -> None:
    pace, untold = Pace(15.0), Untold(progress_written=100.0)
    assert pace.figures(untold, 104.0) == 11.0
    for _ in range(2 * RUSH_COUNT):
        pace.figures(untold, 104.0)
    assert pace.transition(untold, pods_over=False, now=104.0) == 0.0


@pytest.mark.parametrize(("passed", "wait"), [(4.0, 11.0), (15.0, STEP), (33.0, 2.0), (35.0, 0.0)])
def test_figures_before_the_first_step_may_wait_for_the_end_of_a_rush(passed: float, wait: float) -> None:
    pace, untold = Pace(15.0), Untold(progress_written=100.0)
    rushing(pace, 100.0 + passed)
    assert pace.figures(untold, 100.0 + passed, LATEST) == wait
    assert pace.figures(untold, 101.0 + passed + RUSH_SECONDS, LATEST) == 12.0 - passed


def test_progress_waits_for_no_rush() -> None:
    pace, untold = Pace(15.0), Untold(progress_written=100.0)
    rushing(pace, 116.0)
    assert pace.figures(untold, 116.0) == -1.0


def test_a_transition_that_was_taken_back_does_not_age() -> None:
    pace, untold = Pace(15.0), Untold()
    rushing(pace, 50.0)
    pace.transition(untold, pods_over=False, now=50.0)
    pace.transition(untold, pods_over=True, now=55.0)
    pace.figures(untold, 60.0)
    rushing(pace, 69.0)
    assert pace.transition(untold, pods_over=False, now=69.0) == STEP
    pace.figures(untold, 80.0)
    assert pace.transition(untold, pods_over=True, now=81.0) == ENDING


def test_after_a_write_everything_is_new() -> None:
    pace, untold = Pace(15.0), Untold()
    pace.transition(untold, pods_over=True, now=50.0)
    pace.written(untold, 54.0)
    assert untold == Untold(progress_written=54.0)
    assert pace.figures(untold, 60.0) == 9.0


def test_a_first_status_that_was_put_off_ages_from_then_on() -> None:
    pace, untold = Pace(15.0), Untold(begun=50.0)
    rushing(pace, 48.0 + LATEST)
    assert pace.transition(untold, pods_over=False, now=48.0 + LATEST + 1) == 1.0
    assert pace.transition(untold, pods_over=False, now=48.0 + LATEST + 2) == 0.0


def test_turns_leave_time_between_them_for_others() -> None:
    turns = Turns()
    assert [turns.book(one, 10.0) for one in "abc"] == [10.0, 10.0, 10.0]
    for one in "abc":
        turns.leave(one)
    turns.took(19.9, 20.0)
    assert [turns.book(one, 20.0) for one in "abc"] == pytest.approx([20.0 + 0.1 * SHARE * number for number in (1, 2, 3)])


def test_who_wants_no_turn_any_more_keeps_nobody_waiting() -> None:
    turns = Turns()
    turns.took(0.0, 0.1)
    for number in range(1000):
        turns.book(number, 1.0)
    for number in range(1000):
        turns.leave(number)
    assert turns.book("lone", 60.0) == 60.0


def test_one_slow_turn_is_no_reason_to_wait_for_ever() -> None:
    turns = Turns()
    turns.took(0.0, 150.0)
    assert turns.book("next", 150.0) == 150.0 + LONGEST_PAUSE


def test_too_many_for_turns_of_their_own_are_spread_over_the_longest_wait() -> None:
    turns = Turns()
    turns.took(0.0, 150.0)
    booked = [turns.book(number, 150.0) - 150.0 for number in range(1200)]
    assert min(booked) == 0.0 and max(booked) == LONGEST_WAIT - LONGEST_PAUSE
    assert {booked.count(moment) for moment in set(booked)} == {int(1200 * LONGEST_PAUSE / LONGEST_WAIT)}
