"""The process `check` asks for stored rows, from a supervisor that loses requests, downloads for long or stays silent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import rows_request
from finetune_trainer.channel import Channel
from finetune_trainer.rows_request import SupervisorRowPreparation, answer_file, is_digest, working_file

DIGEST = "d" * 64


class Clock:
    """A clock that each call of `sleep` moves by one second. `on_tick` is called after each second."""

    def __init__(self) -> None:
        self.now, self.on_tick = 1000.0, lambda seconds: None

    def sleep(self, _: float) -> None:
        self.now += 1
        self.on_tick(self.now - 1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rows_request.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(rows_request.time, "sleep", clock.sleep)
    return clock


def wait_for_rows(work: Path, clock: Clock, on_tick: Callable[[float], None]) -> tuple[list[float], float]:
    """Wait for the rows. Returns the seconds at which requests were sent, and the second at which the wait ended."""
    request_seconds: list[float] = []

    def send(message: dict[str, Any], _timeout: float) -> bool:
        assert (message["kind"], message["digest"]) == ("rowsNeeded", DIGEST)
        request_seconds.append(clock.now - 1000)
        return True

    clock.on_tick = on_tick
    SupervisorRowPreparation(Channel(send, work)).provide_rows(DIGEST)
    return request_seconds, clock.now - 1000


def test_a_lost_request_is_repeated(tmp_path: Path, clock: Clock) -> None:
    def answer_second_request(seconds: float) -> None:
        if seconds == 31:
            answer_file(tmp_path, DIGEST).touch()

    assert wait_for_rows(tmp_path, clock, answer_second_request) == ([0, 30], 31)


def test_the_wait_for_a_silent_supervisor_ends_after_ten_minutes(tmp_path: Path, clock: Clock) -> None:
    assert wait_for_rows(tmp_path, clock, lambda _: None) == ([30.0 * i for i in range(20)], 600)


def test_the_wait_goes_on_while_the_supervisor_downloads(tmp_path: Path, clock: Clock) -> None:
    def touch_working_file(seconds: float) -> None:
        if seconds % 300 == 0 and seconds <= 900:
            working_file(tmp_path, DIGEST).touch()
            os.utime(working_file(tmp_path, DIGEST), ns=(1, int(seconds)))

    assert wait_for_rows(tmp_path, clock, touch_working_file)[1] == 1500


@pytest.mark.parametrize("value", [None, 3, "", "D" * 64, "d" * 63, "d" * 65, "../" + "d" * 61, "d" * 64 + "\n"])
def test_only_64_hex_digits_are_a_digest(value: Any) -> None:
    assert not is_digest(value) and is_digest(DIGEST)
