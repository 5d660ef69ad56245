"""The result of a verification follows from the computed values: they must be equal in 32 bits, and similar in other number formats."""

from __future__ import annotations

import math

import pytest
from finetune_api.status import VerificationOutcome
from finetune_trainer.verification.compare import (
    build_failed_result,
    build_not_verified_result,
    judge_artefact,
    summarise,
)
from finetune_trainer.verification.reference import ReferenceRow, ReferenceValues, TrainedAdapter

VALUES = [-1.0, -2.0, -3.0, -4.0]


def make_reference_values(*, autocast: str | None = None, spread: float = 0.0, changes_output: bool | None = True) -> ReferenceValues:
    row = ReferenceRow(ids=[1, 2, 3, 4, 5], is_counted=[False, True, True, True, True], values=VALUES, batched_values=[value + spread for value in VALUES])
    return ReferenceValues(autocast=autocast, rows=[row], adapter=TrainedAdapter(peft_type="LORA", changes_output=changes_output))


def shift_values(amount: float) -> list[float]:
    return [value + amount for value in VALUES]


@pytest.mark.parametrize(
    ("reference_values", "values", "result", "difference", "tolerance"),
    [
        (make_reference_values(), shift_values(0.0009), "Verified", 0.0009, 1e-3),
        (make_reference_values(), shift_values(0.0011), "Failed", 0.0011, 1e-3),
        (make_reference_values(), [*VALUES[:3], -4.0011], "Failed", 0.0011, 1e-3),
        (make_reference_values(autocast="bfloat16", spread=0.02), shift_values(0.039), "Verified", 0.039, 0.04),
        (make_reference_values(autocast="bfloat16", spread=0.02), shift_values(0.041), "Failed", 0.041, 0.04),
        (make_reference_values(autocast="bfloat16", spread=0.02), [*VALUES[:3], -4.06], "Verified", 0.03, 0.04),
    ],
)
def test_the_difference_is_compared_with_the_tolerance_of_the_number_format(
    reference_values: ReferenceValues, values: list[float], result: str, difference: float, tolerance: float
) -> None:
    verdict = judge_artefact("adapter", values, shift_values(0.2), reference_values)
    assert (verdict.result, verdict.code) == (VerificationOutcome(result), "ValuesDiffer" if result == "Failed" else None)
    assert verdict.difference == pytest.approx(difference, rel=1e-2) and verdict.tolerance == pytest.approx(tolerance, rel=1e-2)
    assert verdict.change_from_base is not None


@pytest.mark.parametrize(
    ("change", "spread", "difference", "result", "tolerance"),
    [
        (2.0, 0.0, 0.039, "Verified", 0.04),
        (2.0, 0.0, 0.19, "NotVerified", 0.04),
        (2.0, 0.0, 0.25, "Failed", 0.04),
        (0.2, 0.0, 0.019, "Verified", 0.02),
        (0.2, 0.0, 0.039, "NotVerified", 0.02),
        (0.2, 0.0, 0.041, "Failed", 0.02),
        (0.01, 0.0, 0.0049, "Verified", 0.005),
        (0.01, 0.0, 0.0051, "NotVerified", 0.005),
        (0.01, 0.05, 0.09, "NotVerified", 0.1),
        (0.2, 0.05, 0.09, "Verified", 0.1),
        (None, 0.0, 0.039, "Verified", 0.04),
        (None, 0.0, 0.041, "Failed", 0.04),
    ],
)
def test_a_difference_that_rounding_can_explain_never_fails(
    change: float | None, spread: float, difference: float, result: str, tolerance: float
) -> None:
    base = None if change is None else shift_values(difference + change)
    verdict = judge_artefact("adapter", shift_values(difference), base, make_reference_values(autocast="bfloat16", spread=spread))
    codes = {"Verified": None, "NotVerified": "RoundingUnclear", "Failed": "ValuesDiffer"}
    assert (verdict.result, verdict.code) == (VerificationOutcome(result), codes[result])
    assert verdict.tolerance == pytest.approx(tolerance)


def test_a_merged_model_may_differ_by_the_rounding_of_its_weights() -> None:
    for reference_values in (make_reference_values(), make_reference_values(autocast="bfloat16")):
        good_result, bad_result = (
            judge_artefact("merged", shift_values(amount), shift_values(0.2), reference_values, is_rounded=True) for amount in (0.039, 0.041)
        )
        assert (good_result.result, good_result.tolerance, bad_result.result, bad_result.code) == ("Verified", 0.04, "Failed", "ValuesDiffer")


@pytest.mark.parametrize(
    ("difference", "result", "code"), [(0.01, "Verified", None), (0.016, "NotVerified", "RoundingUnclear"), (0.03, "Failed", "AdapterHasNoEffect")]
)
def test_a_merge_that_may_lack_half_of_a_small_change_is_not_verified(difference: float, result: str, code: str | None) -> None:
    """Training changed the values by 0.03 nats. The merged model differs from the trained model by `difference` nats, in the direction of the base model."""
    verdict = judge_artefact("merged", shift_values(difference), shift_values(0.03), make_reference_values(autocast="bfloat16"), is_rounded=True)
    assert (verdict.result, verdict.code) == (result, code)


def test_a_merge_into_an_unquantised_base_is_not_verified_if_training_used_a_quantised_base() -> None:
    reference_values = make_reference_values(autocast="bfloat16").model_copy(update={"quantization": {"quant_method": "bitsandbytes"}})
    merged_verdict = judge_artefact("merged", shift_values(0.2), shift_values(1.0), reference_values, is_rounded=True)
    assert (merged_verdict.result, merged_verdict.code, merged_verdict.difference) == ("NotVerified", "BaseWasQuantised", 0.2)
    assert judge_artefact("adapter", shift_values(0.2), shift_values(1.0), reference_values).result == "Failed"


@pytest.mark.parametrize(
    ("reference_values", "device", "difference", "result", "code"),
    [
        (make_reference_values(autocast="bfloat16"), "cpu", 0.3, "NotVerified", "OtherDevice"),
        (make_reference_values(autocast="bfloat16"), "cpu", 0.6, "Failed", "ValuesDiffer"),
        (make_reference_values(autocast="bfloat16"), "cuda", 0.3, "Failed", "ValuesDiffer"),
        (make_reference_values(autocast="bfloat16"), "", 0.3, "Failed", "ValuesDiffer"),
        (make_reference_values(), "cpu", 0.3, "Failed", "ValuesDiffer"),
    ],
)
def test_a_difference_between_device_types_is_not_verified_instead_of_failed(
    reference_values: ReferenceValues, device: str, difference: float, result: str, code: str
) -> None:
    """Training changed the values by 1 nat.

    On another type of device, rounding can explain a difference of up to half of the change by training, except if the values are in 32 bits.
    """
    shifted_values = shift_values(difference)
    base_values = [value + 1 for value in shifted_values]
    verdict = judge_artefact("adapter", shifted_values, base_values, reference_values.model_copy(update={"device": "cuda"}), device=device)
    assert (verdict.result, verdict.code, verdict.difference) == (result, code, difference)


def test_values_that_are_not_finite_fail() -> None:
    verdict = judge_artefact("adapter", [math.nan, *VALUES[1:]], None, make_reference_values())
    assert (verdict.result, verdict.code, verdict.difference) == (VerificationOutcome.FAILED, "ValuesNotFinite", None)


def test_an_adapter_without_effect_is_named() -> None:
    verdict = judge_artefact("adapter", shift_values(1.0), shift_values(1.0), make_reference_values())
    assert (verdict.result, verdict.code, verdict.change_from_base) == (VerificationOutcome.FAILED, "AdapterHasNoEffect", 0.0)


def test_a_training_without_effect_is_verified_and_named() -> None:
    verdict = judge_artefact("adapter", VALUES, VALUES, make_reference_values(changes_output=False))
    assert (verdict.result, verdict.code) == (VerificationOutcome.VERIFIED, "TrainingHadNoEffect")


def test_an_adapter_that_changes_values_only_by_rounding_is_not_failed_if_its_effect_was_not_measured() -> None:
    """The trainer does not measure a sharded model without its adapter.

    For a sharded model, it is therefore unknown whether training changed the values by more than rounding.
    """
    stored_values = shift_values(0.0005)
    unmeasured_verdict, lost_verdict = (
        judge_artefact("adapter", stored_values, stored_values, make_reference_values(changes_output=effect)) for effect in (None, True)
    )
    assert (unmeasured_verdict.result, unmeasured_verdict.code) == (VerificationOutcome.NOT_VERIFIED, "RoundingUnclear")
    equal_verdict = judge_artefact("adapter", VALUES, VALUES, make_reference_values(changes_output=None))
    assert (equal_verdict.result, equal_verdict.code) == (VerificationOutcome.VERIFIED, "TrainingHadNoEffect")
    assert (lost_verdict.result, lost_verdict.code) == (VerificationOutcome.FAILED, "AdapterHasNoEffect")


def test_the_worst_result_of_all_artefacts_is_the_result() -> None:
    good_result = judge_artefact("adapter", VALUES, shift_values(1.0), make_reference_values())
    unknown_result, bad_result = build_not_verified_result("merged", "ModelTooLarge", "too large"), build_failed_result("merged", "WeightsNotFinite", "NaN")
    result_lists = ([good_result], [good_result, unknown_result], [unknown_result, bad_result, good_result], [])
    assert [summarise(artefact_results, make_reference_values()).result for artefact_results in result_lists] == [
        "Verified", "NotVerified", "Failed", "NotVerified",
    ]  # fmt: skip
    summary = summarise([good_result], make_reference_values())
    assert (summary.rows, summary.tokens) == (1, 4)
