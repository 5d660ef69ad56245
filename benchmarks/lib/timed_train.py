"""The real training with time measurements: the end of each step and the stall of each checkpoint, by the rank's own clock.

Set by FINETUNE_TRAINER_MODULE; writes `<work>/times.jsonl`: {"step", "ended"} and {"step", "stall"}, in seconds.
"""

from __future__ import annotations

import json
import time
from typing import Any

from finetune_api.pod import RunConfig
from finetune_trainer import train
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs

preload = train.preload


def main(run: RunConfig, channel: Channel, inputs: Inputs) -> None:
    beat, stage = channel.heartbeat, channel.staged

    def heartbeat(step: int) -> None:
        note(channel, step=step, ended=time.monotonic())
        beat(step)

    def staged(step: int, folder: Any, **facts: Any) -> None:
        note(channel, step=step, stall=facts["stallSeconds"])
        stage(step, folder, **facts)

    channel.heartbeat, channel.staged = heartbeat, staged  # type: ignore[method-assign] # to be timed
    train.main(run, channel, inputs)


def note(channel: Channel, **facts: float) -> None:
    with (channel.work / "times.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")
