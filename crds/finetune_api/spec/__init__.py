"""The spec of a FineTuneJob: one class per group. Every field is optional until defaults are filled in."""

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
    """`spec`: the job that the user requests."""

    model: Model = Field(
        default_factory=Model,
        description="The base model and how it is loaded. Required. Example: `{source: HuggingFaceTB/SmolLM2-135M-Instruct}`.",
    )
    method: Method = Field(
        default_factory=Method,
        description="Which parameters are trained. Default: LoRA. Example: `{type: qlora}`.",
    )
    trainer: Trainer = Field(
        default_factory=Trainer,
        description="The training objective. Default: supervised fine-tuning. Example: `{type: dpo}`.",
    )
    dataset: Dataset = Field(
        default_factory=Dataset,
        description="The training data and how rows become tokens. Required. Example: `{train: s3://data/train.jsonl}`.",
    )
    training: Training = Field(
        default_factory=Training,
        description="The optimizer. Default: the values of its fields. Example: `{epochs: 1, learningRate: 1e-4}`.",
    )
    distributed: Distributed = Field(
        default_factory=Distributed,
        description="How ranks share the work. Default: the values of its fields. Example: `{strategy: fsdp}`.",
    )
    checkpoint: Checkpoint = Field(
        default_factory=Checkpoint,
        description="When checkpoints are saved and how many are kept. Default: the values of its fields. Example: `{steps: 500}`.",
    )
    output: Output = Field(
        default_factory=Output,
        description="Additional copies and formats of the result. Default: the values of its fields. Example: `{mergeAdapter: true}`.",
    )
    evaluation: Evaluation = Field(
        default_factory=Evaluation,
        description="How the model is evaluated. Default: validation loss, if there is validation data. Example: `{steps: 50}`.",
    )
    tracking: Tracking = Field(
        default_factory=Tracking,
        description="Where metrics are sent. Default: the values of its fields. Example: `{loggingSteps: 50}`.",
    )
    phases: Phases = Field(
        default_factory=Phases,
        description="The parts of the pipeline that run. Default: training. Example: `{train: true}`.",
    )
    storage: StorageRoot = Field(
        default_factory=StorageRoot,
        description="Where the job writes checkpoints, the final model and metrics. Default: the operator's configuration. "
        "Example: `{uri: s3://models/finetune}`.",
    )
    resources: Resources = Field(
        default_factory=Resources,
        description="Pods, ranks, and the resources of each pod. Default: one pod with one GPU. Example: `{gpusPerNode: 8}`.",
    )
    placement: Placement = Field(
        default_factory=Placement,
        description="Where the pods run and with which identity. Default: the operator's configuration. "
        "Example: `{queueName: team-a}`.",
    )
    policy: Policy = Field(
        default_factory=Policy,
        description="Time limits and what happens after a failure. Default: the values of its fields. Example: `{retries: 5}`.",
    )
    suspend: bool = Field(
        default=False,
        description="True: save a checkpoint and free the GPUs. Back to false: resume. Default: false. Example: `true`.",
    )
    cancel: bool = Field(
        default=False,
        description="True: save a checkpoint and end the job. This cannot be undone. Default: false. Example: `true`.",
    )

    def value(self, path: str) -> Any:
        """Return the value at a dotted path of JSON names, or None."""
        value: Any = self.to_wire()
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def with_values(self, values: Mapping[str, Any]) -> FineTuneJobSpec:
        """Return a copy with new values at dotted paths of JSON names. Errors: pydantic's ValidationError."""
        wire = self.to_wire()
        for path, value in values.items():
            *groups, name = path.split(".")
            target = wire
            for group in groups:
                target = target.setdefault(group, {})
            target[name] = value
        return FineTuneJobSpec.model_validate(wire)


def load_spec(value: Mapping[str, Any]) -> FineTuneJobSpec:
    """Read a spec from JSON-like data as strictly as the API server does: a quoted number or a boolean is not a number.

    Errors: pydantic's ValidationError with one entry per field.
    """
    return FineTuneJobSpec.model_validate_json(json.dumps(_whole_numbers(value), default=str), strict=True)


def _whole_numbers(value: Any) -> Any:
    """Return a copy in which `2.0` is 2, because the API server accepts both spellings for an integer."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_whole_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


__all__ = ["FineTuneJobSpec", "load_spec"]
