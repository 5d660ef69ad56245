"""Run the real training, and record the end of each step and the stall of each checkpoint on the rank's clock.

FINETUNE_TRAINER_MODULE selects this module. It writes `<work>/times.jsonl`: {"step", "ended"} and {"step", "stall"}, in seconds.
With BENCHMARK_CHECKPOINTS=blocking, training waits until each checkpoint is written.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from finetune_api.pod import RunConfig
from finetune_trainer import train
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs

preload = train.preload


def main(run: RunConfig, channel: Channel, inputs: Inputs) -> None:
    original_report_step, original_report_staged_files = channel.report_step, channel.report_staged_files

    def record_step_end(step: int) -> None:
        append_record(channel, step=step, ended=time.monotonic())
        original_report_step(step)

    def record_stall(step: int, folder: Any, **values: Any) -> None:
        append_record(channel, step=step, stall=values["stallSeconds"])
        original_report_staged_files(step, folder, **values)

    channel.report_step, channel.report_staged_files = record_step_end, record_stall  # type: ignore[method-assign] # records the times
    if os.environ.get("BENCHMARK_CHECKPOINTS") == "blocking":
        from finetune_trainer.checkpoint.rank import CheckpointStager

        CheckpointStager._copies_fit_in_memory = lambda self: False  # type: ignore[method-assign] # blocks until the files are written
    train.main(run, channel, inputs)


def append_record(channel: Channel, **values: float) -> None:
    with (channel.work_folder / "times.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")
