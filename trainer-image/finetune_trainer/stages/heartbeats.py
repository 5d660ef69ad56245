"""Sends heartbeats for stages that compute for minutes and report no other progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from finetune_trainer.channel import Channel

HEARTBEAT_SECONDS = 5.0

@contextmanager
def heartbeats_while_computing(channel: Channel) -> Iterator[None]:
    """Send heartbeats while this process uses CPU time, because loading and writing take minutes and report no other progress."""
    ended = threading.Event()

    def send() -> None:
        used = time.process_time()
        while not ended.wait(HEARTBEAT_SECONDS):
            if time.process_time() - used > 0.1:
                channel.send_heartbeat()
            used = time.process_time()

    thread = threading.Thread(target=send, name="heartbeats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
