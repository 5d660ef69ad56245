"""A work queue as client-go has it: a key is never handled by two workers at once, and nothing that arrives is lost.

A key added while it waits is the same key; added while it is being worked on, it comes back once. Failures wait longer each
time; `add_after` wakes a key at a time, and the earliest of several times wins.

Keys that were hurried come first, so that in a burst every new job is started before the others are told about; one in a few turns
still goes to those that wait longer.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from finetune_operator.pace import Rush

FIRST_BACKOFF, LONGEST_BACKOFF = 0.005, 300.0
HURRIED_IN_A_ROW = 7
"""Turns that hurried keys may have before one of the others."""


class Key(NamedTuple):
    """A FineTuneJob, by name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class WorkQueue:
    """Keys to look at. For one event loop; `clock` is in seconds and only its differences matter."""

    def __init__(self, clock: Callable[[], float] | None = None):
        self._clock = clock or asyncio.get_running_loop().time
        self._ready: deque[Key] = deque()
        self._hurried: deque[Key] = deque()
        self._in_a_row = 0
        self._rush = Rush()
        self._since: dict[Key, float] = {}
        self._working: dict[Key, float] = {}
        self._again: set[Key] = set()
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def add(self, key: Key) -> None:
        """Look at `key` as soon as a worker is free."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._since:
            self._since[key] = self._clock()
            self._ready.append(key)
            self._changed.set()

    def hurry(self, key: Key) -> None:
        """Look at `key` before those that were only added."""
        if key not in self._working and key not in self._since:
            self._since[key] = self._clock()
            self._hurried.append(key)
            self._changed.set()
        else:
            self.add(key)

    def add_after(self, key: Key, seconds: float) -> None:
        """Look at `key` in that many seconds, unless an earlier time is set already."""
        if seconds <= 0:
            self.add(key)
            return
        due = self._clock() + seconds
        if due < self._due.get(key, float("inf")):
            self._due[key] = due
            heapq.heappush(self._heap, (due, key))
            self._changed.set()

    def failed(self, key: Key) -> float:
        """Look at `key` again after a pause that doubles with each failure in a row; returns the pause in seconds."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        pause = float(min(FIRST_BACKOFF * 2 ** min(count, 32), LONGEST_BACKOFF))
        self.add_after(key, pause)
        return pause

    def forget(self, key: Key) -> None:
        """The last look at `key` went well."""
        self._failures.pop(key, None)

    def cancel(self, key: Key) -> None:
        """Drop a time set by `add_after`: the next look will set a new one."""
        self._due.pop(key, None)

    async def take(self) -> tuple[Key, float]:
        """Wait for a key, and how many seconds it waited. `done` must follow."""
        while True:
            self._promote()
            if self._ready or self._hurried:
                key = self._pop()
                now = self._clock()
                waited = now - self._since.pop(key)
                self._working[key] = now
                self._due.pop(key, None)
                return key, waited
            self._changed.clear()
            try:
                async with asyncio.timeout(self._next_due()):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def _pop(self) -> Key:
        hurried = self._hurried and (not self._ready or self._in_a_row < HURRIED_IN_A_ROW)
        self._in_a_row = self._in_a_row + 1 if hurried else 0
        if not hurried:
            return self._ready.popleft()
        self._rush.note(self._clock())
        return self._hurried.popleft()

    def done(self, key: Key) -> None:
        """A worker is through with `key`."""
        del self._working[key]
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def drop_waiting(self) -> None:
        """Forget everything that waits: the process is about to end, and its successor looks at everything anyway."""
        self._ready.clear()
        self._hurried.clear()
        self._since.clear()
        self._again.clear()
        self._due.clear()

    def restart_wait_times(self) -> None:
        """Count the waiting time of all queued keys from now, as `oldest` and `take` report it."""
        now = self._clock()
        self._since = dict.fromkeys(self._since, now)

    def oldest(self) -> float:
        """Seconds that the longest-waiting or longest-worked-on key has been there."""
        now = self._clock()
        times = [*self._since.values(), *self._working.values()]
        return now - min(times) if times else 0.0

    @property
    def rush(self) -> bool:
        """Hurried keys come one upon another, or did until a moment ago."""
        return self._rush.on(self._clock())

    def __len__(self) -> int:
        return len(self._ready) + len(self._hurried)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is worked on."""
        return not len(self) and not self._working

    def _promote(self) -> None:
        now = self._clock()
        while self._heap and self._heap[0][0] <= now:
            due, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)
        if len(self):
            self._changed.set()

    def _next_due(self) -> float | None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None
