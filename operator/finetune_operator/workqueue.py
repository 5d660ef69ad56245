"""A work queue with the semantics of client-go: only one worker handles a key at a time, and no added key is lost.

If a key is already queued, adding it again changes nothing. If a key is added while a worker handles it, it is queued again afterwards.
The pause after a failure doubles with each failure in a row. If `add_after` is called several times for a key, the earliest time is used.

Namespaces take turns: a namespace with thousands of queued jobs does not delay the jobs of other namespaces.

If a Job or pod changes, the key of its FineTuneJob is added with `add_update`. During a burst of such updates, a key waits for two seconds, so that one
reconcile handles several updates. Workers take high-priority keys first, so in a burst of new jobs, all Jobs are created before statuses are updated.
After several high-priority keys in a row, a worker takes one key with normal priority.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from finetune_operator.throttle import BurstDetector

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.005, 300.0
MAX_HIGH_PRIORITY_IN_A_ROW = 7
"""After this many high-priority keys in a row, a worker takes one key with normal priority."""
UPDATE_DELAY_SECONDS = 2.0
"""Seconds that a key waits during a burst of updates. The pods and the Job of an attempt change several times within seconds."""


class JobKey(NamedTuple):
    """Namespace and name of a FineTuneJob."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class FairQueue:
    """Queue in which namespaces take turns. Keys of the same namespace leave the queue in the order in which they were added."""

    def __init__(self) -> None:
        self._keys_by_namespace: OrderedDict[str, deque[JobKey]] = OrderedDict()
        self._count = 0

    def append(self, key: JobKey) -> None:
        """Add a key after the other keys of its namespace. If the namespace had no keys, its turn comes after the other namespaces."""
        self._keys_by_namespace.setdefault(key.namespace, deque()).append(key)
        self._count += 1

    def popleft(self) -> JobKey:
        """Remove and return the first key of the namespace whose turn it is."""
        namespace, keys = self._keys_by_namespace.popitem(last=False)
        key = keys.popleft()
        if keys:
            self._keys_by_namespace[namespace] = keys
        self._count -= 1
        return key

    def clear(self) -> None:
        """Remove all keys."""
        self._keys_by_namespace.clear()
        self._count = 0

    def __len__(self) -> int:
        return self._count


class WorkQueue:
    """Queue of keys to reconcile. Not thread-safe: all callers run in one event loop. `clock` returns a monotonic time in seconds."""

    def __init__(self, clock: Callable[[], float] | None = None):
        self._clock = clock or asyncio.get_running_loop().time
        self._ready = FairQueue()
        self._high_priority_queue = FairQueue()
        self._high_priority_count_in_a_row = 0
        self._burst_detector = BurstDetector()
        self._update_burst = BurstDetector()
        self._waiting_since: dict[JobKey, float] = {}
        self._working_since: dict[JobKey, float] = {}
        self._added_while_working: set[JobKey] = set()
        self._due_times: dict[JobKey, float] = {}
        self._heap: list[tuple[float, JobKey]] = []
        self._failures: dict[JobKey, int] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()
        """One future for each idle worker, in the order in which the workers became idle."""
        self._timer: asyncio.TimerHandle | None = None
        """Timer that fires at `_timer_due_at`, when the earliest delayed key is due."""
        self._timer_due_at: float | None = None

    def add(self, key: JobKey) -> None:
        """Queue `key` for the next free worker."""
        if key in self._working_since:
            self._added_while_working.add(key)
        elif key not in self._waiting_since:
            self._waiting_since[key] = self._clock()
            self._ready.append(key)
            self._wake_worker()

    def add_high_priority(self, key: JobKey) -> None:
        """Queue `key` before all keys with normal priority."""
        if key not in self._working_since and key not in self._waiting_since:
            self._waiting_since[key] = self._clock()
            self._high_priority_queue.append(key)
            self._wake_worker()
        else:
            self.add(key)

    @property
    def is_update_burst(self) -> bool:
        """Whether many Jobs and pods have changed during the last seconds."""
        return self._update_burst.is_active(self._clock())

    def add_update(self, key: JobKey) -> None:
        """Queue `key` because one of its objects has changed. During a burst of such changes, the key is queued after a short delay."""
        self._update_burst.record(self._clock())
        if self.is_update_burst:
            self.add_after(key, UPDATE_DELAY_SECONDS)
        else:
            self.add(key)

    def add_after(self, key: JobKey, seconds: float) -> None:
        """Queue `key` after a delay. If `key` is already due earlier, the call changes nothing."""
        if seconds <= 0:
            self.add(key)
            return
        due_at = self._clock() + seconds
        if due_at < self._due_times.get(key, float("inf")):
            self._due_times[key] = due_at
            heapq.heappush(self._heap, (due_at, key))
            self._set_timer()

    def add_after_failure(self, key: JobKey) -> float:
        """Queue `key` after a pause that doubles with each failure in a row. Returns the pause in seconds."""
        failure_count = self._failures.get(key, 0)
        self._failures[key] = failure_count + 1
        pause_seconds = float(min(FIRST_BACKOFF_SECONDS * 2 ** min(failure_count, 32), LONGEST_BACKOFF_SECONDS))
        self.add_after(key, pause_seconds)
        return pause_seconds

    def reset_failures(self, key: JobKey) -> None:
        """Reset the failure counter of `key` after a reconcile without an error."""
        self._failures.pop(key, None)

    async def take(self) -> tuple[JobKey, float]:
        """Wait for a key. Returns the key and the seconds for which it was queued. The worker must call `done` afterwards."""
        while True:
            self._queue_due_keys()
            if len(self):
                key = self._pop_next_key()
                now = self._clock()
                waited_seconds = now - self._waiting_since.pop(key)
                self._working_since[key] = now
                self._due_times.pop(key, None)
                return key, waited_seconds
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _wake_worker(self) -> None:
        """Wake one idle worker for the new key. Waking all of them would be useless, because only one of them gets the key."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _set_timer(self) -> None:
        """Start the timer for the earliest delayed key, unless the timer already runs for that time."""
        seconds = self.seconds_until_due()
        due_at = None if seconds is None else self._heap[0][0]
        if due_at == self._timer_due_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._on_timer)
        self._timer_due_at = due_at

    def _on_timer(self) -> None:
        self._timer_due_at = None
        self._queue_due_keys()

    def _pop_next_key(self) -> JobKey:
        takes_high_priority = self._high_priority_queue and (
            not self._ready or self._high_priority_count_in_a_row < MAX_HIGH_PRIORITY_IN_A_ROW
        )
        self._high_priority_count_in_a_row = self._high_priority_count_in_a_row + 1 if takes_high_priority else 0
        if not takes_high_priority:
            return self._ready.popleft()
        self._burst_detector.record(self._clock())
        return self._high_priority_queue.popleft()

    def done(self, key: JobKey) -> None:
        """Record that the worker has handled `key`. If the key was added during this time, queue it again."""
        del self._working_since[key]
        if key in self._added_while_working:
            self._added_while_working.discard(key)
            self.add(key)

    def clear(self) -> None:
        """Drop all queued keys before the process ends. The next process reconciles every job at its start."""
        self._ready.clear()
        self._high_priority_queue.clear()
        self._waiting_since.clear()
        self._added_while_working.clear()
        self._due_times.clear()

    def restart_wait_times(self) -> None:
        """Measure the waiting times of all queued keys from now on. `oldest_key_age_seconds` and `take` report these times."""
        now = self._clock()
        self._waiting_since = dict.fromkeys(self._waiting_since, now)

    def oldest_key_age_seconds(self) -> float:
        """Return the longest time in seconds for which a key has been queued or a worker has been handling a key. The result is 0 if there is no key."""
        now = self._clock()
        start_times = [*self._waiting_since.values(), *self._working_since.values()]
        return now - min(start_times) if start_times else 0.0

    @property
    def is_burst(self) -> bool:
        """Whether workers took many high-priority keys within the last `BURST_SECONDS`."""
        return self._burst_detector.is_active(self._clock())

    def __len__(self) -> int:
        return len(self._ready) + len(self._high_priority_queue)

    @property
    def is_idle(self) -> bool:
        """Whether no key is queued and no worker handles a key."""
        return not len(self) and not self._working_since

    def _queue_due_keys(self) -> None:
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            due_at, key = heapq.heappop(self._heap)
            if self._due_times.get(key) == due_at:
                del self._due_times[key]
                self.add(key)
        self._set_timer()

    def seconds_until_due(self) -> float | None:
        """Return the seconds until the next delayed key is due, or None if no key is delayed."""
        while self._heap and self._due_times.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None
