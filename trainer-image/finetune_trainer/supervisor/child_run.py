"""Runs a process that reports over a channel: a stage after training, or the check of a preparation."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.errors import FineTuneError
from finetune_api.pod import RunConfig

from finetune_trainer.failure import failure_from_exit_code, failure_from_message
from finetune_trainer.processes import ChildProcess, kill_all_descendants, killed_for_memory
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor.agent_process import rank_environment
from finetune_trainer.supervisor.rank_channel import RankChannel

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ChildEnd:
    """How the process ended."""

    code: int
    failure: FineTuneError | None
    """The failure that the process reported, or that follows from its exit code."""


def run_child(
    arguments: list[str], run: RunConfig, settings: Settings, *, handle_message: Callable[[dict[str, Any]], None], while_running: Callable[[int], None]
) -> ChildEnd:
    """Run `finetune-trainer <arguments>` and wait for its end. All descendants of this process are killed then.

    `handle_message` receives each message. `while_running` is called again and again with the pid; an exception that it raises ends the process.
    """
    failures: list[FineTuneError] = []

    def handle(message: dict[str, Any]) -> None:
        handle_message(message)
        if message.get("kind") == "failed":
            failures.append(failure_from_message(message).error)

    channel = RankChannel(handle)
    process = ChildProcess([sys.executable, "-u", "-m", "finetune_trainer", *arguments], rank_environment(run, settings, channel.address))
    try:
        while (code := process.poll()) is None:
            while_running(process.pid)
            threading.Event().wait(POLL_SECONDS)
    finally:
        kill_all_descendants()
        channel.close()
    if not failures and code != 0:
        failures.append(failure_from_exit_code(0, code, is_host_out_of_memory=killed_for_memory()).error)
    return ChildEnd(code, failures[0] if failures else None)
