"""Senders neither lose events nor send them twice while a tracker is down, and send the end event last."""

from __future__ import annotations

import resource
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from finetune_api.names import Reason
from finetune_trainer.trackers.base import TrackerError, build_connection_error
from finetune_trainer.trackers.events import (
    MAX_EVENTS_PER_BATCH,
    EndEvent,
    Event,
    EventReader,
    LogEvent,
    SystemEvent,
    append_events,
)
from finetune_trainer.trackers.sender import FLUSH_SECONDS, MAX_PAUSE_SECONDS, Sender

from tests.support.tracking import START, end_events, log_events


class Clock:
    """A clock that only moves when a test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeTracker:
    """Keeps the events that it accepts. `failures`: how many of the next calls of each method fail."""

    name = "fake"
    run_address = "fake://run"

    def __init__(self) -> None:
        self.accepted_events: list[Event] = []
        self.batch_sizes: list[int] = []
        self.open_count = self.flush_count = 0
        self.failures = {"open": 0, "send": 0, "flush": 0}

    def _fail(self, method: str) -> None:
        if self.failures[method]:
            self.failures[method] -= 1
            raise ConnectionError("connection refused, password k3y")

    def open(self) -> None:
        self._fail("open")
        self.open_count += 1

    def send(self, events: Sequence[Event]) -> None:
        self._fail("send")
        self.batch_sizes.append(len(events))
        self.accepted_events += events

    def flush(self) -> None:
        self._fail("flush")
        self.flush_count += 1

    def explain(self, error: Exception) -> TrackerError:
        return build_connection_error(self.name, "http://user:k3y@host:1/path", error)

    @property
    def accepted_steps(self) -> list[int]:
        return [event.entry.step for event in self.accepted_events if isinstance(event, LogEvent)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def test_events_wait_while_the_tracker_is_down_and_pauses_grow(events: Path, clock: Clock) -> None:
    tracker = FakeTracker()
    tracker.failures["open"] = 8
    sender = Sender(tracker, [events], clock=clock)
    append_events(events, log_events(1, 3))
    try_times = []
    while tracker.failures["open"]:
        failures_left = tracker.failures["open"]
        sender.send_waiting_events()
        if tracker.failures["open"] < failures_left:
            try_times.append(clock.now)
        clock.now += 1
    assert [second - first for first, second in zip(try_times, try_times[1:], strict=False)] == [1, 2, 4, 8, 16, 32, MAX_PAUSE_SECONDS]
    assert sender.problem is not None and sender.problem.reason is Reason.TRACKER_UNAVAILABLE
    assert sender.problem.message == "fake at http://host:1 could not be reached: the connection was refused"
    append_events(events, log_events(4, 5))
    clock.now += MAX_PAUSE_SECONDS
    sender.send_waiting_events()
    assert (tracker.accepted_steps, sender.problem, sender.sent) == ([1, 2, 3, 4, 5], None, 5)


def test_a_batch_that_failed_is_sent_again_after_a_new_connection(events: Path, clock: Clock) -> None:
    tracker = FakeTracker()
    sender = Sender(tracker, [events], clock=clock)
    append_events(events, log_events(1, 2))
    sender.send_waiting_events()
    append_events(events, log_events(3, 4))
    tracker.failures["send"] = 1
    sender.send_waiting_events()
    assert (tracker.accepted_steps, tracker.open_count) == ([1, 2], 1)
    clock.now += 1
    sender.send_waiting_events()
    assert (tracker.accepted_steps, tracker.open_count) == ([1, 2, 3, 4], 2)


def test_batches_are_bounded_and_flushed_at_intervals(events: Path, clock: Clock) -> None:
    tracker = FakeTracker()
    sender = Sender(tracker, [events], clock=clock)
    append_events(events, log_events(1, 2 * MAX_EVENTS_PER_BATCH + 1))
    sender.send_waiting_events()
    assert (tracker.batch_sizes, tracker.flush_count) == ([MAX_EVENTS_PER_BATCH, MAX_EVENTS_PER_BATCH, 1], 1)
    clock.now += FLUSH_SECONDS - 1
    sender.send_waiting_events()
    assert tracker.flush_count == 1
    clock.now += 1
    sender.send_waiting_events()
    assert tracker.flush_count == 2


def test_the_end_event_is_sent_last_and_without_a_pause_and_is_flushed(events: Path, tmp_path: Path, clock: Clock) -> None:
    tracker = FakeTracker()
    samples = tmp_path / "samples.jsonl"
    sender = Sender(tracker, [events, samples], clock=clock)
    tracker.failures |= {"open": 3, "flush": 1}
    for _ in range(3):
        sender.send_waiting_events()
        clock.now += MAX_PAUSE_SECONDS
    clock.now -= MAX_PAUSE_SECONDS  # within the pause after the last error
    append_events(events, [*log_events(1, 2), *end_events(2)[-1:]])
    append_events(samples, [SystemEvent(time=START, seconds=0, values={"system/cpu_utilization_percentage": 5.0})])
    sender.send_waiting_events()
    assert tracker.accepted_events == []
    sender.send_waiting_events(is_ending=True)
    assert isinstance(tracker.accepted_events[0], SystemEvent) and isinstance(tracker.accepted_events[-1], EndEvent)
    assert sender.has_ended is False  # the flush has failed
    clock.now += 1
    sender.send_waiting_events(is_ending=True)
    assert sender.has_ended and tracker.accepted_steps == [1, 2] and tracker.flush_count == 1
    sender.run(threading.Event())  # returns at once, because the end event has been sent


def test_a_full_disk_leaves_no_unfinished_line(events: Path) -> None:
    """The limit of the file size acts as a full disk: the system writes the part of the data that fits."""
    append_events(events, log_events(1, 2))
    size = events.stat().st_size
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard_limit))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_events(events, log_events(3, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft_limit, hard_limit))
    assert events.stat().st_size == size
    append_events(events, log_events(4, 4))
    assert [event.entry.step for event in EventReader(events).read()] == [1, 2, 4]  # type: ignore[union-attr]


def test_a_reader_waits_for_the_end_of_a_line(events: Path) -> None:
    append_events(events, log_events(1, 2))
    file_content = events.read_bytes()
    events.write_bytes(file_content[:-5])
    reader = EventReader(events)
    assert [event.entry.step for event in reader.read()] == [1]  # type: ignore[union-attr]
    reader.confirm()
    events.write_bytes(file_content)
    assert [event.entry.step for event in reader.read()] == [2] == [event.entry.step for event in reader.read()]  # type: ignore[union-attr]
