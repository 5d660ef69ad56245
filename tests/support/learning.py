"""Trains a tiny model in the process of the test, and records the run's losses, messages and artefact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.defaults import resolve_defaults
from finetune_api.pod import ResumeConfig, RunConfig, StoreTarget, World
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.channel import Channel
from finetune_trainer.inputs import Inputs, RestoredCheckpoint

from tests.support.heap import freeze_libraries

TEN_ROWS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in [
        ("one", "red"), ("two", "green"), ("three", "blue"), ("four", "yes"), ("five", "no"),
        ("question", "Paris"), ("answer", "Berlin"), ("input", "nine"), ("output", "three"), ("true", "false"),
    ]
]  # fmt: skip
"""Ten rows whose answers have nothing in common, so learning one answer does not help with another."""


def merge_mappings(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with the values of `overrides`. Nested mappings are merged."""
    merged = dict(base)
    for key, value in overrides.items():
        are_mappings = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge_mappings(merged[key], value) if are_mappings else value
    return merged


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    """Write rows to a JSONL file. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(
    folder: Path, model: Path, spec: Mapping[str, Any] | None = None, rows: Sequence[Any] = TEN_ROWS, *,
    ranks: int = 1, restore: RestoredCheckpoint | None = None, validation: Sequence[Any] | None = None,
    config_maps: Mapping[str, Mapping[str, str]] | None = None, adapter: Path | None = None,
) -> tuple[RunConfig, Inputs]:  # fmt: skip
    """Create a run whose defaults are resolved, and the inputs of this run. All files are below `folder`. The run uses the CPU unless the spec requests GPUs.
    """
    train_file = write_rows(folder / "train.jsonl", rows)
    validation_files = [write_rows(folder / "validation.jsonl", validation)] if validation is not None else []
    base_spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"},
        "dataset": {"train": f"file://{train_file}"},
        "resources": {"gpusPerNode": 0, "processesPerNode": ranks},
        "training": {"maxSteps": 4, "batchSizePerDevice": 2, "gradientAccumulationSteps": 1, "learningRate": 5e-3, "warmupRatio": 0},
        "tracking": {"loggingSteps": 1},
        "checkpoint": {"strategy": "no"},
        "output": {"verify": False},
    }  # fmt: skip
    if validation_files:
        base_spec["dataset"]["validation"] = f"file://{validation_files[0]}"
    resolution = resolve_defaults(FineTuneJobSpec.model_validate(merge_mappings(base_spec, spec or {})))
    for name, keys in (config_maps or {}).items():
        for key, text in keys.items():
            (folder / "configmaps" / name).mkdir(parents=True, exist_ok=True)
            (folder / "configmaps" / name / key).write_text(text)
    run = RunConfig(
        name="job", namespace="default", uid="0b8a3c1e-0000-4000-8000-000000000000", attempt=1, spec=resolution.spec,
        defaults=sorted(resolution.defaults), storage=StoreTarget(uri=f"file://{folder}/store"),
        world=World(
            nodes=1, processes_per_node=ranks, gpus_per_node=resolution.spec.resources.gpus_per_node or 0,
            master_address="127.0.0.1", master_port=0, rendezvous_id="r",
        ),
        resume=ResumeConfig(mode="auto"), grace_seconds=30,
    )  # fmt: skip
    inputs = Inputs(
        model=model, train=[train_file], validation=validation_files, model_revision="tiny", dataset_digest="d" * 64, restore=restore,
        output_dir=folder / "out", config_maps=folder / "configmaps", adapter=adapter,
    )  # fmt: skip
    return run, inputs


def create_method_for_run(
    run: RunConfig,
    inputs: Inputs,
    *,
    fsdp: bool = False,
    keep_base_dtype: bool = False,
    new_token_ids: Sequence[int] = (),
) -> Any:
    """Create the run's training method on the CPU. With `fsdp`, the method prepares the model for FSDP."""
    import torch
    from finetune_trainer.distributed import DistributedStrategy
    from finetune_trainer.hardware import Hardware
    from finetune_trainer.method.base import MethodContext
    from finetune_trainer.method.registry import create_method

    hardware = Hardware(torch.device("cpu"), "cpu", torch.float32, False, False, "sdpa")
    strategy = DistributedStrategy(run, hardware, 1)
    strategy.name = "fsdp" if fsdp else strategy.name
    strategy.keeps_base_dtype = keep_base_dtype
    return create_method(MethodContext(run, inputs, hardware, strategy, new_token_ids=tuple(new_token_ids)))


@dataclass
class RunOutcome:
    """What a run has logged, reported and trained."""

    logs: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    kind: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    channel: Channel | None = None
    model: Any = None
    """The trained model."""

    @property
    def losses(self) -> list[float]:
        """Training losses of all logged steps, oldest first."""
        return [line["loss"] for line in self.logs if "loss" in line]

    @property
    def grad_norms(self) -> list[float]:
        """Gradient norms of all logged steps, oldest first."""
        return [line["grad_norm"] for line in self.logs if "grad_norm" in line]

    @property
    def eval_losses(self) -> list[float]:
        """Losses of all evaluations, oldest first."""
        return [line["eval_loss"] for line in self.logs if "eval_loss" in line]

    def messages(self, kind: str) -> list[dict[str, Any]]:
        """Return the messages of this kind that the rank has sent to the supervisor."""
        assert self.channel is not None
        return [message for message in self.channel.sent if message["kind"] == kind]

    @property
    def resolved(self) -> dict[str, Any]:
        """All resolved settings that the run has reported."""
        settings: dict[str, Any] = {}
        for message in self.messages("resolved"):
            settings |= message["value"]
        return settings

    @property
    def notes(self) -> list[str]:
        """The notes that the run has reported for the job's status."""
        return [message["text"] for message in self.messages("note")]


class RecordingHooks:
    """An implementation of `train.Hooks` that records the logs, the trained model and the artefact."""

    def __init__(self) -> None:
        self.outcome = RunOutcome()

    def create_callbacks(self, run: RunConfig, channel: Channel, inputs: Inputs) -> list[Any]:
        """Return a callback that records the logs and the model. The callback also makes the Trainer write its checkpoints in the background."""
        from finetune_trainer.checkpoint.background import BackgroundWriter
        from transformers import TrainerCallback

        outcome, writer = self.outcome, BackgroundWriter()
        outcome.channel = channel

        class Recorder(TrainerCallback):
            def on_trainer_created(self, trainer: Any) -> None:
                trainer.checkpoint_writer, writer.writes_in_background = writer, True

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                writer.wait()

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                writer.finish_checkpoint()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                outcome.logs.append({"step": state.global_step, **(logs or {})})

            def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                outcome.model = model

        return [Recorder()]

    def get_resume_folder(self, inputs: Inputs) -> Path | None:
        """Folder of the restored checkpoint."""
        return inputs.restore.path if inputs.restore else None

    def report_final_artefact(self, run: RunConfig, channel: Channel, model_dir: Path, kind: Any, manifest_extra: dict[str, Any]) -> None:
        """Record the folder of the artefact instead of uploading it."""
        self.outcome.folder, self.outcome.kind, self.outcome.extra = model_dir, kind.value, manifest_extra


def train_here(run: RunConfig, inputs: Inputs) -> RunOutcome:
    """Train as the only rank, in this process. Errors that training raises are raised to the caller unchanged."""
    from finetune_trainer import train

    train.preload(run)
    freeze_libraries()
    hooks = RecordingHooks()
    channel = Channel.create_recording(inputs.output_dir.parent / "work")
    train.main(run, channel, inputs, hooks)
    return hooks.outcome


def run_training(
    folder: Path, model: Path, spec: Mapping[str, Any] | None = None, rows: Sequence[Any] = TEN_ROWS, **options: Any
) -> RunOutcome:
    """Create a run and its inputs, and train in this process."""
    return train_here(*make_run(folder, model, spec, rows, **options))
