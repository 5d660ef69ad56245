"""A clock for the tests of the supervisor. The tests set its time."""

from __future__ import annotations

import pytest
from finetune_trainer.supervisor import run_state as subject


class FakeClock:
    """Replaces `time.monotonic`. A test sets the time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(subject.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    return FakeClock(monkeypatch)
