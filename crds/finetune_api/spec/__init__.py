"""The spec of a FineTuneJob, with one class for each group. A field that the user does not set is None until its default is filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from finetune_api.base import Group, get_value_at_path
from finetune_api.spec.cluster import Placement, Policy, Prepare, Resources, StorageRoot
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
        description="The base model and its loading options. Required. Example: `{source: HuggingFaceTB/SmolLM2-135M-Instruct}`.",
    )
    method: Method = Field(
        default_factory=Method,
        description="The fine-tuning method and its options. Default: LoRA. Example: `{type: qlora}`.",
    )
    trainer: Trainer = Field(
        default_factory=Trainer,
        description="The training objective. Default: supervised fine-tuning. Example: `{type: dpo}`.",
    )
    dataset: Dataset = Field(
        default_factory=Dataset,
        description="The training data and its conversion to tokens. Required. Example: `{train: s3://data/train.jsonl}`.",
    )
    training: Training = Field(
        default_factory=Training,
        description="Optimizer, schedule, batch size and precision. Default: the defaults of the fields. Example: `{epochs: 1, learningRate: 1e-4}`.",
    )
    distributed: Distributed = Field(
        default_factory=Distributed,
        description="The distributed strategy and its options. Default: the defaults of the fields. Example: `{strategy: fsdp}`.",
    )
    checkpoint: Checkpoint = Field(
        default_factory=Checkpoint,
        description="When checkpoints are saved, how many are kept, and from which one the job resumes. Default: the defaults of the fields. Example: `{steps: 500}`.",
    )
    output: Output = Field(
        default_factory=Output,
        description="Additional copies and formats of the final model. Default: the defaults of the fields. Example: `{mergeAdapter: true}`.",
    )
    evaluation: Evaluation = Field(
        default_factory=Evaluation,
        description="Evaluation of the model. Default: measure the validation loss if the job has validation data. Example: `{steps: 50}`.",
    )
    tracking: Tracking = Field(
        default_factory=Tracking,
        description="Logging of metrics. Default: the defaults of the fields. Example: `{loggingSteps: 50}`.",
    )
    phases: Phases = Field(
        default_factory=Phases,
        description="The phases of the job: training, inference, evaluation. Default: only training. Example: `{train: true}`.",
    )
    storage: StorageRoot = Field(
        default_factory=StorageRoot,
        description="Storage for checkpoints, the final model and metrics. Default: the operator's configuration. "
        "Example: `{uri: s3://models/finetune}`.",
    )
    resources: Resources = Field(
        default_factory=Resources,
        description="Pods, ranks, and the resources of each pod. Default: one pod with one GPU. Example: `{gpusPerNode: 8}`.",
    )
    prepare: Prepare = Field(
        default_factory=Prepare,
        description="The check of spec, model and data in a pod without GPUs, before the first attempt. Default: the operator's configuration. "
        "Example: `{strategy: always}`.",
    )
    placement: Placement = Field(
        default_factory=Placement,
        description="Scheduling and identity of the pods. Default: the operator's configuration. "
        "Example: `{queueName: team-a}`.",
    )
    policy: Policy = Field(
        default_factory=Policy,
        description="Time limits, and what happens after failures. Default: the defaults of the fields. Example: `{retries: 5}`.",
    )
    suspend: bool = Field(
        default=False,
        description="If true, the pods save a checkpoint and stop. If the field is set to false again, the job resumes. Default: false. Example: `true`.",
    )
    cancel: bool = Field(
        default=False,
        description="If true, the pods save a checkpoint and the job ends. A cancelled job cannot be resumed. Default: false. Example: `true`.",
    )

    def value(self, path: str) -> Any:
        """Return the value at a dotted path of camelCase names, or None."""
        return get_value_at_path(self.to_wire(), path)

    def with_values(self, values_by_path: Mapping[str, Any]) -> FineTuneJobSpec:
        """Return a copy of the spec with new values. The keys are dotted paths of camelCase names. Errors: pydantic's ValidationError."""
        wire_values = self.to_wire()
        for path, value in values_by_path.items():
            *group_names, name = path.split(".")
            group_values = wire_values
            for group_name in group_names:
                group_values = group_values.setdefault(group_name, {})
            group_values[name] = value
        return FineTuneJobSpec.model_validate(wire_values)


def load_spec(raw_spec: Mapping[str, Any]) -> FineTuneJobSpec:
    """Read a spec from nested dicts and lists, as strictly as the API server: strings and booleans are not accepted as numbers.

    Errors: pydantic's ValidationError with one entry per invalid field.
    """
    return FineTuneJobSpec.model_validate_json(json.dumps(_convert_whole_floats(raw_spec), default=str), strict=True)


def _convert_whole_floats(value: Any) -> Any:
    """Return a copy of `value` in which `2.0` is replaced by `2`, because the API server accepts both as integers."""
    if isinstance(value, Mapping):
        return {key: _convert_whole_floats(nested_value) for key, nested_value in value.items()}
    if isinstance(value, list | tuple):
        return [_convert_whole_floats(nested_value) for nested_value in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


__all__ = ["FineTuneJobSpec", "load_spec"]
