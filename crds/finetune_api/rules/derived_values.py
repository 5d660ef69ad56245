"""Facts of a spec that rules and defaults share: values given or default, what they add up to."""

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
    """The constant default of a field, from the model's own metadata."""
    extra = group.model_fields[field].json_schema_extra
    return extra.get(DEFAULT) if isinstance(extra, dict) else None


def value_or_default(group: Group, field: str) -> Any:
    """The value a user gave, else the field's constant default."""
    value = getattr(group, field)
    return constant_default(type(group), field) if value is None else value


def method_of(spec: FineTuneJobSpec) -> MethodType:
    """The method, given or default."""
    return MethodType(value_or_default(spec.method, "type"))


def trainer_of(spec: FineTuneJobSpec) -> TrainerType:
    """The objective, given or default."""
    return TrainerType(value_or_default(spec.trainer, "type"))


def given_bits(spec: FineTuneJobSpec) -> int | None:
    """Bits that the user wrote for the base; None: nothing."""
    return spec.model.quantization.bits if spec.model.quantization else None


def trains_base_weights(spec: FineTuneJobSpec) -> bool:
    """Whether weights of the base model itself are trained, not an adapter."""
    return method_of(spec) in BASE_WEIGHT_METHODS


def base_bits(spec: FineTuneJobSpec) -> int | None:
    """Bits that the base is loaded in, given or implied by the method; None: not quantised."""
    return given_bits(spec) or (4 if method_of(spec) is MethodType.QLORA or uses_loftq(spec) else None)


def uses_loftq(spec: FineTuneJobSpec) -> bool:
    """Whether adapters start as LoftQ, given or implied."""
    lora = spec.method.lora
    return lora is not None and (lora.loftq is not None or lora.init is LoraInit.LOFTQ)


INITS_NEEDING_WHOLE_WEIGHTS = (LoraInit.PISSA, LoraInit.OLORA, LoraInit.EVA)
"""Ways to start that factorise whole weights or what they are given."""
INITS_CHANGING_BASE = (LoraInit.PISSA, LoraInit.OLORA)
"""Ways to start that take a part of the base away."""
LORA_METHODS = (MethodType.LORA, MethodType.QLORA, MethodType.DORA, MethodType.ADAPTER)
BASE_WEIGHT_METHODS = (MethodType.FULL, MethodType.SPECTRUM)
"""Methods that train weights of the base model itself; the others train an adapter."""
PROMPT_METHODS = (MethodType.PREFIX_TUNING, MethodType.PROMPT_TUNING)
PREFERENCE_TRAINERS = (TrainerType.DPO, TrainerType.ORPO, TrainerType.REWARD)
OUTPUT_HEADS = ("lm_head", "embed_out", "output_projection")


def ranks_per_node(spec: FineTuneJobSpec) -> int:
    """Ranks in a pod, given or default."""
    return spec.resources.processes_per_node or gpus_per_node(spec) or 1


def gpus_per_node(spec: FineTuneJobSpec) -> int:
    """GPUs of a pod, given or default."""
    return int(value_or_default(spec.resources, "gpus_per_node"))


def world_size(spec: FineTuneJobSpec) -> int:
    """Ranks in all, given or default."""
    return int(value_or_default(spec.resources, "nodes")) * ranks_per_node(spec)


def has_validation_set(spec: FineTuneJobSpec) -> bool:
    """Whether there is data to measure a validation loss on."""
    split = spec.dataset.split
    return spec.dataset.validation is not None or bool(split and split.validation)


def has_test_set(spec: FineTuneJobSpec) -> bool:
    """Whether rows are held out until training is over."""
    split = spec.dataset.split
    return spec.dataset.test is not None or bool(split and split.test)


def evaluates_during_training(spec: FineTuneJobSpec) -> bool:
    """Whether the validation loss is measured during training."""
    if spec.evaluation.strategy is None:
        return has_validation_set(spec)
    return spec.evaluation.strategy is not When.NO
