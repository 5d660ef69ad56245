"""The work queue: one worker per key, priorities, delays and backoff."""

from __future__ import annotations

import asyncio

import pytest
from finetune_operator.workqueue import HIGH_PRIORITY_IN_A_ROW, Key, WorkQueue

A, B = Key("team", "a"), Key("team", "b")


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_key_that_is_added_twice_is_queued_once(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add(A)
    queue.add(A)
    queue.add(B)
    assert [(await queue.take())[0], (await queue.take())[0]] == [A, B]
    assert len(queue) == 0


async def test_key_added_while_it_is_processed_is_queued_once_afterwards(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add(A)
    await queue.take()
    queue.add(A)
    queue.add(A)
    assert len(queue) == 0
    queue.done(A)
    assert (await queue.take())[0] == A
    queue.done(A)
    assert queue.is_idle


async def test_high_priority_keys_come_first_without_starving_the_others(clock: Clock) -> None:
    queue = WorkQueue(clock)
    old = [Key("team", f"old{number}") for number in range(3)]
    new = [Key("team", f"new{number}") for number in range(HIGH_PRIORITY_IN_A_ROW + 2)]
    for key in old:
        queue.add(key)
    for key in new:
        queue.add_high_priority(key)
    queue.add_high_priority(old[0])
    assert len(queue) == len(old) + len(new)
    taken = [(await queue.take())[0] for _ in [*old, *new]]
    assert taken == [*new[:HIGH_PRIORITY_IN_A_ROW], old[0], *new[HIGH_PRIORITY_IN_A_ROW:], *old[1:]]


async def test_high_priority_key_added_while_it_is_processed_is_queued_afterwards(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add(A)
    await queue.take()
    queue.add_high_priority(A)
    assert len(queue) == 0
    queue.done(A)
    assert (await queue.take())[0] == A


async def test_cleared_queue_is_idle_when_its_workers_are_done(clock: Clock) -> None:
    queue = WorkQueue(clock)
    for key in (A, B):
        queue.add_high_priority(key)
    await queue.take()
    queue.add(A)
    queue.add_after(B, 5)
    queue.clear()
    assert not queue.is_idle
    queue.done(A)
    assert queue.is_idle
    assert queue.seconds_until_due() is None


async def test_earliest_of_several_delays_is_used(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add_after(A, 50)
    queue.add_after(A, 10)
    queue.add_after(A, 30)
    clock.now += 10
    assert (await queue.take())[0] == A
    queue.done(A)
    clock.now += 100
    queue.add(B)
    assert (await queue.take())[0] == B
    assert len(queue) == 0


async def test_backoff_doubles_up_to_five_minutes_and_can_be_reset(clock: Clock) -> None:
    queue = WorkQueue(clock)
    pauses = [queue.add_after_failure(A) for _ in range(20)]
    assert pauses[:4] == [0.005, 0.01, 0.02, 0.04]
    assert pauses[-1] == 300
    queue.reset_failures(A)
    assert queue.add_after_failure(A) == 0.005


async def test_age_of_the_oldest_key_includes_waiting_and_processing(clock: Clock) -> None:
    queue = WorkQueue(clock)
    assert queue.oldest_key_age_seconds() == 0
    queue.add(A)
    clock.now += 7
    queue.add(B)
    assert queue.oldest_key_age_seconds() == 7
    _, waited = await queue.take()
    assert waited == 7
    clock.now += 5
    assert queue.oldest_key_age_seconds() == 5


async def test_restarted_wait_times_count_from_now(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add(A)
    clock.now += 500
    queue.restart_wait_times()
    clock.now += 7
    assert queue.oldest_key_age_seconds() == 7
    assert await queue.take() == (A, 7)


async def test_take_returns_when_a_delay_ends() -> None:
    queue = WorkQueue()
    queue.add_after(A, 0.01)
    assert (await asyncio.wait_for(queue.take(), 5))[0] == A
