"""Changes to the next attempt after an attempt ran out of memory or its loss diverged."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_api.rules import check
from finetune_api.status import Adaptation, Checkpoint
from finetune_operator.decide import decide
from finetune_operator.plan import ActionResult
from finetune_operator.policies.adaptations import (
    AdaptationsExhausted,
    adapt_to_divergence,
    adapt_to_out_of_memory,
    apply_adaptations,
    max_start_step,
)
from finetune_operator.report import compute_status
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.operator.samples import T0, accept_spec, facts, iso_time, job, pod, report, spec, status

ROLLED_BACK = Adaptation(
    time=T0, reason=Reason.DIVERGED, change="", set={"resume.maxStep": 20, "resume.firstAttempt": 3}
)


def all_changes(**groups: Any) -> list[str]:
    """Return all changes in order, until no further adaptation is possible."""
    current, changes = accept_spec(spec(**groups)).spec, []
    while isinstance(change := adapt_to_out_of_memory(current, T0), Adaptation):
        changes.append(change.change)
        current = apply_adaptations(current, [change])
        assert not check(current), change
    return changes


STARTED_ATTEMPT = {"number": 1, "startTime": iso_time(0)}

CHECKPOINTS = [
    {"step": step, "uri": f"s3://m/checkpoints/step-{step:08d}/a1-aaaaaaaa", "healthy": True} for step in (100, 200, 300, 400, 500)
]  # fmt: skip


@settings(deadline=None)
@given(batch=st.integers(1, 512), accumulation=st.integers(1, 512))
def test_memory_adaptations_keep_the_effective_batch_and_end(batch: int, accumulation: int) -> None:
    current = accept_spec(spec(training={"batchSizePerDevice": batch, "gradientAccumulationSteps": accumulation})).spec
    previous_batch = batch
    for _ in range(12):
        change = adapt_to_out_of_memory(current, T0)
        if isinstance(change, AdaptationsExhausted):
            break
        current = apply_adaptations(current, [change])
        new_batch, accumulation_steps = current.training.batch_size_per_device, current.training.gradient_accumulation_steps
        assert new_batch is not None and accumulation_steps is not None
        assert new_batch * accumulation_steps == batch * accumulation
        assert new_batch <= previous_batch / 2 or new_batch == previous_batch
        previous_batch = new_batch
    else:
        raise AssertionError("the adaptations have no end")
    assert previous_batch == 1 or accumulation * batch > 65536
    assert current.training.gradient_checkpointing == "enabled"


def test_next_micro_batch_is_the_largest_divisor_at_or_below_half() -> None:
    change = adapt_to_out_of_memory(
        accept_spec(spec(training={"batchSizePerDevice": 9, "gradientAccumulationSteps": 2})).spec, T0
    )
    assert isinstance(change, Adaptation)
    assert change.change == "batchSizePerDevice 9 -> 3, gradientAccumulationSteps 2 -> 6"


def test_micro_batch_of_kto_keeps_two_rows() -> None:
    written = spec(trainer={"type": "kto"}, training={"batchSizePerDevice": 4, "gradientCheckpointing": "disabled"})
    first = adapt_to_out_of_memory(accept_spec(written).spec, T0)
    assert isinstance(first, Adaptation)
    assert first.set == {"training.batchSizePerDevice": 2, "training.gradientAccumulationSteps": 8}
    second = adapt_to_out_of_memory(apply_adaptations(accept_spec(written).spec, [first]), T0)
    assert isinstance(second, Adaptation)
    assert second.set == {"training.gradientCheckpointing": "enabled"}


def test_policy_fail_allows_no_adaptation() -> None:
    assert isinstance(
        adapt_to_out_of_memory(accept_spec(spec(policy={"onOutOfMemory": "Fail"})).spec, T0), AdaptationsExhausted
    )
    change = adapt_to_divergence(accept_spec(spec(policy={"onDivergence": "Fail"})).spec, [], [], T0)
    assert isinstance(change, AdaptationsExhausted)


def test_divergence_replays_once_then_rolls_back_twice_with_half_the_learning_rate() -> None:
    base = accept_spec(spec(training={"learningRate": 0.01})).spec
    checkpoints = [Checkpoint(step=s, uri=f"u{s}", healthy=True) for s in (10, 20, 30)]
    done: list[Adaptation] = []
    for attempt in (1, 2, 3):
        change = adapt_to_divergence(apply_adaptations(base, done), done, checkpoints, T0, attempt)
        assert isinstance(change, Adaptation)
        done.append(change)
    assert [adaptation.set for adaptation in done] == [
        {},
        {"training.learningRate": 0.005, "resume.maxStep": 20, "resume.firstAttempt": 3},
        {"training.learningRate": 0.0025, "resume.maxStep": 10, "resume.firstAttempt": 4},
    ]
    assert isinstance(adapt_to_divergence(apply_adaptations(base, done), done, checkpoints, T0), AdaptationsExhausted)


def test_unhealthy_checkpoints_are_not_rollback_targets() -> None:
    """The loss after an unhealthy checkpoint was not finite. The weights in this checkpoint may be the cause."""
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


def test_divergence_without_a_checkpoint_goes_back_to_the_start() -> None:
    base = accept_spec().spec
    first = adapt_to_divergence(base, [], [], T0)
    assert isinstance(first, Adaptation)
    second = adapt_to_divergence(base, [first], [], T0)
    assert isinstance(second, Adaptation)
    assert second.set is not None
    assert second.set["resume.maxStep"] == 0


@pytest.mark.parametrize(
    ("committed", "start"),
    [
        ([], 20),
        ([(10, 1), (20, 1), (30, 2)], 20),
        ([(10, 1), (20, 1), (30, 2), (25, 3)], 25),
        ([(20, 1), (30, 2), (30, 3)], 30),
        ([(20, 1), (30, 2), (40, 3)], None),
        ([(30, 2), (500, 3), (600, 4)], None),
        ([(30, 0)], 20),
    ],
)
def test_rollback_excludes_checkpoints_of_older_attempts_only(
    committed: list[tuple[int, int]], start: int | None
) -> None:
    """`committed`: (step, attempt) of every checkpoint. Attempt 0 means that the URI does not contain an attempt."""
    uris = {
        attempt: f"s3://b/checkpoints/step/a{attempt}-0123abcd" if attempt else "s3://b/step" for _, attempt in committed
    }
    checkpoints = [Checkpoint(step=step, uri=uris[attempt]) for step, attempt in committed]
    assert max_start_step([ROLLED_BACK], checkpoints) == start
    assert max_start_step([], checkpoints) is None


def test_adaptation_that_the_rules_refuse_is_skipped() -> None:
    assert all_changes(method={"type": "prefixTuning"}, training={"batchSizePerDevice": 2}) == [
        "batchSizePerDevice 2 -> 1, gradientAccumulationSteps 4 -> 8"
    ]


def test_evaluation_batch_shrinks_with_the_training_batch() -> None:
    held_out = {"split": {"validation": 0.1}}
    assert all_changes(dataset={"train": "s3://data/a.jsonl", **held_out}, evaluation={"batchSizePerDevice": 32}, training={"batchSizePerDevice": 2}) == [
        "batchSizePerDevice 2 -> 1, gradientAccumulationSteps 4 -> 8, evaluation.batchSizePerDevice 32 -> 1",
        "gradientCheckpointing disabled -> enabled",
    ]  # fmt: skip
    assert all_changes(dataset={"train": "s3://data/a.jsonl", **held_out}, evaluation={"batchSizePerDevice": 8}, training={"batchSizePerDevice": 1})[0] == (
        "evaluation.batchSizePerDevice 8 -> 1"
    )  # fmt: skip
    assert "evaluation" not in " ".join(all_changes(evaluation={"batchSizePerDevice": 32}))


def test_second_rollback_uses_a_checkpoint_that_retention_kept() -> None:
    written = spec(checkpoint={"keep": 2})
    known = status(attempt=1, attempts=[STARTED_ATTEMPT], checkpoints=CHECKPOINTS)
    received = report(checkpoints=CHECKPOINTS[-2:], progress={"step": 510})
    observed = facts(spec=written, status=known, jobs=[job()], pods=[pod()], last_report=received)
    kept_checkpoints = compute_status(observed, decide(observed), ActionResult()).checkpoints
    adaptations: list[Adaptation] = []
    for attempt in (1, 2, 3):
        change = adapt_to_divergence(accept_spec(written).spec, adaptations, kept_checkpoints, T0, attempt)
        assert not isinstance(change, AdaptationsExhausted)
        adaptations.append(change)
    assert (adaptations[-1].set or {})["resume.maxStep"] == 400
