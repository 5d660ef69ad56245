"""The spec of a FineTuneJob: one class per group, every field optional until the resolver fills it in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from finetune_api.base import Group
from finetune_api.spec.cluster import Placement, Policy, Resources, StorageRoot
from finetune_api.spec.dataset import Dataset
from finetune_api.spec.method import Method
from finetune_api.spec.model import Model
from finetune_api.spec.results import Evaluation, Output, Phases, Tracking
from finetune_api.spec.trainer import Trainer
from finetune_api.spec.training import Checkpoint, Distributed, Training


class FineTuneJobSpec(Group):
    """What a user asks for."""

    model: Model = Field(default_factory=Model, description="What is tuned, and how it is loaded. Required.")
    method: Method = Field(default_factory=Method, description="Which parameters are trained. Default: LoRA.")
    trainer: Trainer = Field(
        default_factory=Trainer, description="The objective that is minimised. Default: supervised fine-tuning."
    )
    dataset: Dataset = Field(
        default_factory=Dataset, description="What is learned from, and how rows become tokens. Required."
    )
    training: Training = Field(
        default_factory=Training, description="How the optimiser runs. Default: the values of its fields."
    )
    distributed: Distributed = Field(
        default_factory=Distributed, description="How ranks work together. Default: the values of its fields."
    )
    checkpoint: Checkpoint = Field(
        default_factory=Checkpoint,
        description="When checkpoints are made and how many are kept. Default: the values of its fields.",
    )
    output: Output = Field(
        default_factory=Output,
        description="What comes out beside the model in storage. Default: the values of its fields.",
    )
    evaluation: Evaluation = Field(
        default_factory=Evaluation,
        description="How the model is judged. Default: validation loss where there is validation data.",
    )
    tracking: Tracking = Field(
        default_factory=Tracking, description="Who is told about metrics. Default: the values of its fields."
    )
    phases: Phases = Field(default_factory=Phases, description="Which parts of the pipeline run. Default: training.")
    storage: StorageRoot = Field(
        default_factory=StorageRoot,
        description="Where everything the job writes lies. Default: the operator's configuration.",
    )
    resources: Resources = Field(
        default_factory=Resources, description="Pods, ranks and what each pod gets. Default: one pod with one GPU."
    )
    placement: Placement = Field(
        default_factory=Placement, description="Where and as whom the pods run. Default: the operator's configuration."
    )
    policy: Policy = Field(
        default_factory=Policy,
        description="Time limits and what happens after a failure. Default: the values of its fields.",
    )
    suspend: bool = Field(
        default=False, description="Save, free the GPUs, and wait; false resumes. Default: false. Example: `true`."
    )
    cancel: bool = Field(
        default=False, description="Save and stop for good; it cannot be taken back. Default: false. Example: `true`."
    )

    def value(self, path: str) -> Any:
        """What stands at a path, which is a dotted wire name; None if nothing does."""
        found: Any = self.to_wire()
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def with_values(self, values: Mapping[str, Any]) -> FineTuneJobSpec:
        """The same with other values at some paths, which are dotted wire names. Errors: pydantic's ValidationError."""
        wire = self.to_wire()
        for path, value in values.items():
            *groups, name = path.split(".")
            target = wire
            for group in groups:
                target = target.setdefault(group, {})
            target[name] = value
        return FineTuneJobSpec.model_validate(wire)


def load_spec(value: Mapping[str, Any]) -> FineTuneJobSpec:
    """A spec from JSON-like data, with the API server's strictness: a quoted number or a boolean is no number.

    Errors: pydantic's ValidationError, one entry per field.
    """
    return FineTuneJobSpec.model_validate_json(json.dumps(value, default=str), strict=True)


__all__ = ["FineTuneJobSpec", "load_spec"]
