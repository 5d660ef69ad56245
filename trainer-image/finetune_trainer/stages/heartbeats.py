"""Sends heartbeats for stages that compute for minutes without reporting progress."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from finetune_trainer.background import repeat_in_background
from finetune_trainer.channel import Channel

HEARTBEAT_SECONDS = 5.0


def send_heartbeats_while_computing(channel: Channel) -> AbstractContextManager[None]:
    """Send heartbeats within the context as long as this process uses CPU time. Loading and writing a model take minutes without any report of progress."""
    used_cpu_seconds = time.process_time()

    def send() -> None:
        nonlocal used_cpu_seconds
        if time.process_time() - used_cpu_seconds > 0.1:
            channel.send_heartbeat()
        used_cpu_seconds = time.process_time()

    return repeat_in_background(send, HEARTBEAT_SECONDS, "heartbeats")
