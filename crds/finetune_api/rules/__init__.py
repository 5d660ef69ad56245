"""Cross-field rules: each rule refuses combinations of fields that cannot work.

The CRD (with CEL), the operator, the CLI and the trainer use these rules. Each module contains the rules for one group of the spec. Problems are
reported in the order of the modules. Checks that need the model or the data are in the trainer, which runs them before the first step.
"""

# ruff: noqa: I001  the order of these imports is the order in which problems are reported
from finetune_api.rules.base import (
    RULES,
    Findings,
    Problem,
    Rule,
    ExecutionTarget,
    new_problems,
    remove_defaults,
    check_spec,
    raise_first_finding,
    enforce_rules,
    rule,
)
from finetune_api.rules.derived_values import (
    INITS_CHANGING_BASE,
    OUTPUT_HEADS,
    LORA_METHODS,
    INITS_NEEDING_WHOLE_WEIGHTS,
    JUDGE_EMBEDDING_METRICS,
    JUDGE_METRICS,
    LOWER_IS_BETTER_METRICS,
    PROMPT_METHODS,
    BASE_WEIGHT_METHODS,
    base_bits,
    compute_batch_split,
    benchmarks_after_training,
    compares_answers,
    compares_metrics,
    get_constant_default,
    divisors,
    compute_data_parallel_size,
    effective_batch,
    evaluates_during_training,
    given_bits,
    min_batch_size_per_device,
    value_or_default,
    generation_server,
    gpus_per_node,
    gpus_per_pod,
    has_test_set,
    has_validation_set,
    is_vision_language,
    method_type_of,
    metrics_after_training,
    prompts_to_compare,
    verifies_artefacts,
    exports_oci,
    pushes_to_hub,
    trains_base_weights,
    count_ranks_per_node,
    uses_loftq,
    trainer_type_of,
    world_size,
    writes_predictions,
)
from finetune_api.rules import required_fields
from finetune_api.rules.required_fields import iterate_source_fields
from finetune_api.rules import methods
from finetune_api.rules import objectives
from finetune_api.rules import generation
from finetune_api.rules.objectives import LOSSES_WITH_LABEL_SMOOTHING
from finetune_api.rules import vision
from finetune_api.rules import data
from finetune_api.rules import training
from finetune_api.rules.training import MAX_ACCUMULATION
from finetune_api.rules.training import OPTIMIZERS, make_optimizer_hint
from finetune_api.rules import strategies
from finetune_api.rules.strategies import OPTIMIZERS_FOR_SHARDED_WEIGHTS, find_deepspeed_conflicts, find_fsdp_conflicts, find_zero3_conflicts
from finetune_api.rules import results
from finetune_api.rules import benchmarks
from finetune_api.rules import serving
from finetune_api.rules.serving import compute_adapter_rank, choose_max_lora_rank
from finetune_api.rules import storage
from finetune_api.rules import model_cache
from finetune_api.rules.model_cache import NO_CACHE, NODE_CACHE, can_be_cached
from finetune_api.rules import placement
from finetune_api.rules import quantities
from finetune_api.rules import existing_result
from finetune_api.rules.existing_result import needs_preparation
from finetune_api.rules.warnings import ALL_MODULES, find_warnings
from finetune_api.rules.rewards import REWARD_PARAMETERS, find_invalid_parameters

RULE_MODULES = (
    required_fields, methods, objectives, generation, vision, data, training, strategies, results, benchmarks, serving, storage, model_cache,
    placement, quantities, existing_result,
)  # fmt: skip
"""Modules with rules, in the order in which the rules run."""

__all__ = [
    "RULE_MODULES",
    "NODE_CACHE",
    "NO_CACHE",
    "can_be_cached",
    "ALL_MODULES",
    "INITS_CHANGING_BASE",
    "Findings",
    "OUTPUT_HEADS",
    "LORA_METHODS",
    "MAX_ACCUMULATION",
    "INITS_NEEDING_WHOLE_WEIGHTS",
    "JUDGE_EMBEDDING_METRICS",
    "JUDGE_METRICS",
    "LOWER_IS_BETTER_METRICS",
    "OPTIMIZERS",
    "OPTIMIZERS_FOR_SHARDED_WEIGHTS",
    "make_optimizer_hint",
    "PROMPT_METHODS",
    "Problem",
    "REWARD_PARAMETERS",
    "RULES",
    "Rule",
    "LOSSES_WITH_LABEL_SMOOTHING",
    "ExecutionTarget",
    "new_problems",
    "remove_defaults",
    "BASE_WEIGHT_METHODS",
    "compute_adapter_rank",
    "base_bits",
    "compute_batch_split",
    "benchmarks_after_training",
    "trains_base_weights",
    "check_spec",
    "compares_answers",
    "compares_metrics",
    "get_constant_default",
    "divisors",
    "compute_data_parallel_size",
    "effective_batch",
    "evaluates_during_training",
    "given_bits",
    "value_or_default",
    "generation_server",
    "gpus_per_node",
    "gpus_per_pod",
    "has_test_set",
    "has_validation_set",
    "is_vision_language",
    "needs_preparation",
    "choose_max_lora_rank",
    "method_type_of",
    "metrics_after_training",
    "prompts_to_compare",
    "verifies_artefacts",
    "exports_oci",
    "pushes_to_hub",
    "count_ranks_per_node",
    "raise_first_finding",
    "enforce_rules",
    "rule",
    "min_batch_size_per_device",
    "iterate_source_fields",
    "uses_loftq",
    "trainer_type_of",
    "writes_predictions",
    "find_deepspeed_conflicts",
    "find_fsdp_conflicts",
    "find_zero3_conflicts",
    "find_invalid_parameters",
    "find_warnings",
    "world_size",
]
