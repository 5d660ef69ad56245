"""Decides when a changed status is written, and limits the rate of expensive reads.

If an attempt ends or the change causes an event, the status is written at once. While many jobs change at the same time, other changes and
the first status of a new job may be deferred. One later write then contains several changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

BURST_COUNT, BURST_SECONDS = 10, 2.0
"""`BURST_COUNT` occurrences within `BURST_SECONDS` seconds are a burst."""
MAX_DEFER_SECONDS, RECHECK_SECONDS = 20.0, 10.0
"""Maximum delay of a transition during a burst, and seconds between two checks whether the burst continues."""
JOB_END_SECONDS = 5.0
"""If all pods have ended but their Job has not, the status shows the pods as not ready only after this many seconds."""

READ_TIME_DIVISOR, MAX_READ_PAUSE = 20, 10.0
"""The pause after a read is `READ_TIME_DIVISOR` times the read's duration, but at most `MAX_READ_PAUSE` seconds."""
MAX_READ_DELAY = 120.0
"""Maximum delay of a reservation in seconds, for any number of waiting callers."""


class BurstDetector:
    """Detects many occurrences in a short time. All times are in seconds of the same clock."""

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
    """Changes of one job that its stored status does not show yet. All times are event loop times."""

    created_at: float | None = None
    """When the first status of a new job was deferred."""
    transition_at: float | None = None
    """When the operator first saw the oldest unwritten transition."""
    pods_ended_at: float | None = None
    """When the operator first saw that all pods had ended but their Job had not."""
    progress_at: float = float("-inf")
    """When the operator received the progress in the last status write."""


class StatusThrottle:
    """Computes how long a status write is deferred. All jobs share one instance, because bursts are detected across jobs."""

    def __init__(self, progress_seconds: float):
        self._progress_seconds = progress_seconds
        self._transitions = BurstDetector()

    def progress_delay(self, pending: PendingChanges, now: float, burst_seconds: float = 0.0) -> float:
        """Return the seconds until a status without a transition may be written. 0 or a negative result: the status may be written now.

        During a burst, the write may be deferred for `burst_seconds` beyond the normal interval.
        """
        pending.transition_at, pending.pods_ended_at = None, None
        due_at = pending.progress_at + self._progress_seconds
        if now < due_at or not self._transitions.is_active(now):
            return due_at - now
        return min(RECHECK_SECONDS, due_at + burst_seconds - now)

    def transition_delay(self, pending: PendingChanges, *, pods_ended: bool, now: float) -> float:
        """Return how many seconds the write of this status may still be delayed. 0: the status must be written now.

        Call this only if every change in this status may be written late.
        """
        if pending.transition_at is None:
            pending.transition_at = now if pending.created_at is None else pending.created_at
            self._transitions.record(now)
        is_burst = self._transitions.is_active(now)
        delay_seconds = max(0.0, min(RECHECK_SECONDS, pending.transition_at + MAX_DEFER_SECONDS - now)) if is_burst else 0.0
        if not pods_ended:
            pending.pods_ended_at = None
            return delay_seconds
        pending.pods_ended_at = now if pending.pods_ended_at is None else pending.pods_ended_at
        return max(delay_seconds, pending.pods_ended_at + JOB_END_SECONDS - now)

    @staticmethod
    def record_write(pending: PendingChanges, progress_at: float) -> None:
        """Clear the pending changes after a status write. `progress_at`: when the operator received the progress in that write."""
        pending.created_at, pending.transition_at, pending.pods_ended_at = None, None, None
        pending.progress_at = progress_at


class ReadTimeLimiter:
    """Spreads expensive reads over time. Usually the reads take at most 1/`READ_TIME_DIVISOR` of the time."""

    def __init__(self) -> None:
        self._pause_seconds = 0.0
        self._next_free_at = float("-inf")
        self._reserved: set[Hashable] = set()

    def __contains__(self, caller: Hashable) -> bool:
        """Whether the caller has a reservation."""
        return caller in self._reserved

    def reserve_read(self, caller: Hashable, now: float) -> float:
        """Reserve a read after all other reservations, and return the time of the read. The delay is always below `MAX_READ_DELAY`."""
        offset_seconds = max(0.0, self._next_free_at - now) + len(self._reserved) * self._pause_seconds
        self._reserved.add(caller)
        return now + offset_seconds % MAX_READ_DELAY

    def release(self, caller: Hashable) -> None:
        """Drop the caller's reservation if one exists."""
        self._reserved.discard(caller)

    def record_read(self, started_at: float, now: float) -> None:
        """Record the duration of a read. The next pause depends on this duration."""
        self._pause_seconds = min(READ_TIME_DIVISOR * (now - started_at), MAX_READ_PAUSE)
        self._next_free_at = now + self._pause_seconds
