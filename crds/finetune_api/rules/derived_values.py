"""Values derived from the user's spec and the constant defaults. Rules and defaults share these functions."""

from __future__ import annotations

from typing import Any

from finetune_api.base import DEFAULT, Group
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec.enums import (
    LoraInit,
    MethodType,
    TrainerType,
    When,
)


def constant_default(group: type[Group], field: str) -> Any:
    """Return the constant default of a field, or None."""
    extra = group.model_fields[field].json_schema_extra
    return extra.get(DEFAULT) if isinstance(extra, dict) else None


def value_or_default(group: Group, field: str) -> Any:
    """Return the value that the user wrote, else the field's constant default."""
    value = getattr(group, field)
    return constant_default(type(group), field) if value is None else value


def method_type_of(spec: FineTuneJobSpec) -> MethodType:
    """Return `method.type`, as written or by default."""
    return MethodType(value_or_default(spec.method, "type"))


def trainer_type_of(spec: FineTuneJobSpec) -> TrainerType:
    """Return `trainer.type` (the objective), as written or by default."""
    return TrainerType(value_or_default(spec.trainer, "type"))


def given_bits(spec: FineTuneJobSpec) -> int | None:
    """Return `model.quantization.bits` if the user wrote it, else None."""
    return spec.model.quantization.bits if spec.model.quantization else None


def trains_base_weights(spec: FineTuneJobSpec) -> bool:
    """Whether the method trains weights of the base model itself and no adapter."""
    return method_type_of(spec) in BASE_WEIGHT_METHODS


def base_bits(spec: FineTuneJobSpec) -> int | None:
    """Return the bits per weight of the loaded base model, as written or implied by the method; None: not quantised."""
    return given_bits(spec) or (4 if method_type_of(spec) is MethodType.QLORA or uses_loftq(spec) else None)


def uses_loftq(spec: FineTuneJobSpec) -> bool:
    """Whether the adapter is initialised with LoftQ, because of `init: loftq` or because `loftq` is given."""
    lora = spec.method.lora
    return lora is not None and (lora.loftq is not None or lora.init is LoraInit.LOFTQ)


INITS_NEEDING_WHOLE_WEIGHTS = (LoraInit.PISSA, LoraInit.OLORA, LoraInit.EVA)
"""Adapter initialisations that factorise whole weights or activations."""
INITS_CHANGING_BASE = (LoraInit.PISSA, LoraInit.OLORA)
"""Adapter initialisations that move a part of the base into the adapter."""
LORA_METHODS = (MethodType.LORA, MethodType.QLORA, MethodType.DORA, MethodType.ADAPTER)
BASE_WEIGHT_METHODS = (MethodType.FULL, MethodType.SPECTRUM)
"""Methods that train weights of the base model itself; the others train an adapter."""
PROMPT_METHODS = (MethodType.PREFIX_TUNING, MethodType.PROMPT_TUNING)
PREFERENCE_TRAINERS = (TrainerType.DPO, TrainerType.ORPO, TrainerType.REWARD)
OUTPUT_HEADS = ("lm_head", "embed_out", "output_projection")


def ranks_per_node(spec: FineTuneJobSpec) -> int:
    """Return the ranks per pod, as written or by default."""
    return spec.resources.processes_per_node or gpus_per_node(spec) or 1


def gpus_per_node(spec: FineTuneJobSpec) -> int:
    """Return the GPUs per pod, as written or by default."""
    return int(value_or_default(spec.resources, "gpus_per_node"))


def world_size(spec: FineTuneJobSpec) -> int:
    """Return the number of ranks of all pods, as written or by default."""
    return int(value_or_default(spec.resources, "nodes")) * ranks_per_node(spec)


def has_validation_set(spec: FineTuneJobSpec) -> bool:
    """Whether there is validation data."""
    split = spec.dataset.split
    return spec.dataset.validation is not None or bool(split and split.validation)


def has_test_set(spec: FineTuneJobSpec) -> bool:
    """Whether there is a test set. It is not used until training has ended."""
    split = spec.dataset.split
    return spec.dataset.test is not None or bool(split and split.test)


def evaluates_during_training(spec: FineTuneJobSpec) -> bool:
    """Whether the validation loss is measured during training."""
    if spec.evaluation.strategy is None:
        return has_validation_set(spec)
    return spec.evaluation.strategy is not When.NO
