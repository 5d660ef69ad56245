"""Sends the events of a run to one tracker, in a separate thread, until the attempt has ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune_trainer.trackers.base import Tracker, TrackerError
from finetune_trainer.trackers.events import EndEvent, EventReader

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2
FLUSH_SECONDS = 30.0
FIRST_PAUSE_SECONDS = 1.0
"""Pause after the first error. Each further error doubles the pause."""
MAX_PAUSE_SECONDS = 60.0


class Sender:
    """Reads the files with events, and sends new events to one tracker. After an error, the sender tries again, with growing pauses.

    An error never ends a sender. While a tracker cannot be reached, events wait in the files, not in memory.
    """

    def __init__(self, tracker: Tracker, files: Sequence[Path], *, clock: Callable[[], float] = time.monotonic) -> None:
        """`files`: the file with the events of the run, whose last event is the end event, and optionally a file with samples of CPU, memory and GPU usage."""
        self.tracker = tracker
        self.problem: TrackerError | None = None
        self.sent = 0
        self.has_ended = False
        self._readers = [EventReader(file) for file in files]
        self._clock = clock
        self._is_open = self._is_ending = self._is_end_sent = False
        self._failure_count = 0
        self._next_try_time = self._next_flush_time = clock()

    def run(self, is_ending: threading.Event) -> None:
        """Send events until the tracker has received and stored the end event. `is_ending`: is set when the supervisor has written the end event."""
        while not self.has_ended:
            self.send_waiting_events(is_ending=is_ending.is_set())
            if not self.has_ended:
                threading.Event().wait(POLL_SECONDS)

    def send_waiting_events(self, *, is_ending: bool = False) -> None:
        """Send the waiting events, except during a pause after an error. `is_ending`: whether the attempt ends. If it ends, a pause is cut short."""
        if is_ending and not self._is_ending:
            self._is_ending, self._failure_count, self._next_try_time = True, 0, self._clock()
        if self._clock() < self._next_try_time:
            return
        try:
            self._send()
        except Exception as error:
            self._record_problem(error)
        else:
            self._failure_count, self.problem = 0, None

    def _send(self) -> None:
        if not self._is_open:
            self.tracker.open()
            self._is_open = True
        # Samples of CPU, memory and GPU usage are sent first, because no event may follow the end event.
        for reader in reversed(self._readers):
            while events := reader.read():
                self.tracker.send(events)
                reader.confirm()
                self.sent += len(events)
                self._is_end_sent = self._is_end_sent or any(isinstance(event, EndEvent) for event in events)
        if self._is_end_sent or self._clock() >= self._next_flush_time:
            self._next_flush_time = self._clock() + FLUSH_SECONDS
            self.tracker.flush()
        self.has_ended = self._is_end_sent

    def _record_problem(self, error: Exception) -> None:
        """Record a problem and the time of the next try. The tracker will be opened again, because it must find out which events its server already has."""
        self.problem = error if isinstance(error, TrackerError) else self.tracker.explain(error)
        log.warning("%s: %s", self.tracker.name, self.problem.message)
        self._is_open = False
        self._next_try_time = self._clock() + min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**self._failure_count)
        self._failure_count += 1
