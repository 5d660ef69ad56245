"""The work queue: a key is handled by at most one worker at a time, and keys have priorities, delays and backoff."""

from __future__ import annotations

import asyncio

import pytest
from finetune_operator.throttle import BURST_COUNT
from finetune_operator.workqueue import MAX_HIGH_PRIORITY_IN_A_ROW, UPDATE_DELAY_SECONDS, JobKey, WorkQueue

A, B = JobKey("team", "a"), JobKey("team", "b")


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


async def test_high_priority_keys_come_first_but_do_not_starve_normal_keys(clock: Clock) -> None:
    queue = WorkQueue(clock)
    old_keys = [JobKey("team", f"old{number}") for number in range(3)]
    new_keys = [JobKey("team", f"new{number}") for number in range(MAX_HIGH_PRIORITY_IN_A_ROW + 2)]
    for key in old_keys:
        queue.add(key)
    for key in new_keys:
        queue.add_high_priority(key)
    queue.add_high_priority(old_keys[0])
    assert len(queue) == len(old_keys) + len(new_keys)
    taken_keys = [(await queue.take())[0] for _ in [*old_keys, *new_keys]]
    assert taken_keys == [*new_keys[:MAX_HIGH_PRIORITY_IN_A_ROW], old_keys[0], *new_keys[MAX_HIGH_PRIORITY_IN_A_ROW:], *old_keys[1:]]


async def take_until(queue: WorkQueue, key: JobKey) -> int:
    """Take keys from the queue until it returns `key`. Return the number of keys that were taken before `key`."""
    for count in range(100_000):
        taken_key, _ = await queue.take()
        queue.done(taken_key)
        if taken_key == key:
            return count
    raise AssertionError(f"{key} was never taken")


async def test_namespaces_take_turns(clock: Clock) -> None:
    queue = WorkQueue(clock)
    for namespace, count in (("a", 4), ("b", 2), ("c", 1)):
        for number in range(count):
            queue.add(JobKey(namespace, str(number)))
    taken_keys = [str((await queue.take())[0]) for _ in range(7)]
    assert taken_keys == ["a/0", "b/0", "c/0", "a/1", "b/1", "a/2", "a/3"]
    assert len(queue) == 0


@pytest.mark.parametrize("priorities", ["normal", "high", "both"])
async def test_namespace_with_thousands_of_jobs_does_not_delay_another_namespace(clock: Clock, priorities: str) -> None:
    """Before a key, workers take at most one key of each other namespace. Before a key with normal priority, they may also take up to seven high-priority
    keys.
    """
    queue, other_key = WorkQueue(clock), JobKey("other", "job")
    for number in range(5000):
        if priorities in ("normal", "both"):
            queue.add(JobKey("busy", f"old-{number}"))
        if priorities in ("high", "both"):
            queue.add_high_priority(JobKey("busy", f"new-{number}"))
    queue.add(other_key)
    expected_counts = {"normal": 1, "high": MAX_HIGH_PRIORITY_IN_A_ROW, "both": 2 * MAX_HIGH_PRIORITY_IN_A_ROW + 1}
    assert await take_until(queue, other_key) == expected_counts[priorities]
    queue.add_high_priority(other_key)
    assert await take_until(queue, other_key) <= 2


async def test_namespace_that_returns_to_the_queue_at_once_does_not_take_all_turns(clock: Clock) -> None:
    """If a job is queued again during each of its reconciles, workers take it and the jobs of another namespace alternately."""
    queue = WorkQueue(clock)
    queue.add(A)
    for number in range(3):
        queue.add(JobKey("other", str(number)))
    taken_keys = []
    for _ in range(6):
        key, _ = await queue.take()
        queue.add(A)
        queue.done(key)
        taken_keys.append(str(key))
    assert taken_keys == ["team/a", "other/0", "team/a", "other/1", "team/a", "other/2"]


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
    pauses_seconds = [queue.add_after_failure(A) for _ in range(20)]
    assert pauses_seconds[:4] == [0.005, 0.01, 0.02, 0.04]
    assert pauses_seconds[-1] == 300
    queue.reset_failures(A)
    assert queue.add_after_failure(A) == 0.005


async def test_age_of_the_oldest_key_includes_waiting_and_processing(clock: Clock) -> None:
    queue = WorkQueue(clock)
    assert queue.oldest_key_age_seconds() == 0
    queue.add(A)
    clock.now += 7
    queue.add(B)
    assert queue.oldest_key_age_seconds() == 7
    _, waited_seconds = await queue.take()
    assert waited_seconds == 7
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


async def test_added_key_wakes_one_idle_worker_and_no_key_is_left_behind() -> None:
    """If each added key woke all idle workers, most of the workers that a burst of updates wakes would find an empty queue."""
    queue = WorkQueue()
    check_count = 0
    queue_due_keys = queue._queue_due_keys

    def count_checks() -> None:
        nonlocal check_count
        check_count += 1
        queue_due_keys()

    queue._queue_due_keys = count_checks  # type: ignore[method-assign]
    workers = [asyncio.create_task(queue.take()) for _ in range(8)]
    await asyncio.sleep(0)
    assert check_count == 8
    queue.add(A)
    queue.add(B)
    for _ in range(3):
        await asyncio.sleep(0)
    assert check_count == 10
    assert [worker.result()[0] for worker in workers if worker.done()] == [A, B]
    for worker in workers:
        worker.cancel()


async def test_key_of_a_cancelled_worker_goes_to_the_next_one() -> None:
    queue = WorkQueue()
    first_worker, second_worker = asyncio.create_task(queue.take()), asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    first_worker.cancel()
    queue.add(A)
    assert (await asyncio.wait_for(second_worker, 5))[0] == A


async def test_earlier_delay_replaces_the_running_timer() -> None:
    queue = WorkQueue()
    queue.add_after(A, 3600)
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.add_after(B, 0.01)
    assert (await asyncio.wait_for(worker, 5))[0] == B


async def test_updates_wait_only_during_a_burst(clock: Clock) -> None:
    queue = WorkQueue(clock)
    keys = [JobKey("team", str(number)) for number in range(BURST_COUNT)]
    for key in keys:
        queue.add_update(key)
    assert len(queue) == BURST_COUNT - 1, "the last update completes the burst"
    queue.add_update(keys[-1])
    assert queue.seconds_until_due() == UPDATE_DELAY_SECONDS
    taken_keys = [(await queue.take())[0] for _ in keys[:-1]]
    assert taken_keys == keys[:-1]
    clock.now += UPDATE_DELAY_SECONDS
    assert await queue.take() == (keys[-1], 0)
    assert queue.seconds_until_due() is None, "two updates are one reconcile"
    clock.now += 60
    queue.add_update(A)
    assert (await queue.take())[0] == A


async def test_key_that_is_added_directly_does_not_wait_for_a_delayed_update(clock: Clock) -> None:
    queue = WorkQueue(clock)
    for _ in range(BURST_COUNT):
        queue.add_update(A)
    await queue.take()
    queue.done(A)
    queue.add_update(A)
    queue.add(A)
    assert (await queue.take())[0] == A
