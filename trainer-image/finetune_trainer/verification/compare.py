"""Compares the values of a stored artefact with the reference values of the training, and decides the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from finetune_api.status import ArtefactVerification, Verification, VerificationOutcome

from finetune_trainer.verification.reference import ReferenceValues

EXACT_TOLERANCE = 1e-3
"""If all computations are in 32 bits: largest accepted difference of any token's log-probability, in nats."""
SPREAD_FACTOR = 2.0
"""If not all computations are in 32 bits: the limit of the difference is this number times the difference between two batch layouts in the trainer."""
SMALLEST_TOLERANCE = 5e-3
"""If not all computations are in 32 bits: the limit is at least this number of nats, because two batch layouts can agree by chance."""
ROUNDED_TOLERANCE = 4e-2
"""For a merged model with 16-bit weights, the accepted difference is at least this number of nats.

Merging rounds the sum of base weight and adapter. The difference between two batch layouts does not contain this rounding. On an H200, eight correctly
merged models with 2 to 24 layers differed by 0.0023 to 0.0182 nats.
"""
SHARE_OF_CHANGE = 0.1
"""If not all computations are in 32 bits: a difference up to this share of the change by training is accepted, but at most `ROUNDED_TOLERANCE`.

Training uses autocast, FSDP or DeepSpeed, and a freshly loaded model does not, so the two round differently. On an H200, correct models
with 12 layers differed by 0.0057 to 0.0091 nats.
"""
SHARE_OF_DOUBT, SMALLEST_DOUBT = 0.5, 1e-4
"""An artefact is not verified if its difference from the reference values exceeds this share of the change by training.

This rule applies even if the difference is below the limit, because an artefact that lacks a part of the trained change could differ by the same
amount. Differences below `SMALLEST_DOUBT` nats are rounding in 32 bits.
"""
MERGED_MODEL_NAME = "merged"
"""Name of the merged model in the status."""
OUTCOMES_BY_SEVERITY = (VerificationOutcome.VERIFIED, VerificationOutcome.NOT_VERIFIED, VerificationOutcome.FAILED)


def compute_rms_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the root mean square of the differences between two lists of values. NaN if a value is not finite."""
    squares = [(first_value - second_value) ** 2 for first_value, second_value in zip(first, second, strict=True)]
    return math.sqrt(math.fsum(squares) / len(squares)) if all(map(math.isfinite, squares)) else math.nan


def compute_difference_and_tolerance(
    values: Sequence[float], reference: ReferenceValues, change: float | None, *, is_rounded: bool = False
) -> tuple[float, float]:
    """Return the difference from the reference values, and the largest accepted difference.

    In 32 bits, the difference is that of the token with the largest difference. In other formats, the difference is the root mean square over all tokens,
    because rounding shifts single unlikely tokens by much more than the others. `change`: root mean square of the change from the base model;
    None if unknown. `is_rounded`: whether merging has rounded the weights to 16 bits.
    """
    expected_values = reference.values()
    if reference.is_exact and not is_rounded:
        differences = [abs(value - expected_value) for value, expected_value in zip(values, expected_values, strict=True)]
        return (max(differences) if all(map(math.isfinite, differences)) else math.nan), EXACT_TOLERANCE
    spread = compute_rms_difference(expected_values, reference.batched_values())
    lowest_tolerance = ROUNDED_TOLERANCE
    if not is_rounded and change is not None and math.isfinite(change):
        lowest_tolerance = min(ROUNDED_TOLERANCE, max(SMALLEST_TOLERANCE, SHARE_OF_CHANGE * change))
    return compute_rms_difference(values, expected_values), max(SPREAD_FACTOR * spread, lowest_tolerance)


def replace_values(reference: ReferenceValues, values: Sequence[float]) -> ReferenceValues:
    """Return a copy of the reference with other values, which were computed without quantisation and in only one batch layout."""
    remaining_values = iter(values)
    rows = [row.model_copy(update={"values": list(islice(remaining_values, len(row.values)))}) for row in reference.rows]
    rows = [row.model_copy(update={"batched_values": row.values}) for row in rows]
    return reference.model_copy(update={"rows": rows, "quantization": None})


def judge_artefact(
    name: str, values: Sequence[float], base_values: Sequence[float] | None, reference: ReferenceValues, *, is_rounded: bool = False,
    device: str = "",
) -> ArtefactVerification:  # fmt: skip
    """Decide the result for one artefact. `base_values`: values of the base model; None for models with a score head, which the base model lacks.

    `is_rounded`: whether merging has rounded the weights to 16 bits. `device`: type of the device that computed `values`; empty if unknown.
    """
    change_from_base = compute_rms_difference(values, base_values) if base_values is not None else None
    difference, tolerance = compute_difference_and_tolerance(values, reference, change_from_base, is_rounded=is_rounded)
    verification = ArtefactVerification(
        artefact=name, result=VerificationOutcome.VERIFIED, difference=_round_or_none(difference), tolerance=_round_to_three_digits(tolerance),
        change_from_base=_round_or_none(change_from_base),
    )  # fmt: skip
    was_changed_in_training = reference.adapter.changes_output if reference.adapter is not None else None
    rounding_limit = 0.0 if was_changed_in_training else tolerance  # If the change in training is unknown, a small difference may be rounding.
    if change_from_base == 0 and was_changed_in_training is not False and difference > rounding_limit:
        return _mark_failed(verification, "AdapterHasNoEffect", "the stored adapter does not change the values of the base model")
    if math.isnan(difference):
        return _mark_failed(verification, "ValuesNotFinite", "the stored model computes values that are not finite")
    if difference > tolerance and name == MERGED_MODEL_NAME and reference.quantization is not None:
        reason = "the adapter was trained on a quantised base model, but merged into unquantised weights, so the difference includes the quantisation error"
        return verification.model_copy(update={"result": VerificationOutcome.NOT_VERIFIED, "code": "BaseWasQuantised", "reason": reason})
    may_be_rounding = (is_rounded or not reference.is_exact) and difference <= max(ROUNDED_TOLERANCE, SHARE_OF_CHANGE * (change_from_base or 0.0))
    if difference > tolerance and may_be_rounding:
        reason = f"its log-probabilities differ by {difference:.3g} nats, more than {tolerance:.3g}, but the rounding of 16-bit numbers can explain it"
        return verification.model_copy(update={"result": VerificationOutcome.NOT_VERIFIED, "code": "RoundingUnclear", "reason": reason})
    is_on_another_device = bool(device and reference.device and device != reference.device) and not reference.is_exact
    if difference > tolerance and is_on_another_device and difference <= SHARE_OF_DOUBT * (change_from_base or 0.0):
        reason = (
            f"its log-probabilities differ by {difference:.3g} nats, more than {tolerance:.3g}, but the training computed them on {reference.device} "
            f"and this pod on {device}: they round differently"
        )
        return verification.model_copy(update={"result": VerificationOutcome.NOT_VERIFIED, "code": "OtherDevice", "reason": reason})
    if difference > tolerance:
        reason = f"its log-probabilities differ by {difference:.3g} nats from those of the trained model, but at most {tolerance:.3g} nats are accepted"
        return _mark_failed(verification, "ValuesDiffer", reason)
    trained_change = compute_rms_difference(reference.values(), base_values) if base_values is not None else None
    if trained_change is not None and was_changed_in_training is not False and difference > max(SMALLEST_DOUBT, SHARE_OF_DOUBT * trained_change):
        reason = (
            f"its log-probabilities differ by {difference:.3g} nats, but training changed them by only {trained_change:.3g} nats: "
            "too little to tell rounding from a fault"
        )
        return verification.model_copy(update={"result": VerificationOutcome.NOT_VERIFIED, "code": "RoundingUnclear", "reason": reason})
    if change_from_base == 0:
        reason = "training did not change the values of the base model: check training.learningRate and the number of steps"
        return verification.model_copy(update={"code": "TrainingHadNoEffect", "reason": reason})
    return verification


def summarise(artefacts: Sequence[ArtefactVerification], reference: ReferenceValues | None) -> Verification:
    """Return the status of the verification. The result in the status is the worst result of all artefacts."""
    worst_outcome = max((artefact.result for artefact in artefacts), key=OUTCOMES_BY_SEVERITY.index, default=VerificationOutcome.NOT_VERIFIED)
    rows = reference.rows if reference is not None else []
    return Verification(result=worst_outcome, rows=len(rows), tokens=sum(len(row.values) for row in rows), artefacts=list(artefacts))


def build_failed_result(name: str, code: str, reason: str) -> ArtefactVerification:
    """Return the result for an artefact that is damaged or cannot be loaded."""
    return ArtefactVerification(artefact=name, result=VerificationOutcome.FAILED, code=code, reason=reason)


def build_not_verified_result(name: str, code: str, reason: str) -> ArtefactVerification:
    """Return the result for an artefact whose values could not be compared."""
    return ArtefactVerification(artefact=name, result=VerificationOutcome.NOT_VERIFIED, code=code, reason=reason)


def _mark_failed(verification: ArtefactVerification, code: str, reason: str) -> ArtefactVerification:
    return verification.model_copy(update={"result": VerificationOutcome.FAILED, "code": code, "reason": reason})


def _round_or_none(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else _round_to_three_digits(value)


def _round_to_three_digits(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")
