"""Entry point of the process that runs one stage after training."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from finetune_api.errors import InternalError
from finetune_api.pod import RunConfig
from finetune_api.status import Stage

from finetune_trainer import train
from finetune_trainer.benchmarks import harness
from finetune_trainer.channel import Channel
from finetune_trainer.child_main import run_child_main
from finetune_trainer.imports import garbage_collection_paused
from finetune_trainer.inputs import Inputs
from finetune_trainer.settings import Settings, load_run
from finetune_trainer.stages.files import RESULT_FILE, StageTask

STAGE_MODULES: Mapping[Stage, str] = {
    Stage.EVALUATING: "finetune_trainer.stages.evaluate",
    Stage.COMPARING: "finetune_trainer.stages.compare",
    Stage.MERGING: "finetune_trainer.stages.merge",
    Stage.VERIFYING: "finetune_trainer.stages.verify",
    Stage.BENCHMARKING: "finetune_trainer.stages.benchmark",
}
"""The name of the module that runs each stage. The module's function `run_stage` returns the stage's result."""


def main(arguments: list[str]) -> NoReturn:
    """Run the stage whose folder is the first argument, report a failure, and end the process."""
    # After exhausted memory, the hint for training (a smaller training batch) would not help a stage.
    run_child_main("stage", lambda channel: run_stage(Path(arguments[0]), channel), memory_hint="lower evaluation.batchSizePerDevice")


def run_stage(folder: Path, channel: Channel) -> None:
    """Run the stage of a folder, and write its result. Errors: those of the stage; InternalError InputsMissing."""
    run, _ = load_run(Settings.from_env())
    task, inputs = StageTask.read(folder), Inputs.read(channel.work_folder)
    if inputs is None:
        raise InternalError("InputsMissing", "the inputs were not downloaded before the stage began")
    channel.report_stage(task.stage)
    import_libraries(run, task.stage, channel.work_folder)
    with garbage_collection_paused():
        module = importlib.import_module(STAGE_MODULES[task.stage])
    result = module.run_stage(run, channel, inputs, task, folder)
    (folder / RESULT_FILE).write_text(result.model_dump_json(by_alias=True))


def import_libraries(run: RunConfig, stage: Stage, work_folder: Path) -> None:
    """Import the large libraries of a stage. This must happen before the stage's module is imported, because the module imports them all.

    Verification is an exception: each artefact needs other libraries, and the module `verify` imports them when it measures an artefact.
    """
    if stage is Stage.BENCHMARKING:
        harness.use_local_caches(work_folder.resolve())
    if stage is not Stage.VERIFYING:
        train.preload(run)
