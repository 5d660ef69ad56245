"""Changes to the next attempt after an attempt ran out of memory or its loss diverged."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import ExitCode, Reason
from finetune_api.pod import TerminationMessage
from finetune_api.rules import check_spec
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Adaptation, Checkpoint, MemoryAdvice, RunPlan
from finetune_operator.decide import decide
from finetune_operator.plan import ActionResult
from finetune_operator.policies.adaptations import (
    AdaptationsExhausted,
    adapt_to_divergence,
    adapt_to_out_of_memory,
    apply_adaptations,
    find_max_start_step,
    get_original_values,
)
from finetune_operator.report import compute_status
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.operator.samples import T0, accept_spec, at, end_pod, facts, iso_time, job, pod, report, spec, status

ROLLBACK = Adaptation(
    time=T0, reason=Reason.DIVERGED, change="", set={"resume.maxStep": 20, "resume.firstAttempt": 3}
)


def list_all_changes(**groups: Any) -> list[str]:
    """Adapt the spec again and again until no further adaptation is possible, and return the changes in order."""
    current, changes = accept_spec(spec(**groups)).spec, []
    while isinstance(adaptation := adapt_to_out_of_memory(current, T0), Adaptation):
        changes.append(adaptation.change)
        current = apply_adaptations(current, [adaptation])
        assert not check_spec(current), adaptation
    return changes


STARTED_ATTEMPT = {"number": 1, "startTime": iso_time(0)}

CHECKPOINTS = [
    {"step": step, "uri": f"s3://m/checkpoints/step-{step:08d}/a1-aaaaaaaa", "healthy": True} for step in (100, 200, 300, 400, 500)
]  # fmt: skip


@settings(deadline=None)
@given(batch=st.integers(1, 512), accumulation=st.integers(1, 512))
def test_memory_adaptations_keep_the_effective_batch_and_are_finite(batch: int, accumulation: int) -> None:
    current = accept_spec(spec(training={"batchSizePerDevice": batch, "gradientAccumulationSteps": accumulation})).spec
    previous_batch = batch
    for _ in range(12):
        adaptation = adapt_to_out_of_memory(current, T0)
        if isinstance(adaptation, AdaptationsExhausted):
            break
        current = apply_adaptations(current, [adaptation])
        new_batch, accumulation_steps = current.training.batch_size_per_device, current.training.gradient_accumulation_steps
        assert new_batch is not None and accumulation_steps is not None
        assert new_batch * accumulation_steps == batch * accumulation
        assert new_batch <= previous_batch / 2 or new_batch == previous_batch
        previous_batch = new_batch
    else:
        raise AssertionError("the adaptations have no end")
    assert previous_batch == 1 or accumulation * batch > 65536
    assert current.training.gradient_checkpointing == "enabled"


def test_micro_batch_of_kto_never_shrinks_below_two_rows() -> None:
    raw_spec = spec(trainer={"type": "kto"}, training={"batchSizePerDevice": 4, "gradientCheckpointing": "disabled"})
    first = adapt_to_out_of_memory(accept_spec(raw_spec).spec, T0)
    assert isinstance(first, Adaptation)
    assert first.set == {"training.batchSizePerDevice": 2, "training.gradientAccumulationSteps": 8}
    second = adapt_to_out_of_memory(apply_adaptations(accept_spec(raw_spec).spec, [first]), T0)
    assert isinstance(second, Adaptation)
    assert second.set == {"training.gradientCheckpointing": "enabled"}


def test_policy_fail_forbids_every_adaptation() -> None:
    assert isinstance(
        adapt_to_out_of_memory(accept_spec(spec(policy={"onOutOfMemory": "Fail"})).spec, T0), AdaptationsExhausted
    )
    adaptation = adapt_to_divergence(accept_spec(spec(policy={"onDivergence": "Fail"})).spec, [], [], T0)
    assert isinstance(adaptation, AdaptationsExhausted)


def test_divergence_replays_once_then_rolls_back_twice_with_half_the_learning_rate() -> None:
    base = accept_spec(spec(training={"learningRate": 0.01})).spec
    checkpoints = [Checkpoint(step=s, uri=f"u{s}", healthy=True) for s in (10, 20, 30)]
    adaptations: list[Adaptation] = []
    for attempt in (1, 2, 3):
        adaptation = adapt_to_divergence(apply_adaptations(base, adaptations), adaptations, checkpoints, T0, attempt)
        assert isinstance(adaptation, Adaptation)
        adaptations.append(adaptation)
    assert [adaptation.set for adaptation in adaptations] == [
        {},
        {"training.learningRate": 0.005, "resume.maxStep": 20, "resume.firstAttempt": 3},
        {"training.learningRate": 0.0025, "resume.maxStep": 10, "resume.firstAttempt": 4},
    ]
    assert isinstance(adapt_to_divergence(apply_adaptations(base, adaptations), adaptations, checkpoints, T0), AdaptationsExhausted)


def test_unhealthy_checkpoints_are_not_rollback_targets() -> None:
    """A checkpoint is unhealthy if the loss after it was not finite. Its weights may be the cause, so a rollback must not resume from it."""
    base = accept_spec().spec
    checkpoints = [
        Checkpoint(step=step, uri=f"u{step}", healthy=healthy)
        for step, healthy in ((10, True), (20, False), (30, True), (40, False))
    ]
    replay = adapt_to_divergence(base, [], checkpoints, T0)
    assert isinstance(replay, Adaptation) and "step 30" in replay.change
    rollback = adapt_to_divergence(base, [replay], checkpoints, T0, 2)
    assert isinstance(rollback, Adaptation) and rollback.set is not None
    assert rollback.set["resume.maxStep"] == 10


@pytest.mark.parametrize(
    ("committed_checkpoints", "max_start_step"),
    [
        ([], 20),
        ([(10, 1), (20, 1), (30, 2)], 20),
        ([(10, 1), (20, 1), (30, 2), (25, 3)], 25),
        ([(20, 1), (30, 2), (30, 3)], 30),
        ([(20, 1), (30, 2), (40, 3)], None),
        ([(30, 2), (500, 3), (600, 4)], None),
        ([(30, 0)], 20),
        ([(1, 3)], None),
        ([(20, 1), (1, 3)], 20),
    ],
)
def test_rollback_excludes_checkpoints_of_older_attempts_only(
    committed_checkpoints: list[tuple[int, int]], max_start_step: int | None
) -> None:
    """`committed_checkpoints` has the (step, attempt) of each checkpoint. If the attempt is 0, the checkpoint's URI names no attempt."""
    uris = {
        attempt: f"s3://b/checkpoints/step/a{attempt}-0123abcd" if attempt else "s3://b/step" for _, attempt in committed_checkpoints
    }
    checkpoints = [Checkpoint(step=step, uri=uris[attempt]) for step, attempt in committed_checkpoints]
    assert find_max_start_step([ROLLBACK], checkpoints) == max_start_step
    assert find_max_start_step([], checkpoints) is None


def test_adaptation_that_the_rules_refuse_is_skipped() -> None:
    assert list_all_changes(method={"type": "prefixTuning"}, training={"batchSizePerDevice": 2}) == [
        "batchSizePerDevice 2 -> 1, gradientAccumulationSteps 4 -> 8"
    ]


GB = 10**9
MEMORY_BYTES = {"needed_bytes": 81 * GB, "available_bytes": 80 * GB, "planned_bytes": 70 * GB, "expected_bytes": 60 * GB, "upper_bytes": 64 * GB}


def adapt_with_advice(advice: dict[str, Any], earlier_adaptations: list[Adaptation] | None = None, **groups: Any) -> Adaptation | AdaptationsExhausted:
    """Return the adaptation that follows when the memory plan gives this advice for a job with micro-batches of 12 rows."""
    training = {"batchSizePerDevice": 12, "gradientAccumulationSteps": 5, **groups.pop("training", {})}
    current = apply_adaptations(accept_spec(spec(training=training, **groups)).spec, earlier_adaptations or [])
    return adapt_to_out_of_memory(current, T0, MemoryAdvice(**MEMORY_BYTES | advice), earlier_adaptations or [])


@pytest.mark.parametrize(
    ("advice", "change"),
    [
        ({"batch_size_per_device": 4}, "batchSizePerDevice 12 -> 4, gradientAccumulationSteps 5 -> 15"),
        ({"batch_size_per_device": 1}, "batchSizePerDevice 12 -> 1, gradientAccumulationSteps 5 -> 60"),
        ({"batch_size_per_device": 12, "gradient_checkpointing": "enabled"}, "gradientCheckpointing enabled for all layers"),
        ({"batch_size_per_device": 6, "gradient_checkpointing": "enabled"},
         "gradientCheckpointing enabled for all layers, batchSizePerDevice 12 -> 6, gradientAccumulationSteps 5 -> 10"),
        # This advice is wrong, so the operator ignores it and halves the micro-batch.
        ({"batch_size_per_device": 5}, "batchSizePerDevice 12 -> 6, gradientAccumulationSteps 5 -> 10"),
        ({"batch_size_per_device": 24}, "batchSizePerDevice 12 -> 6, gradientAccumulationSteps 5 -> 10"),
        ({"batch_size_per_device": 0}, "batchSizePerDevice 12 -> 6, gradientAccumulationSteps 5 -> 10"),
        ({"batch_size_per_device": 12}, "batchSizePerDevice 12 -> 6, gradientAccumulationSteps 5 -> 10"),
        ({"batch_size_per_device": 12, "gradient_checkpointing": "disabled"}, "batchSizePerDevice 12 -> 6, gradientAccumulationSteps 5 -> 10"),
        ({}, "batchSizePerDevice 12 -> 6, gradientAccumulationSteps 5 -> 10"),
    ],
)  # fmt: skip
def test_advised_values_are_used_and_keep_the_effective_batch(advice: dict[str, Any], change: str) -> None:
    adaptation = adapt_with_advice(advice, training={"gradientCheckpointing": "enabled"})
    assert isinstance(adaptation, Adaptation) and adaptation.change == change


def test_status_explains_the_advised_values() -> None:
    fitting, smallest = adapt_with_advice({"batch_size_per_device": 4, "fits": True}), adapt_with_advice({"batch_size_per_device": 1, "planned_bytes": 90 * GB})
    assert isinstance(fitting, Adaptation) and isinstance(smallest, Adaptation)
    assert fitting.explanation == (
        "the attempt needed at least 81.0 GB of GPU memory, 80.0 GB were available, and the plan expected 70.0 GB; corrected by these numbers, the new "
        "values need 60.0 GB, at most 64.0 GB"
    )
    assert smallest.explanation == (
        "the attempt needed at least 81.0 GB of GPU memory, 80.0 GB were available, and the plan expected 90.0 GB; the new values need 60.0 GB, at most "
        "64.0 GB; this may not fit, but no values need less"
    )
    adaptation = adapt_with_advice({})
    assert isinstance(adaptation, Adaptation) and adaptation.explanation is None


def test_advice_to_enable_recomputation_is_used_only_once() -> None:
    advice = {"batch_size_per_device": 12, "gradient_checkpointing": "enabled"}
    first = adapt_with_advice(advice)
    assert isinstance(first, Adaptation) and first.set == {"training.gradientCheckpointing": "enabled"}
    second = adapt_with_advice(advice, [first])
    assert isinstance(second, Adaptation) and second.set == {"training.batchSizePerDevice": 6, "training.gradientAccumulationSteps": 10}


def test_the_evaluation_batch_follows_the_advised_micro_batch() -> None:
    adaptation = adapt_with_advice({"batch_size_per_device": 3}, dataset={"split": {"validation": 0.1}}, evaluation={"batchSizePerDevice": 8})
    assert isinstance(adaptation, Adaptation) and adaptation.set == {
        "training.batchSizePerDevice": 3, "training.gradientAccumulationSteps": 20, "evaluation.batchSizePerDevice": 3
    }  # fmt: skip


def test_policy_fail_forbids_the_advised_adaptation() -> None:
    assert isinstance(adapt_with_advice({"batch_size_per_device": 3}, policy={"onOutOfMemory": "Fail"}), AdaptationsExhausted)


def test_failure_after_the_last_reduction_names_changes_that_would_fit() -> None:
    smallest = {"batchSizePerDevice": 1, "gradientCheckpointing": "enabled"}
    exhausted = adapt_with_advice({"changes": ["method.type: qlora", "dataset.maxSequenceLength: 1024"]}, training=smallest)
    assert isinstance(exhausted, AdaptationsExhausted)
    assert exhausted.hint == "create a job with one of these changes, which fit by the memory plan: method.type: qlora; dataset.maxSequenceLength: 1024"
    exhausted_without_changes = adapt_with_advice({"changes": []}, training=smallest)
    assert isinstance(exhausted_without_changes, AdaptationsExhausted) and exhausted_without_changes.hint.startswith("use a larger GPU")


def test_advice_reaches_the_next_attempt_from_the_termination_message() -> None:
    advice = MemoryAdvice(**MEMORY_BYTES | {"batch_size_per_device": 1, "fits": True})
    message = TerminationMessage(code="GpuOutOfMemory", plan=RunPlan(out_of_memory=advice))
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT])
    job_facts = facts(status=old_status, jobs=[job(failed_at=at(60))], pods=[end_pod(pod(), ExitCode.OUT_OF_MEMORY, message)], now=at(61))
    new_status = compute_status(job_facts, decide(job_facts), ActionResult())
    assert [adaptation.change for adaptation in new_status.adaptations] == ["batchSizePerDevice 4 -> 1, gradientAccumulationSteps 4 -> 16"]
    assert new_status.adaptations[0].explanation is not None
    assert new_status.plan is not None and new_status.plan.out_of_memory == advice


def test_evaluation_batch_shrinks_with_the_training_batch() -> None:
    dataset = {"train": "s3://data/a.jsonl", "split": {"validation": 0.1}}
    assert list_all_changes(dataset=dataset, evaluation={"batchSizePerDevice": 32}, training={"batchSizePerDevice": 2}) == [
        "batchSizePerDevice 2 -> 1, gradientAccumulationSteps 4 -> 8, evaluation.batchSizePerDevice 32 -> 1",
        "gradientCheckpointing disabled -> enabled",
    ]  # fmt: skip
    assert list_all_changes(dataset=dataset, evaluation={"batchSizePerDevice": 8}, training={"batchSizePerDevice": 1})[0] == (
        "evaluation.batchSizePerDevice 8 -> 1"
    )  # fmt: skip
    assert "evaluation" not in " ".join(list_all_changes(evaluation={"batchSizePerDevice": 32}))


def test_second_rollback_uses_a_checkpoint_that_was_not_removed() -> None:
    raw_spec = spec(checkpoint={"keep": 2})
    old_status = status(attempt=1, attempts=[STARTED_ATTEMPT], checkpoints=CHECKPOINTS)
    received_report = report(checkpoints=CHECKPOINTS[-2:], progress={"step": 510})
    job_facts = facts(spec=raw_spec, status=old_status, jobs=[job()], pods=[pod()], last_report=received_report)
    kept_checkpoints = compute_status(job_facts, decide(job_facts), ActionResult()).checkpoints
    adaptations: list[Adaptation] = []
    for attempt in (1, 2, 3):
        adaptation = adapt_to_divergence(accept_spec(raw_spec).spec, adaptations, kept_checkpoints, T0, attempt)
        assert not isinstance(adaptation, AdaptationsExhausted)
        adaptations.append(adaptation)
    assert (adaptations[-1].set or {})["resume.maxStep"] == 400


def describe_next_change(**groups: Any) -> str:
    """Return a text that says how a spec without defaults is changed after an attempt ran out of memory."""
    adaptation = adapt_to_out_of_memory(FineTuneJobSpec.model_validate(spec(**groups)), T0)
    return adaptation.change if isinstance(adaptation, Adaptation) else adaptation.message


@pytest.mark.parametrize(
    ("batch", "accumulation", "text"),
    [
        (2, None, "batchSizePerDevice 2 -> 1, gradientAccumulationSteps None -> 2"),
        (5, 3, "batchSizePerDevice 5 -> 1, gradientAccumulationSteps 3 -> 15"),
        (6, 5, "batchSizePerDevice 6 -> 3, gradientAccumulationSteps 5 -> 10"),
        (2, 32768, "batchSizePerDevice 2 -> 1, gradientAccumulationSteps 32768 -> 65536"),
        (2, 32769, "gradientCheckpointing disabled -> enabled"),
        (1, 1, "gradientCheckpointing disabled -> enabled"),
    ],
)
def test_micro_batch_shrinks_within_the_limit_of_accumulation(batch: int, accumulation: int | None, text: str) -> None:
    training = {"batchSizePerDevice": batch, "gradientAccumulationSteps": accumulation, "gradientCheckpointing": "disabled"}
    assert describe_next_change(training=training) == text


@pytest.mark.parametrize(
    ("training", "values"),
    [
        ({}, "batchSizePerDevice 1, gradientAccumulationSteps 1 and activation checkpointing unknown"),
        ({"batchSizePerDevice": 1, "gradientAccumulationSteps": 7, "gradientCheckpointing": "enabled"},
         "batchSizePerDevice 1, gradientAccumulationSteps 7 and activation checkpointing enabled"),
    ],
    ids=["no values", "smallest values"],
)  # fmt: skip
def test_failure_message_contains_the_values_that_cannot_be_reduced(training: dict[str, Any], values: str) -> None:
    assert describe_next_change(training=training) == f"memory ran out with {values}: no further reduction is possible"


@pytest.mark.parametrize(
    ("split", "evaluation_batch", "text"),
    [
        ("validation", 3, "batchSizePerDevice 4 -> 2, gradientAccumulationSteps 1 -> 2, evaluation.batchSizePerDevice 3 -> 2"),
        ("test", 5, "batchSizePerDevice 4 -> 2, gradientAccumulationSteps 1 -> 2, evaluation.batchSizePerDevice 5 -> 2"),
        ("validation", 2, "batchSizePerDevice 4 -> 2, gradientAccumulationSteps 1 -> 2"),
        ("test", 1, "batchSizePerDevice 4 -> 2, gradientAccumulationSteps 1 -> 2"),
        (None, 5, "batchSizePerDevice 4 -> 2, gradientAccumulationSteps 1 -> 2"),
        ("validation", None, "batchSizePerDevice 4 -> 2, gradientAccumulationSteps 1 -> 2"),
    ],
)
def test_evaluation_batch_is_at_most_the_training_batch(split: str | None, evaluation_batch: int | None, text: str) -> None:
    dataset = {"split": {split: 0.1}} if split else {}
    training = {"batchSizePerDevice": 4, "gradientAccumulationSteps": 1}
    assert describe_next_change(dataset=dataset, training=training, evaluation={"batchSizePerDevice": evaluation_batch}) == text


@pytest.mark.parametrize(("evaluation_batch", "is_reduced"), [(1, False), (2, True)])
def test_evaluation_batch_shrinks_if_the_training_batch_cannot(evaluation_batch: int, is_reduced: bool) -> None:
    text = describe_next_change(
        dataset={"split": {"test": 0.1}}, training={"batchSizePerDevice": 1}, evaluation={"batchSizePerDevice": evaluation_batch}
    )
    assert (text == f"evaluation.batchSizePerDevice {evaluation_batch} -> 1") is is_reduced


def test_adapted_field_has_its_newest_value_and_its_original_value_is_known() -> None:
    changed_fields: list[dict[str, Any] | None] = [
        {"training.batchSizePerDevice": 2, "resume.maxStep": 20, "resume.firstAttempt": 3}, None, {"training.batchSizePerDevice": 1}
    ]  # fmt: skip
    adaptations = [Adaptation(time=T0, reason=Reason.OUT_OF_MEMORY, change="", set=fields) for fields in changed_fields]
    resolved_spec = accept_spec().spec
    assert apply_adaptations(resolved_spec, adaptations) == resolved_spec.with_values({"training.batchSizePerDevice": 1})
    assert get_original_values(resolved_spec, adaptations) == {"training.batchSizePerDevice": 4}
    unusable = Adaptation(time=T0, reason=Reason.OUT_OF_MEMORY, change="", set={"training.batchSizePerDevice": "many"})
    assert apply_adaptations(resolved_spec, [unusable]) == resolved_spec


@pytest.mark.parametrize(
    ("steps", "texts"),
    [
        ([], ["replay from the start, nothing changed", "rolled back to the start, learningRate 0.01 -> 0.005",
              "rolled back to the start, learningRate 0.005 -> 0.0025"]),
        ([10], ["replay from step 10, nothing changed", "rolled back to the start, learningRate 0.01 -> 0.005",
                "rolled back to the start, learningRate 0.005 -> 0.0025"]),
        ([10, 30], ["replay from step 30, nothing changed", "rolled back to step 10, learningRate 0.01 -> 0.005",
                    "rolled back to step 10, learningRate 0.005 -> 0.0025"]),
        ([30, 10, 40, 20], ["replay from step 40, nothing changed", "rolled back to step 30, learningRate 0.01 -> 0.005",
                            "rolled back to step 20, learningRate 0.005 -> 0.0025"]),
    ],
    ids=["no checkpoint", "one checkpoint", "two checkpoints", "unsorted checkpoints"],
)  # fmt: skip
def test_each_rollback_skips_one_more_checkpoint(steps: list[int], texts: list[str]) -> None:
    checkpoints = [Checkpoint(step=step, uri=f"u{step}", healthy=None if step == 10 else True) for step in steps]
    base = accept_spec(spec(training={"learningRate": 0.01})).spec
    adaptations = [Adaptation(time=T0, reason=Reason.OUT_OF_MEMORY, change="")]
    for text in texts:
        adaptation = adapt_to_divergence(apply_adaptations(base, adaptations), adaptations, checkpoints, T0)
        assert isinstance(adaptation, Adaptation)
        assert (adaptation.change, adaptation.time, adaptation.reason) == (text, T0, Reason.DIVERGED)
        assert (adaptation.set or {}).get("resume.firstAttempt", 2) == 2
        adaptations.append(adaptation)
    exhausted = adapt_to_divergence(apply_adaptations(base, adaptations), adaptations, checkpoints, T0)
    assert isinstance(exhausted, AdaptationsExhausted)
    assert exhausted.message == "the loss was not finite again after one replay and 2 rollbacks, the last one with learningRate 0.0025"


@pytest.mark.parametrize(("set_fields", "limit"), [({"resume.maxStep": 20}, 20), ({"resume.firstAttempt": 3}, None), ({"resume.maxStep": "x"}, None)])
def test_incomplete_rollback_limits_the_start_step_only_if_the_step_is_known(set_fields: dict[str, Any], limit: int | None) -> None:
    incomplete_rollback = Adaptation(time=T0, reason=Reason.DIVERGED, change="", set=set_fields)
    assert find_max_start_step([incomplete_rollback], [Checkpoint(step=30, uri="s3://b/step")]) == limit
