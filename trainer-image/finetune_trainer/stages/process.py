"""Entry point of the process of one stage after training."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Mapping
from pathlib import Path

from finetune_api.errors import FineTuneError, InternalError, MemoryExhaustedError
from finetune_api.names import ExitCode
from finetune_api.status import Stage

from finetune_trainer.channel import Channel
from finetune_trainer.failure import classify_wrapped_error
from finetune_trainer.imports import garbage_collection_paused
from finetune_trainer.inputs import Inputs
from finetune_trainer.processes import begin_child, end_child
from finetune_trainer.settings import Settings, load_run
from finetune_trainer.stages.files import RESULT_FILE, StageTask

STAGE_MODULES: Mapping[Stage, str] = {
    Stage.EVALUATING: "finetune_trainer.stages.evaluate",
    Stage.COMPARING: "finetune_trainer.stages.compare",
    Stage.MERGING: "finetune_trainer.stages.merge",
    Stage.VERIFYING: "finetune_trainer.stages.verify",
    Stage.BENCHMARKING: "finetune_trainer.stages.benchmark",
}
"""The module of each stage. Its function `run_stage` returns the result."""


def main(arguments: list[str]) -> int:
    """Run the stage whose folder is the first argument, report a failure, and end the process."""
    begin_child("stage")
    end_child(run_and_report(Path(arguments[0]), Channel.from_env()))


def run_and_report(folder: Path, channel: Channel) -> int:
    """Run the stage and write its result. Returns the exit code."""
    try:
        run, _ = load_run(Settings.from_env())
        task, inputs = StageTask.read(folder), Inputs.read(channel.work)
        if inputs is None:
            raise InternalError("InputsMissing", "the inputs were not downloaded before the stage began")
        channel.report_stage(task.stage)
        with garbage_collection_paused():
            module = importlib.import_module(STAGE_MODULES[task.stage])
        result = module.run_stage(run, channel, inputs, task, folder)
        (folder / RESULT_FILE).write_text(result.model_dump_json(by_alias=True))
        return ExitCode.OK
    except BaseException as error:
        failure = _name_failure(error)
        traceback.print_exc()
        channel.report_failure(failure)
        return int(failure.exit_code)


def _name_failure(error: BaseException) -> FineTuneError:
    """Return the named failure for an exception. The hint for exhausted memory differs from the hint in training, because a stage does not train."""
    failure, _ = classify_wrapped_error(error)
    if isinstance(failure, MemoryExhaustedError):
        return MemoryExhaustedError(failure.code, failure.message, hint="lower evaluation.batchSizePerDevice")
    return failure
