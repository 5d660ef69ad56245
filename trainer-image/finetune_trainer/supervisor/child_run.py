"""Runs a child process that reports over a channel: a stage after training, or the process `check` of a preparation."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune_api.errors import FineTuneError
from finetune_api.pod import RunConfig

from finetune_trainer.failure import failure_from_exit_code, failure_from_message
from finetune_trainer.processes import ChildProcess, has_oom_kill, kill_all_descendants
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor.agent_process import build_rank_environment
from finetune_trainer.supervisor.rank_channel import RankChannel

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ChildResult:
    """How a child process ended."""

    exit_code: int
    failure: FineTuneError | None
    """The failure that the process reported. If it reported none, the failure that follows from its exit code. None after exit code 0."""


def run_child(
    arguments: list[str], run: RunConfig, settings: Settings, *, handle_message: Callable[[dict[str, Any]], None], watch_process: Callable[[int], None]
) -> ChildResult:
    """Run `finetune-trainer <arguments>` and wait until it ends. Then, all descendants of the calling process are killed.

    `handle_message` receives each message of the child. `watch_process` is called repeatedly with the child's pid; if it raises an exception, the
    child is killed.
    """
    failures: list[FineTuneError] = []

    def handle_and_collect_failures(message: dict[str, Any]) -> None:
        handle_message(message)
        if message.get("kind") == "failed":
            failures.append(failure_from_message(message).error)

    channel = RankChannel(handle_and_collect_failures)
    process = ChildProcess([sys.executable, "-u", "-m", "finetune_trainer", *arguments], build_rank_environment(run, settings, channel.address))
    try:
        while (exit_code := process.poll()) is None:
            watch_process(process.pid)
            threading.Event().wait(POLL_SECONDS)
    finally:
        kill_all_descendants()
        channel.close()
    if not failures and exit_code != 0:
        failures.append(failure_from_exit_code(0, exit_code, is_host_out_of_memory=has_oom_kill()).error)
    return ChildResult(exit_code, failures[0] if failures else None)
