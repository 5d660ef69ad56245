"""Advice of the memory plan after a GPU had no memory left."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_api.memory.architecture import model_shape
from finetune_api.memory.description import Facts
from finetune_api.memory.ladder import RefusedAllocation, advise
from finetune_api.memory.plan import change_spec, plan_memory
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import MemoryAdvice

from tests.unit.api.test_memory_plan import TINY, resolve

GB = 10**9
MODEL = model_shape(TINY | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4, "num_attention_heads": 64, "num_key_value_heads": 8})
"""Four layers of a large model, so that a plan takes little time."""
DISABLED = {"gradientCheckpointing": "disabled"}


def spec_of(batch: int, **training: Any) -> FineTuneJobSpec:
    return resolve(training={"batchSizePerDevice": batch, "gradientAccumulationSteps": 3, **training}).spec


def upper_bytes(spec: FineTuneJobSpec, **values: Any) -> int:
    return plan_memory(change_spec(spec, {f"training.{name}": value for name, value in values.items()}), MODEL).memory.upper_bytes


def chosen(advice: MemoryAdvice) -> tuple[int | None, str | None, bool]:
    return advice.batch_size_per_device, advice.gradient_checkpointing, advice.fits


def test_the_largest_micro_batch_that_fits_is_advised_instead_of_half() -> None:
    """The GPU refused an allocation that the plan expected, so the planned peaks are not corrected."""
    spec = spec_of(24, **DISABLED)
    limit = upper_bytes(spec, batchSizePerDevice=4)
    advice = advise(spec, MODEL, Facts(), RefusedAllocation(limit + 1, limit))
    assert chosen(advice) == (4, None, True)
    assert (advice.upper_bytes, advice.planned_bytes) == (limit, plan_memory(spec, MODEL).memory.expected_bytes)
    assert chosen(advise(spec, MODEL, Facts(), RefusedAllocation(limit, limit - 1))) == (3, None, True)


def test_a_plan_that_was_too_low_is_corrected_by_what_the_attempt_needed() -> None:
    spec = spec_of(8, **DISABLED)
    planned = plan_memory(spec, MODEL).memory.expected_bytes
    four = upper_bytes(spec, batchSizePerDevice=4)
    # The attempt needed 1.5 times the plan. So do the smaller micro-batches.
    advice = advise(spec, MODEL, Facts(), RefusedAllocation(planned * 3 // 2, int(1.4 * four)))
    assert chosen(advice) == (2, None, True)
    assert advice.upper_bytes == pytest.approx(1.5 * upper_bytes(spec, batchSizePerDevice=2), rel=1e-6)
    assert chosen(advise(spec, MODEL, Facts(), RefusedAllocation(planned * 3 // 2, int(1.6 * four)))) == (4, None, True)


def test_recomputation_is_enabled_only_if_no_micro_batch_fits_without_it() -> None:
    spec = spec_of(8, **DISABLED)
    limit = upper_bytes(spec, batchSizePerDevice=1) - 1
    assert chosen(advise(spec, MODEL, Facts(), RefusedAllocation(limit, limit))) == (2, "enabled", True)


def test_recomputation_of_all_layers_comes_first_if_the_trainer_kept_activations() -> None:
    spec = resolve(training={"batchSizePerDevice": 8}).spec
    limit = upper_bytes(spec)
    assert chosen(advise(spec, MODEL, Facts(recomputed_layers=1), RefusedAllocation(limit, limit))) == (8, "enabled", True)
    assert chosen(advise(spec, MODEL, Facts(recomputed_layers=1), RefusedAllocation(limit, limit - 1))) == (4, "enabled", True)
    assert chosen(advise(spec, MODEL, Facts(), RefusedAllocation(limit, limit))) == (4, None, True)


def test_activations_that_the_plan_chose_to_keep_are_recomputed_first() -> None:
    """The plan, and not the user, disabled recomputation. So the same micro-batch with recomputation comes first, as for the trainer's own choice."""
    spec, chosen_paths = spec_of(8, **DISABLED), ["training.gradientCheckpointing"]
    limit = upper_bytes(spec, gradientCheckpointing="enabled")
    assert chosen(advise(spec, MODEL, Facts(recomputed_layers=0), RefusedAllocation(limit, limit), chosen_paths)) == (8, "enabled", True)
    assert chosen(advise(spec, MODEL, Facts(recomputed_layers=0), RefusedAllocation(limit, limit))) == (2, None, True)


def test_the_micro_batch_of_prefix_tuning_gets_smaller_first() -> None:
    resolved = resolve(method={"type": "prefixTuning"}, training={"batchSizePerDevice": 8})
    limit = upper_bytes(resolved.spec, batchSizePerDevice=4)
    advice = advise(resolved.spec, MODEL, Facts(recomputed_layers=0), RefusedAllocation(limit, limit), list(resolved.defaults))
    assert "training.gradientCheckpointing" in resolved.defaults
    assert chosen(advice) == (2, None, True)


def test_the_named_changes_stay_within_the_limit_of_the_accumulation() -> None:
    """65536 x 65536 rows: a smaller micro-batch would need more accumulation steps than the CRD allows."""
    spec = spec_of(65536, gradientAccumulationSteps=65536, gradientCheckpointing="enabled")
    limit = upper_bytes(spec) - 1
    advice = advise(spec, MODEL, Facts(), RefusedAllocation(limit, limit))
    assert chosen(advice) == (None, None, False) and advice.changes is not None
    assert not any("batchSizePerDevice" in change for change in advice.changes)


def test_the_smallest_values_are_tried_once_if_nothing_fits() -> None:
    advice = advise(spec_of(8, **DISABLED), MODEL, Facts(), RefusedAllocation(GB, GB))
    assert (*chosen(advice), advice.changes) == (1, "enabled", False, None)


def test_accumulation_stays_within_its_limit() -> None:
    spec = spec_of(8, gradientAccumulationSteps=20000, **DISABLED)
    assert chosen(advise(spec, MODEL, Facts(), RefusedAllocation(GB, GB))) == (4, "enabled", False)


def test_without_smaller_values_up_to_three_changes_that_fit_are_named() -> None:
    spec = resolve(training={"batchSizePerDevice": 1, "gradientCheckpointing": "enabled"}, method={"type": "lora"}).spec
    limit = upper_bytes(spec) - 1
    advice = advise(spec, MODEL, Facts(), RefusedAllocation(limit, limit))
    assert chosen(advice) == (None, None, False)
    assert advice.changes == ["method.type: qlora", "dataset.maxSequenceLength: 2048", "a GPU with 11 GB of memory, such as t4-16gb"]
    # Planned peaks are multiplied by 2, so shorter rows no longer fit and a larger GPU is named.
    twice = advise(spec, MODEL, Facts(), RefusedAllocation(2 * advice.planned_bytes, limit))
    assert twice.changes is not None and twice.changes[-1] == "a GPU with 21 GB of memory, such as a10-24gb"


def test_no_gpu_is_named_if_none_is_large_enough() -> None:
    spec = resolve(training={"batchSizePerDevice": 1, "gradientCheckpointing": "enabled"}).spec
    advice = advise(spec, MODEL, Facts(), RefusedAllocation(1000 * GB, 20 * GB))
    assert advice.changes == []


def test_runs_that_the_plan_does_not_know_get_no_advice() -> None:
    with pytest.raises(ConfigError, match="supervised fine-tuning only"):
        advise(resolve(trainer={"type": "dpo"}).spec, MODEL, Facts(), RefusedAllocation(GB, GB))
