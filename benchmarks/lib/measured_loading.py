"""Run the real training, and record the largest memory of this rank while the model is loaded and sharded.

FINETUNE_TRAINER_MODULE selects this module. The module writes `<work>/memory-<rank>.json` with the private memory of the process (RssAnon) in bytes.
`before`: the memory before the model is loaded. `loaded`: the peak until the model is loaded. `peak`: the peak until training begins. The file also
contains the logged losses.
With BENCHMARK_LOADING=private, every rank converts the weights by itself.
"""

from __future__ import annotations

import json
import os
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig
from finetune_api.status import Stage
from finetune_trainer import model, train
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs

LOADING_VARIABLE = "BENCHMARK_LOADING"
SAMPLE_SECONDS = 0.005
preload = train.preload


def main(run: RunConfig, channel: Channel, inputs: Inputs) -> None:
    meter = MemoryMeter()
    losses: list[float] = []
    original_build_trainer, original_load_model, original_report_stage, original_report_log_line = (
        train.TrainingSession._build_trainer, model.load_model, channel.report_stage, channel.report_log_line
    )  # fmt: skip

    def build_and_measure(self: Any, callbacks: Any) -> Any:
        meter.start()
        return original_build_trainer(self, callbacks)

    def load_and_measure(*args: Any, **options: Any) -> Any:
        loaded_model = original_load_model(*args, **options)
        meter.loaded_bytes = meter.peak_bytes
        return loaded_model

    def stop_meter_at_training(stage: Stage, detail: str | None = None) -> None:
        if stage is Stage.TRAINING:
            meter.stop()
        original_report_stage(stage, detail)

    def collect_loss(step: int, values: dict[str, Any]) -> None:
        losses.extend([values["loss"]] if "loss" in values else [])
        original_report_log_line(step, values)

    if os.environ.get(LOADING_VARIABLE) == "private":
        train.TrainingSession._shared_weights = lambda self: nullcontext((self.inputs, []))  # type: ignore[method-assign] # no shared copy of the weights
    model.load_model = load_and_measure
    train.TrainingSession._build_trainer = build_and_measure  # type: ignore[method-assign] # measures the loading
    channel.report_stage, channel.report_log_line = stop_meter_at_training, collect_loss  # type: ignore[method-assign] # end of the measurement, losses
    train.main(run, channel, inputs)
    measurements = {"before": meter.before_bytes, "loaded": meter.loaded_bytes, "peak": meter.peak_bytes, "losses": losses}
    (channel.work_folder / f"memory-{channel.rank}.json").write_text(json.dumps(measurements))


class MemoryMeter:
    """Samples the private memory of this process from `start` to `stop`, in bytes."""

    def __init__(self) -> None:
        self.before_bytes = self.loaded_bytes = self.peak_bytes = 0
        self._stop_requested = threading.Event()

    def start(self) -> None:
        self.before_bytes = self.peak_bytes = read_private_bytes()
        threading.Thread(target=self._sample, daemon=True).start()

    def stop(self) -> None:
        self._stop_requested.set()

    def _sample(self) -> None:
        while not self._stop_requested.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, read_private_bytes())


def read_private_bytes() -> int:
    """Return the bytes of memory that only this process uses. The file cache does not count, because processes share it and the kernel can drop it."""
    status_fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status_fields["RssAnon"].split()[0]) * 1024
