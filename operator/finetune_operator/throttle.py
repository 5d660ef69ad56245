"""Decides when a changed status is written, and limits the rate of expensive reads.

If an attempt ends or a change causes an event, the status is written at once. While many FineTuneJobs, Jobs or pods change at the same time,
other changes and the first status of a new job may be deferred, so that one later write contains several changes. The limit of
the deferral grows with the number of jobs whose status write is deferred.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakSet

BURST_COUNT, BURST_SECONDS = 10, 2.0
"""A burst is at least `BURST_COUNT` occurrences within `BURST_SECONDS` seconds."""
MIN_DEFER_LIMIT_SECONDS, MAX_DEFER_LIMIT_SECONDS, DEFER_LIMIT_SECONDS_PER_JOB = 20.0, 60.0, 0.05
"""During a burst, the maximum delay of a status write is `DEFER_LIMIT_SECONDS_PER_JOB` times the number of jobs with a deferred status write, but at
least `MIN_DEFER_LIMIT_SECONDS` and at most `MAX_DEFER_LIMIT_SECONDS`. A burst of 1,000 jobs on two cores takes 0.046 s per job
(`benchmarks/operator_load.py`), so most bursts end before this maximum, and each job needs one status write.
"""
RECHECK_SECONDS = 10.0
"""During a burst: time between two checks whether the burst continues."""
JOB_END_DELAY_SECONDS = 5.0
"""If all pods have ended but their Job is not finished yet, the status shows the pods as not ready only after this many seconds."""

READ_TIME_DIVISOR, MAX_READ_PAUSE_SECONDS = 20, 10.0
"""The pause after a read is `READ_TIME_DIVISOR` times the read's duration, but at most `MAX_READ_PAUSE_SECONDS` seconds."""
MAX_READ_DELAY_SECONDS = 120.0
"""Maximum time in seconds until a reserved read, however many callers wait."""


class BurstDetector:
    """Detects a burst: many occurrences in a short time. All times are seconds of the same clock."""

    def __init__(self) -> None:
        self._last_times: deque[float] = deque(maxlen=BURST_COUNT)

    def record(self, now: float) -> None:
        """Count one occurrence."""
        self._last_times.append(now)

    def is_active(self, now: float) -> bool:
        """Whether the last `BURST_COUNT` occurrences happened within `BURST_SECONDS`."""
        return len(self._last_times) == BURST_COUNT and now - self._last_times[0] <= BURST_SECONDS


@dataclass(eq=False)
class PendingChanges:
    """Times of changes of one job that its stored status does not show yet. All times are event loop times."""

    defer_limit_seconds: float = 0.0
    """For how many seconds the oldest deferred change may be deferred, or 0 if no change is deferred."""

    created_at: float | None = None
    """When the first status of a new job was deferred."""
    transition_at: float | None = None
    """When the operator first saw the oldest unwritten transition."""
    pods_ended_at: float | None = None
    """When the operator first saw that all pods had ended while their Job was not finished."""
    progress_at: float = float("-inf")
    """When the operator received the progress that the last status write contained."""


class StatusThrottle:
    """Computes how long a status write is deferred. All jobs share one instance, because a burst consists of changes of several jobs."""

    def __init__(self, progress_seconds: float):
        self._progress_seconds = progress_seconds
        self._transitions = BurstDetector()
        self._deferred_changes: WeakSet[PendingChanges] = WeakSet()

    def defer_first_status(self, pending_changes: PendingChanges, now: float) -> None:
        """Record that the first status of a new job is deferred."""
        pending_changes.created_at = now
        self._update_defer_limit(pending_changes)

    def compute_first_status_due_at(self, pending_changes: PendingChanges) -> float:
        """Return when the deferred first status of a job must be written, even if the burst continues."""
        assert pending_changes.created_at is not None  # noqa: S101 -- the caller deferred the status
        return pending_changes.created_at + self._update_defer_limit(pending_changes)

    def _update_defer_limit(self, pending_changes: PendingChanges) -> float:
        """Count the job as deferred, and return the maximum delay of its status write in seconds. While the write is deferred, the maximum delay never
        decreases: when few deferred jobs are left, the burst ends soon anyway.
        """
        self._deferred_changes.add(pending_changes)
        limit_seconds = min(MAX_DEFER_LIMIT_SECONDS, max(MIN_DEFER_LIMIT_SECONDS, DEFER_LIMIT_SECONDS_PER_JOB * len(self._deferred_changes)))
        pending_changes.defer_limit_seconds = max(pending_changes.defer_limit_seconds, limit_seconds)
        return pending_changes.defer_limit_seconds

    def compute_progress_delay(
        self, pending_changes: PendingChanges, now: float, *, has_steps: bool = True, is_update_burst: bool = False
    ) -> float:
        """Return the seconds until a status with new progress, but without a transition, may be written.

        If the result is 0 or negative, the status may be written now. During a burst, the write of a job that has not done a step yet
        (`has_steps` is false) can be deferred beyond the normal interval.
        `is_update_burst`: many Jobs and pods change now.
        """
        pending_changes.transition_at, pending_changes.pods_ended_at = None, None
        due_at = pending_changes.progress_at + self._progress_seconds
        if now < due_at or has_steps or not (is_update_burst or self._transitions.is_active(now)):
            self._stop_deferring(pending_changes)
            return due_at - now
        return min(RECHECK_SECONDS, due_at - now + self._update_defer_limit(pending_changes))

    def compute_transition_delay(self, pending_changes: PendingChanges, *, pods_ended: bool, now: float, is_update_burst: bool = False) -> float:
        """Return for how many seconds a status with a transition may still be deferred. If the result is 0, the status must be written now.

        Call this only if all changes of the status may be written late. `is_update_burst`: many Jobs and pods change now, so the end of this job may
        follow soon.
        """
        if pending_changes.transition_at is None:
            pending_changes.transition_at = now if pending_changes.created_at is None else pending_changes.created_at
            self._transitions.record(now)
        is_burst = is_update_burst or self._transitions.is_active(now)
        defer_limit_seconds = self._update_defer_limit(pending_changes) if is_burst else 0.0
        delay_seconds = max(0.0, min(RECHECK_SECONDS, pending_changes.transition_at + defer_limit_seconds - now))
        if not pods_ended:
            pending_changes.pods_ended_at = None
            return delay_seconds
        pending_changes.pods_ended_at = now if pending_changes.pods_ended_at is None else pending_changes.pods_ended_at
        return max(delay_seconds, pending_changes.pods_ended_at + JOB_END_DELAY_SECONDS - now)

    def record_reverted_change(self, pending_changes: PendingChanges) -> None:
        """Clear the pending changes of a job whose stored status is up to date again."""
        pending_changes.transition_at = None
        self._stop_deferring(pending_changes)

    def record_write(self, pending_changes: PendingChanges, progress_at: float) -> None:
        """Clear the pending changes after a status write. `progress_at`: when the operator received the progress that was written."""
        self._stop_deferring(pending_changes)
        pending_changes.created_at, pending_changes.transition_at, pending_changes.pods_ended_at = None, None, None
        pending_changes.progress_at = progress_at

    def _stop_deferring(self, pending_changes: PendingChanges) -> None:
        self._deferred_changes.discard(pending_changes)
        pending_changes.defer_limit_seconds = 0.0


class ReadTimeLimiter:
    """Spreads expensive reads over time, so that the API server usually spends at most 1/`READ_TIME_DIVISOR` of the time on them."""

    def __init__(self) -> None:
        self._pause_seconds = 0.0
        self._next_free_at = float("-inf")
        self._callers_with_reservation: set[Hashable] = set()

    def __contains__(self, caller: Hashable) -> bool:
        """Whether the caller has a reservation."""
        return caller in self._callers_with_reservation

    def reserve_read(self, caller: Hashable, now: float) -> float:
        """Reserve a read after the reads of other callers and return its time, which is less than `MAX_READ_DELAY_SECONDS` after `now`."""
        offset_seconds = max(0.0, self._next_free_at - now) + len(self._callers_with_reservation) * self._pause_seconds
        self._callers_with_reservation.add(caller)
        return now + offset_seconds % MAX_READ_DELAY_SECONDS

    def release(self, caller: Hashable) -> None:
        """Drop the caller's reservation if one exists."""
        self._callers_with_reservation.discard(caller)

    def record_read(self, started_at: float, now: float) -> None:
        """Record the start and the end of a read. The pause before the next read depends on the duration of this read."""
        self._pause_seconds = min(READ_TIME_DIVISOR * (now - started_at), MAX_READ_PAUSE_SECONDS)
        self._next_free_at = now + self._pause_seconds
