"""Entry point of one rank: import the libraries, wait for the inputs, train, and report the result."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import signal
import sys
import traceback
from types import ModuleType

from finetune_api.errors import InternalError
from finetune_api.names import ExitCode
from finetune_api.pod import RunConfig

from finetune_trainer.channel import Channel
from finetune_trainer.checkpoint.stop import TrainingStopped
from finetune_trainer.failure import classify_error
from finetune_trainer.logs import configure_logging
from finetune_trainer.processes import die_with_parent
from finetune_trainer.settings import Settings, load_run

TRAINER_MODULE_VARIABLE = "FINETUNE_TRAINER_MODULE"
"""Environment variable for tests: the module to run instead of `finetune_trainer.train`."""


def main() -> int:
    """Run this rank and end the process. Exit handlers are skipped, because some libraries' handlers wait forever for a lost rank."""
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging("rank")
    channel = Channel.from_env()
    channel.report_start()
    code = _run_and_report(channel)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_and_report(channel: Channel) -> int:
    try:
        run, _ = load_run(Settings.from_env())
        _train(run, channel)
        return ExitCode.OK
    except TrainingStopped as stopped:
        channel.send_message("stopped", step=stopped.step)
        return ExitCode.OK
    except BaseException as error:
        # If an InternalError only wraps a library's exception, classify that exception: its type is more specific.
        cause = (
            error.__cause__ if isinstance(error, InternalError) and isinstance(error.__cause__, Exception) else error
        )
        failure, origin = classify_error(cause)
        traceback.print_exc()
        channel.report_failure(failure, is_origin=origin)
        return int(failure.exit_code)


def _train(run: RunConfig, channel: Channel) -> None:
    module: ModuleType = importlib.import_module(os.environ.get(TRAINER_MODULE_VARIABLE, "finetune_trainer.train"))
    if hasattr(module, "preload"):
        module.preload(run)
    gc.freeze()  # accelerate runs a garbage collection when training begins, which would examine the million objects of the libraries.
    channel.send_message("ready")
    inputs = channel.wait_inputs()
    module.main(run, channel, inputs)
