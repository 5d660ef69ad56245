"""Entry point of one rank: import the libraries, wait for the inputs, train, and report the result."""

from __future__ import annotations

import gc
import importlib
import os
from types import ModuleType
from typing import NoReturn

from finetune_trainer.channel import Channel
from finetune_trainer.checkpoint.stop import TrainingStopped
from finetune_trainer.child_main import run_child_main
from finetune_trainer.settings import Settings, load_run

TRAINER_MODULE_VARIABLE = "FINETUNE_TRAINER_MODULE"
"""Environment variable for tests: the module to run instead of `finetune_trainer.train`."""


def main() -> NoReturn:
    """Run this rank and end the process."""
    run_child_main("rank", _train)


def _train(channel: Channel) -> None:
    channel.report_start()
    settings = Settings.from_env()
    run, _ = load_run(settings)
    # transformers copies the Python code of a model to this folder and then imports the copy. If ranks shared the folder, a rank could import a file that
    # another rank is still writing.
    os.environ["HF_MODULES_CACHE"] = str(settings.work_folder / "model-code" / f"rank-{channel.local_rank}")
    module: ModuleType = importlib.import_module(os.environ.get(TRAINER_MODULE_VARIABLE, "finetune_trainer.train"))
    if hasattr(module, "preload"):
        module.preload(run)
    gc.freeze()  # accelerate runs the garbage collector when training begins. gc.freeze() excludes the million objects of the libraries from this collection.
    channel.send_message("ready")
    inputs = channel.wait_inputs()
    try:
        module.main(run, channel, inputs)
    except TrainingStopped as stopped:
        channel.send_message("stopped", step=stopped.step)
