"""Deferred status writes and rate limited reads."""

from __future__ import annotations

import pytest
from finetune_operator.throttle import (
    BURST_COUNT,
    BURST_SECONDS,
    JOB_END_DELAY_SECONDS,
    MAX_READ_DELAY_SECONDS,
    MAX_READ_PAUSE_SECONDS,
    MIN_DEFER_LIMIT_SECONDS,
    READ_TIME_DIVISOR,
    RECHECK_SECONDS,
    BurstDetector,
    PendingChanges,
    ReadTimeLimiter,
    StatusThrottle,
)


def start_burst(throttle: StatusThrottle, now: float) -> None:
    """Make the throttle detect a burst: BURST_COUNT phase transitions of other jobs are recorded, and their statuses are written."""
    for _ in range(BURST_COUNT):
        other_changes = PendingChanges()
        throttle.compute_transition_delay(other_changes, pods_ended=False, now=now)
        throttle.record_write(other_changes, now)


def test_burst_is_many_occurrences_in_a_short_time() -> None:
    burst = BurstDetector()
    for number in range(BURST_COUNT):
        assert not burst.is_active(100.0)
        burst.record(100.0 + number / 10)
    assert burst.is_active(100.0 + BURST_SECONDS)
    assert not burst.is_active(100.1 + BURST_SECONDS)


def test_single_transition_is_written_at_once() -> None:
    throttle = StatusThrottle(15.0)
    assert throttle.compute_transition_delay(PendingChanges(), pods_ended=False, now=50.0) == 0.0


def test_transition_is_deferred_during_a_burst() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges()
    start_burst(throttle, 50.0)
    assert throttle.compute_transition_delay(pending, pods_ended=False, now=50.0) == RECHECK_SECONDS
    assert pending.transition_at == 50.0


def test_deferred_transition_is_written_when_the_burst_ends() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges()
    start_burst(throttle, 50.0)
    throttle.compute_transition_delay(pending, pods_ended=False, now=50.0)
    assert throttle.compute_transition_delay(pending, pods_ended=False, now=50.1 + BURST_SECONDS) == 0.0


@pytest.mark.parametrize(
    ("passed_seconds", "pods_ended", "delay_seconds"),
    [
        (MIN_DEFER_LIMIT_SECONDS - RECHECK_SECONDS - 1, False, RECHECK_SECONDS),
        (MIN_DEFER_LIMIT_SECONDS - 2, False, 2.0),
        (MIN_DEFER_LIMIT_SECONDS, False, 0.0),
        (MIN_DEFER_LIMIT_SECONDS - 2, True, JOB_END_DELAY_SECONDS),
    ],
    ids=["well before the limit", "just before the limit", "at the limit", "pods ended: the longer of both delays"],
)
def test_long_burst_defers_a_transition_up_to_a_limit(passed_seconds: float, pods_ended: bool, delay_seconds: float) -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges()
    start_burst(throttle, 50.0)
    throttle.compute_transition_delay(pending, pods_ended=False, now=50.0)
    start_burst(throttle, 50.0 + passed_seconds)
    assert throttle.compute_transition_delay(pending, pods_ended=pods_ended, now=50.0 + passed_seconds) == delay_seconds


def test_ended_pods_wait_for_the_end_of_their_job() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges()
    assert throttle.compute_transition_delay(pending, pods_ended=True, now=50.0) == JOB_END_DELAY_SECONDS
    assert throttle.compute_transition_delay(pending, pods_ended=True, now=50.0 + JOB_END_DELAY_SECONDS) == 0.0


def test_progress_is_written_once_per_interval_and_does_not_start_a_burst() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges(progress_at=100.0)
    assert throttle.compute_progress_delay(pending, 104.0) == 11.0
    for _ in range(2 * BURST_COUNT):
        throttle.compute_progress_delay(pending, 104.0)
    assert throttle.compute_transition_delay(pending, pods_ended=False, now=104.0) == 0.0


@pytest.mark.parametrize(("passed_seconds", "delay_seconds"), [(4.0, 11.0), (15.0, RECHECK_SECONDS), (33.0, 2.0), (35.0, 0.0)])
def test_progress_before_the_first_step_is_deferred_during_a_burst(passed_seconds: float, delay_seconds: float) -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges(progress_at=100.0)
    start_burst(throttle, 100.0 + passed_seconds)
    assert throttle.compute_progress_delay(pending, 100.0 + passed_seconds, has_steps=False) == delay_seconds
    assert throttle.compute_progress_delay(pending, 101.0 + passed_seconds + BURST_SECONDS, has_steps=False) == 12.0 - passed_seconds


def test_progress_after_the_first_step_is_not_deferred_during_a_burst() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges(progress_at=100.0)
    start_burst(throttle, 116.0)
    assert throttle.compute_progress_delay(pending, 116.0) == -1.0


def test_reverted_transition_is_no_longer_pending() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges()
    start_burst(throttle, 50.0)
    throttle.compute_transition_delay(pending, pods_ended=False, now=50.0)
    throttle.compute_transition_delay(pending, pods_ended=True, now=55.0)
    throttle.compute_progress_delay(pending, 60.0)
    start_burst(throttle, 69.0)
    assert throttle.compute_transition_delay(pending, pods_ended=False, now=69.0) == RECHECK_SECONDS
    throttle.compute_progress_delay(pending, 80.0)
    assert throttle.compute_transition_delay(pending, pods_ended=True, now=81.0) == JOB_END_DELAY_SECONDS


def test_write_resets_all_pending_changes() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges()
    throttle.compute_transition_delay(pending, pods_ended=True, now=50.0)
    throttle.record_write(pending, 54.0)
    assert (pending.created_at, pending.transition_at, pending.pods_ended_at) == (None, None, None)
    assert (pending.progress_at, pending.defer_limit_seconds) == (54.0, 0.0)
    assert throttle.compute_progress_delay(pending, 60.0) == 9.0


def test_limit_of_a_deferred_first_status_counts_from_its_first_deferral() -> None:
    throttle, pending = StatusThrottle(15.0), PendingChanges(created_at=50.0)
    start_burst(throttle, 48.0 + MIN_DEFER_LIMIT_SECONDS)
    assert throttle.compute_transition_delay(pending, pods_ended=False, now=48.0 + MIN_DEFER_LIMIT_SECONDS + 1) == 1.0
    assert throttle.compute_transition_delay(pending, pods_ended=False, now=48.0 + MIN_DEFER_LIMIT_SECONDS + 2) == 0.0


@pytest.mark.parametrize(
    ("job_count", "limit_seconds"), [(1, 20.0), (400, 20.0), (600, 30.0), (1200, 60.0), (3000, 60.0)],
    ids=["one job", "as long as the lower bound", "in proportion", "as long as the upper bound", "beyond the upper bound"],
)  # fmt: skip
def test_limit_of_a_deferral_grows_with_the_number_of_deferred_jobs(job_count: int, limit_seconds: float) -> None:
    throttle, changes_of_jobs = StatusThrottle(15.0), [PendingChanges() for _ in range(job_count)]
    for pending in changes_of_jobs:
        throttle.defer_first_status(pending, 50.0)
    assert throttle.compute_first_status_due_at(changes_of_jobs[0]) == 50.0 + limit_seconds
    for pending in changes_of_jobs[1:]:
        throttle.record_write(pending, 60.0)
    assert throttle.compute_first_status_due_at(changes_of_jobs[0]) == 50.0 + limit_seconds  # for a deferred job, the limit stays when fewer jobs are deferred
    throttle.defer_first_status(changes_of_jobs[-1], 70.0)
    assert throttle.compute_first_status_due_at(changes_of_jobs[-1]) == 70.0 + MIN_DEFER_LIMIT_SECONDS


def test_jobs_whose_status_is_up_to_date_again_do_not_count_as_deferred() -> None:
    throttle, changes_of_jobs, pending = StatusThrottle(15.0), [PendingChanges() for _ in range(1000)], PendingChanges()
    for reverted_change in changes_of_jobs:
        throttle.defer_first_status(reverted_change, 50.0)
        throttle.record_reverted_change(reverted_change)
    throttle.defer_first_status(pending, 50.0)
    assert throttle.compute_first_status_due_at(pending) == 50.0 + MIN_DEFER_LIMIT_SECONDS


def test_deleted_jobs_do_not_count_as_deferred() -> None:
    throttle, deleted_changes, pending = StatusThrottle(15.0), [PendingChanges() for _ in range(1000)], PendingChanges()
    for deleted_change in deleted_changes:
        throttle.defer_first_status(deleted_change, 50.0)
    del deleted_change, deleted_changes
    throttle.defer_first_status(pending, 50.0)
    assert throttle.compute_first_status_due_at(pending) == 50.0 + MIN_DEFER_LIMIT_SECONDS


def test_reads_pause_in_proportion_to_the_duration_of_the_last_read() -> None:
    limiter = ReadTimeLimiter()
    assert [limiter.reserve_read(caller, 10.0) for caller in "abc"] == [10.0, 10.0, 10.0]
    for caller in "abc":
        limiter.release(caller)
    limiter.record_read(19.9, 20.0)
    expected_times = [20.0 + 0.1 * READ_TIME_DIVISOR * number for number in (1, 2, 3)]
    assert [limiter.reserve_read(caller, 20.0) for caller in "abc"] == pytest.approx(expected_times)


def test_released_reservations_delay_no_other_caller() -> None:
    limiter = ReadTimeLimiter()
    limiter.record_read(0.0, 0.1)
    for number in range(1000):
        limiter.reserve_read(number, 1.0)
    for number in range(1000):
        limiter.release(number)
    assert limiter.reserve_read("only", 60.0) == 60.0


def test_pause_after_a_slow_read_is_limited() -> None:
    limiter = ReadTimeLimiter()
    limiter.record_read(0.0, 150.0)
    assert limiter.reserve_read("next", 150.0) == 150.0 + MAX_READ_PAUSE_SECONDS


def test_too_many_reservations_are_spread_over_the_longest_delay() -> None:
    limiter = ReadTimeLimiter()
    limiter.record_read(0.0, 150.0)
    delays_seconds = [limiter.reserve_read(number, 150.0) - 150.0 for number in range(1200)]
    assert min(delays_seconds) == 0.0 and max(delays_seconds) == MAX_READ_DELAY_SECONDS - MAX_READ_PAUSE_SECONDS
    assert {delays_seconds.count(delay_seconds) for delay_seconds in set(delays_seconds)} == {int(1200 * MAX_READ_PAUSE_SECONDS / MAX_READ_DELAY_SECONDS)}
