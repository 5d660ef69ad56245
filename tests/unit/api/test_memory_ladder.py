"""Advice of the memory plan after an attempt ran out of GPU memory."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_api.memory.architecture import parse_model_shape
from finetune_api.memory.description import RunFacts
from finetune_api.memory.ladder import RefusedAllocation, advise_smaller_values
from finetune_api.memory.plan import change_spec, plan_memory
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import MemoryAdvice

from tests.unit.api.test_memory_plan import TINY, resolve

GB = 10**9
MODEL = parse_model_shape(TINY | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 4, "num_attention_heads": 64, "num_key_value_heads": 8})
"""A large model with only four layers, so that a plan is computed quickly."""
DISABLED = {"gradientCheckpointing": "disabled"}


def make_spec_with_micro_batch(rows: int, **training: Any) -> FineTuneJobSpec:
    return resolve(training={"batchSizePerDevice": rows, "gradientAccumulationSteps": 3, **training}).spec


def compute_upper_bytes(spec: FineTuneJobSpec, **values: Any) -> int:
    return plan_memory(change_spec(spec, {f"training.{name}": value for name, value in values.items()}), MODEL).memory.upper_bytes


def get_advised_values(advice: MemoryAdvice) -> tuple[int | None, str | None, bool]:
    return advice.batch_size_per_device, advice.gradient_checkpointing, advice.fits


def test_the_largest_micro_batch_that_fits_is_advised_instead_of_half() -> None:
    """The attempt needed no more memory than its planned peak, so the planned peaks of smaller micro-batches are used unchanged."""
    spec = make_spec_with_micro_batch(24, **DISABLED)
    limit_bytes = compute_upper_bytes(spec, batchSizePerDevice=4)
    advice = advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(limit_bytes + 1, limit_bytes))
    assert get_advised_values(advice) == (4, None, True)
    assert (advice.upper_bytes, advice.planned_bytes) == (limit_bytes, plan_memory(spec, MODEL).memory.expected_bytes)
    assert get_advised_values(advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(limit_bytes, limit_bytes - 1))) == (3, None, True)


def test_all_planned_peaks_are_raised_if_the_attempt_needed_more_than_planned() -> None:
    spec = make_spec_with_micro_batch(8, **DISABLED)
    planned_bytes = plan_memory(spec, MODEL).memory.expected_bytes
    upper_bytes_of_four_rows = compute_upper_bytes(spec, batchSizePerDevice=4)
    # The attempt needed 1.5 times its planned peak, so the planned peaks of smaller micro-batches are multiplied by 1.5, too.
    advice = advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(planned_bytes * 3 // 2, int(1.4 * upper_bytes_of_four_rows)))
    assert get_advised_values(advice) == (2, None, True)
    assert advice.upper_bytes == pytest.approx(1.5 * compute_upper_bytes(spec, batchSizePerDevice=2), rel=1e-6)
    advice = advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(planned_bytes * 3 // 2, int(1.6 * upper_bytes_of_four_rows)))
    assert get_advised_values(advice) == (4, None, True)


def test_recomputation_is_enabled_only_if_no_micro_batch_fits_without_it() -> None:
    spec = make_spec_with_micro_batch(8, **DISABLED)
    limit_bytes = compute_upper_bytes(spec, batchSizePerDevice=1) - 1
    assert get_advised_values(advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(limit_bytes, limit_bytes))) == (2, "enabled", True)


def test_recomputation_of_all_layers_is_advised_first_if_the_trainer_kept_activations() -> None:
    spec = resolve(training={"batchSizePerDevice": 8}).spec
    limit_bytes = compute_upper_bytes(spec)
    advice = advise_smaller_values(spec, MODEL, RunFacts(recomputed_layer_count=1), RefusedAllocation(limit_bytes, limit_bytes))
    assert get_advised_values(advice) == (8, "enabled", True)
    advice = advise_smaller_values(spec, MODEL, RunFacts(recomputed_layer_count=1), RefusedAllocation(limit_bytes, limit_bytes - 1))
    assert get_advised_values(advice) == (4, "enabled", True)
    assert get_advised_values(advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(limit_bytes, limit_bytes))) == (4, None, True)


def test_recomputation_is_advised_first_if_the_plan_chose_to_keep_activations() -> None:
    """If recomputation was disabled by the plan and not by the user, the advice is to keep the micro-batch and to enable recomputation."""
    spec, chosen_paths = make_spec_with_micro_batch(8, **DISABLED), ["training.gradientCheckpointing"]
    limit_bytes = compute_upper_bytes(spec, gradientCheckpointing="enabled")
    advice = advise_smaller_values(spec, MODEL, RunFacts(recomputed_layer_count=0), RefusedAllocation(limit_bytes, limit_bytes), chosen_paths)
    assert get_advised_values(advice) == (8, "enabled", True)
    advice = advise_smaller_values(spec, MODEL, RunFacts(recomputed_layer_count=0), RefusedAllocation(limit_bytes, limit_bytes))
    assert get_advised_values(advice) == (2, None, True)


def test_prefix_tuning_gets_a_smaller_micro_batch_and_no_recomputation() -> None:
    resolution = resolve(method={"type": "prefixTuning"}, training={"batchSizePerDevice": 8})
    limit_bytes = compute_upper_bytes(resolution.spec, batchSizePerDevice=4)
    refused_allocation = RefusedAllocation(limit_bytes, limit_bytes)
    advice = advise_smaller_values(resolution.spec, MODEL, RunFacts(recomputed_layer_count=0), refused_allocation, list(resolution.defaults))
    assert "training.gradientCheckpointing" in resolution.defaults
    assert get_advised_values(advice) == (2, None, True)


def test_no_advised_change_exceeds_the_limit_of_accumulation_steps() -> None:
    """An optimizer step of this job has 65536 x 65536 rows. With a smaller micro-batch, the step would need more accumulation steps than the CRD allows."""
    spec = make_spec_with_micro_batch(65536, gradientAccumulationSteps=65536, gradientCheckpointing="enabled")
    limit_bytes = compute_upper_bytes(spec) - 1
    advice = advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(limit_bytes, limit_bytes))
    assert get_advised_values(advice) == (None, None, False) and advice.changes is not None
    assert not any("batchSizePerDevice" in change for change in advice.changes)


def test_the_smallest_values_are_advised_if_no_values_fit() -> None:
    advice = advise_smaller_values(make_spec_with_micro_batch(8, **DISABLED), MODEL, RunFacts(), RefusedAllocation(GB, GB))
    assert (*get_advised_values(advice), advice.changes) == (1, "enabled", False, None)


def test_the_advised_micro_batch_needs_no_more_accumulation_steps_than_allowed() -> None:
    spec = make_spec_with_micro_batch(8, gradientAccumulationSteps=20000, **DISABLED)
    assert get_advised_values(advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(GB, GB))) == (4, "enabled", False)


def test_up_to_three_changes_that_fit_are_advised_if_no_smaller_values_are_left() -> None:
    spec = resolve(training={"batchSizePerDevice": 1, "gradientCheckpointing": "enabled"}, method={"type": "lora"}).spec
    limit_bytes = compute_upper_bytes(spec) - 1
    advice = advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(limit_bytes, limit_bytes))
    assert get_advised_values(advice) == (None, None, False)
    assert advice.changes == ["method.type: qlora", "dataset.maxSequenceLength: 2048", "a GPU with 11 GB of memory, such as t4-16gb"]
    # The attempt needed twice its planned peak. So the planned peaks of all other settings are doubled too, and the advice names a larger GPU.
    advice_with_doubled_peaks = advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(2 * advice.planned_bytes, limit_bytes))
    assert advice_with_doubled_peaks.changes is not None and advice_with_doubled_peaks.changes[-1] == "a GPU with 21 GB of memory, such as a10-24gb"


def test_no_gpu_is_advised_if_none_is_large_enough() -> None:
    spec = resolve(training={"batchSizePerDevice": 1, "gradientCheckpointing": "enabled"}).spec
    advice = advise_smaller_values(spec, MODEL, RunFacts(), RefusedAllocation(1000 * GB, 20 * GB))
    assert advice.changes == []


def test_a_run_that_the_plan_cannot_compute_gets_no_advice() -> None:
    with pytest.raises(ConfigError, match="trainer.type is grpo, but the memory plan supports only sft, dpo, kto, orpo, reward"):
        advise_smaller_values(resolve(trainer={"type": "grpo"}).spec, MODEL, RunFacts(), RefusedAllocation(GB, GB))
