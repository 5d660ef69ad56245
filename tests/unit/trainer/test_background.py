"""An action is repeated in a background thread while a block of code runs."""

from __future__ import annotations

import threading

from finetune_trainer.background import repeat_in_background


def test_an_action_is_repeated_until_the_block_ends() -> None:
    calls: list[str] = []
    was_called_three_times = threading.Event()

    def act() -> None:
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            was_called_three_times.set()

    with repeat_in_background(act, 0.001, "repeating"):
        assert was_called_three_times.wait(60)
    assert set(calls) == {"repeating"} and "repeating" not in {thread.name for thread in threading.enumerate()}


def test_the_action_is_called_at_once() -> None:
    was_called = threading.Event()
    with repeat_in_background(was_called.set, 3600, "once"):
        assert was_called.wait(60)
