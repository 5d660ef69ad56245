"""Cross-field rules: what cannot be together, said once for the CRD (CEL), the operator, the command line and the trainer.

One module a part of the spec; problems come in the order of these modules. What needs the model or the data is checked by the
trainer before its first step.
"""

# ruff: noqa: I001  the order of these imports is the order in which problems are told
from finetune_api.rules.base import (
    RULES,
    Found,
    Problem,
    Rule,
    Where,
    added,
    as_written,
    check,
    paths,
    refuse,
    require,
    rule,
)
from finetune_api.rules.facts import (
    BASE_CHANGING,
    HEADS,
    LORA_METHODS,
    NEEDS_WHOLE_WEIGHTS,
    PREFERENCE_TRAINERS,
    PROMPT_METHODS,
    base_bits,
    default_of,
    evaluates,
    given_bits,
    given_or_default,
    gpus_per_node,
    has_test,
    has_validation,
    method_of,
    ranks_per_node,
    starts_with_loftq,
    trainer_of,
    world_size,
)
from finetune_api.rules import presence
from finetune_api.rules.presence import source_fields
from finetune_api.rules import methods
from finetune_api.rules import objectives
from finetune_api.rules.objectives import SMOOTHED, smallest_batch
from finetune_api.rules import data
from finetune_api.rules import training
from finetune_api.rules.training import OPTIMIZERS
from finetune_api.rules import strategies
from finetune_api.rules.strategies import SLICED_OPTIMIZERS, unfit_for_deepspeed, unfit_for_fsdp, unfit_for_zero3
from finetune_api.rules import after
from finetune_api.rules import storage
from finetune_api.rules import placement
from finetune_api.rules.rewards import REWARD_PARAMETERS, unfit_parameters

MODULES = (presence, methods, objectives, data, training, strategies, after, storage, placement)
"""Where the rules stand, in the order in which they are asked."""

__all__ = [
    "MODULES",
    "BASE_CHANGING",
    "Found",
    "HEADS",
    "LORA_METHODS",
    "NEEDS_WHOLE_WEIGHTS",
    "OPTIMIZERS",
    "SLICED_OPTIMIZERS",
    "PREFERENCE_TRAINERS",
    "PROMPT_METHODS",
    "Problem",
    "REWARD_PARAMETERS",
    "RULES",
    "Rule",
    "SMOOTHED",
    "Where",
    "added",
    "as_written",
    "base_bits",
    "check",
    "default_of",
    "evaluates",
    "given_bits",
    "given_or_default",
    "gpus_per_node",
    "has_test",
    "has_validation",
    "method_of",
    "paths",
    "ranks_per_node",
    "refuse",
    "require",
    "rule",
    "smallest_batch",
    "source_fields",
    "starts_with_loftq",
    "trainer_of",
    "unfit_for_deepspeed",
    "unfit_for_fsdp",
    "unfit_for_zero3",
    "unfit_parameters",
    "world_size",
]
