"""Entry point of one rank: import the libraries, wait for the inputs, train, and report the result."""

from __future__ import annotations

import gc
import importlib
import os
import traceback
from types import ModuleType

from finetune_api.names import ExitCode
from finetune_api.pod import RunConfig

from finetune_trainer.channel import Channel
from finetune_trainer.checkpoint.stop import TrainingStopped
from finetune_trainer.failure import classify_wrapped_error
from finetune_trainer.processes import begin_child, end_child
from finetune_trainer.settings import Settings, load_run

TRAINER_MODULE_VARIABLE = "FINETUNE_TRAINER_MODULE"
"""Environment variable for tests: the module to run instead of `finetune_trainer.train`."""


def main() -> int:
    """Run this rank and end the process."""
    begin_child("rank")
    channel = Channel.from_env()
    channel.report_start()
    end_child(_run_and_report(channel))


def _run_and_report(channel: Channel) -> int:
    try:
        run, _ = load_run(Settings.from_env())
        _train(run, channel)
        return ExitCode.OK
    except TrainingStopped as stopped:
        channel.send_message("stopped", step=stopped.step)
        return ExitCode.OK
    except BaseException as error:
        failure, origin = classify_wrapped_error(error)
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
