"""Decides when a changed status is written, and how often an expensive read may happen.

A status with the end of an attempt, or with an event, is written at once. Changes without an event, and the first status of a new job,
may be deferred while many jobs change at the same time. One later write then contains several changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

BURST_COUNT, BURST_SECONDS = 10, 2.0
"""This many occurrences within this many seconds are a burst."""
MAX_DEFER_SECONDS, RECHECK_SECONDS = 20.0, 5.0
"""Longest delay of a transition during a burst, and the seconds between two checks whether the burst continues."""
JOB_END_SECONDS = 5.0
"""Seconds to wait after the end of all pods for the end of their Job, before the status shows that no pod is ready."""

READ_TIME_SHARE, MAX_READ_PAUSE = 20, 10.0
"""The pause after a read is this many times the read's duration, at most this many seconds: reads take 1/20 of the time."""
MAX_READ_DELAY = 120.0
"""Longest delay of a reservation in seconds, however many callers wait."""


class BurstDetector:
    """Detects many occurrences in a short time. Times are in seconds, from any clock."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=BURST_COUNT)

    def record(self, now: float) -> None:
        """Count one occurrence."""
        self._times.append(now)

    def is_active(self, now: float) -> bool:
        """Whether the last `BURST_COUNT` occurrences happened within `BURST_SECONDS`."""
        return len(self._times) == BURST_COUNT and now - self._times[0] <= BURST_SECONDS


@dataclass
class PendingChanges:
    """Changes of one job that its stored status does not show yet; times of the event loop."""

    created_at: float | None = None
    """When the first status of a new job was deferred."""
    transition_at: float | None = None
    """When the oldest unwritten transition was first seen."""
    pods_ended_at: float | None = None
    """When all pods were first seen to have ended while their Job had not."""
    progress_at: float = float("-inf")
    """When the operator received the progress that was written last."""


class StatusThrottle:
    """Computes how long a status write is deferred. One instance per process, because a burst is detected over all jobs."""

    def __init__(self, progress_seconds: float):
        self._progress_seconds = progress_seconds
        self._transitions = BurstDetector()

    def progress_delay(self, pending: PendingChanges, now: float, burst_seconds: float = 0.0) -> float:
        """Seconds until a status without a transition may be written; zero or less: now.

        During a burst it may be deferred `burst_seconds` beyond the normal interval.
        """
        pending.transition_at, pending.pods_ended_at = None, None
        due = pending.progress_at + self._progress_seconds
        if now < due or not self._transitions.is_active(now):
            return due - now
        return min(RECHECK_SECONDS, due + burst_seconds - now)

    def transition_delay(self, pending: PendingChanges, *, pods_ended: bool, now: float) -> float:
        """Seconds until a status with a transition that may be deferred is written; zero: now."""
        if pending.transition_at is None:
            pending.transition_at = now if pending.created_at is None else pending.created_at
            self._transitions.record(now)
        burst = self._transitions.is_active(now)
        delay = max(0.0, min(RECHECK_SECONDS, pending.transition_at + MAX_DEFER_SECONDS - now)) if burst else 0.0
        if not pods_ended:
            pending.pods_ended_at = None
            return delay
        pending.pods_ended_at = now if pending.pods_ended_at is None else pending.pods_ended_at
        return max(delay, pending.pods_ended_at + JOB_END_SECONDS - now)

    @staticmethod
    def record_write(pending: PendingChanges, progress_at: float) -> None:
        """Record that all changes are written, with progress that was received at `progress_at`."""
        pending.created_at, pending.transition_at, pending.pods_ended_at = None, None, None
        pending.progress_at = progress_at


class RateLimiter:
    """Spreads expensive reads over time, so that the reads take at most 1/`READ_TIME_SHARE` of the time."""

    def __init__(self) -> None:
        self._pause = 0.0
        self._next_free = float("-inf")
        self._reserved: set[Hashable] = set()

    def __contains__(self, caller: Hashable) -> bool:
        """Whether the caller holds a reservation that it has not used yet."""
        return caller in self._reserved

    def reserve(self, caller: Hashable, now: float) -> float:
        """Reserve a read and return its time: after all other reservations, or within `MAX_READ_DELAY` if there are too many."""
        offset = max(0.0, self._next_free - now) + len(self._reserved) * self._pause
        self._reserved.add(caller)
        return now + offset % MAX_READ_DELAY

    def release(self, caller: Hashable) -> None:
        """Drop the caller's reservation, used or not."""
        self._reserved.discard(caller)

    def record_read(self, started: float, now: float) -> None:
        """Record the duration of a read, which determines the next pause."""
        self._pause = min(READ_TIME_SHARE * (now - started), MAX_READ_PAUSE)
        self._next_free = now + self._pause
