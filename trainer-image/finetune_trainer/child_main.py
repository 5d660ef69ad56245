"""The main function of each process that reports over a channel: a rank, a stage after training, and the check of a preparation."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import NoReturn

from finetune_api.errors import MemoryExhaustedError
from finetune_api.names import ExitCode

from finetune_trainer.channel import Channel
from finetune_trainer.failure import classify_wrapped_error
from finetune_trainer.processes import begin_child, end_child


def run_child_main(process_name: str, action: Callable[[Channel], None], *, memory_hint: str | None = None) -> NoReturn:
    """Run `action`, report its failure if it fails, and end this process. `process_name`: name of the process in its log lines."""
    begin_child(process_name)
    end_child(run_and_report_failure(Channel.from_env(), action, memory_hint=memory_hint))


def run_and_report_failure(channel: Channel, action: Callable[[Channel], None], *, memory_hint: str | None = None) -> int:
    """Run `action`, and report its failure over the channel. Returns the exit code. `memory_hint`: the hint of the reported failure if memory ran out."""
    try:
        action(channel)
        return ExitCode.OK
    except BaseException as error:
        failure, is_origin = classify_wrapped_error(error)
        if memory_hint is not None and isinstance(failure, MemoryExhaustedError):
            failure = MemoryExhaustedError(failure.code, failure.message, hint=memory_hint)
        traceback.print_exc()
        channel.report_failure(failure, is_origin=is_origin)
        return int(failure.exit_code)
