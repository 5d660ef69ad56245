"""Runs that do not go on as they began: a number that is none, less memory, other ranks. What stays the same is said and shown."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import FailureClass
from finetune_api.pod import Resume, RunConfig, TerminationMessage
from finetune_api.status import Adaptation
from finetune_operator.policies.adaptations import ACCUMULATION, BATCH, adapt_to_out_of_memory, apply_adaptations
from pod_buckets import Bucket
from pod_harness import ROWS, Pod, merged, run_config, write_rows
from stories import EVERY, STEPS, Story, committed, lines, rows_learned, spec_of, story, traced, undisturbed

from localcluster.s3 import S3Endpoint

pytestmark = pytest.mark.faults
CLOSE = {"loss": 1e-6, "grad_norm": 1e-5}
"""Relative: sums in another order, carried through the optimizer for up to forty steps."""


@pytest.mark.parametrize(("step", "logged"), [(23, "between two log lines"), (20, "at a log line")])
def test_a_number_that_is_none_is_never_saved_and_a_replay_equals(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, step: int, logged: str,
) -> None:  # fmt: skip
    """Lines are logged at 20 and 25, a checkpoint is due at 24: none is made of what is broken, logged or not yet."""
    whole = undisturbed(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", 1, "windows")
    spec = spec_of(model, rows, "lora", "windows")
    with traced(run_config(spec, bucket.target()), tmp_path / "one", bucket, breaks=f"nan:{step}") as first:
        assert first.end() == 72, first.text[-4000:]
    words = first.words()
    assert (words.code, words.class_) == ("LossNotFinite", FailureClass.DIVERGED), logged
    assert committed(bucket) == [EVERY, 2 * EVERY]
    again = run_config(spec, bucket.target(), attempt=2, resume=Resume(mode="auto", expect_step=2 * EVERY))
    with traced(again, tmp_path / "two", bucket) as second:
        assert second.end() == 0, second.text[-4000:]
    assert story(bucket, [first, second], second.words()) == whole


@pytest.mark.parametrize(("method", "processes", "variant"), [("lora", 1, "windows"), ("full", 2, "fsdp"), ("full", 2, "zero")])
def test_half_the_rate_after_a_rollback_is_half_the_rate(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, method: str, processes: int, variant: str,
) -> None:  # fmt: skip
    """Optimizer and scheduler bring the old rate back with their states; what the operator said holds all the same."""
    whole = undisturbed(s3_server, tmp_path_factory.getbasetemp(), model, rows, method, processes, variant)
    spec = spec_of(model, rows, method, variant)
    run = run_config(spec, bucket.target(), processes=processes)
    with traced(run, tmp_path / "one", bucket, breaks="nan:20") as first:
        assert first.end() == 72, first.text[-4000:]
    slower = merged(spec, {"training": {"learningRate": 5e-4}})
    resume = Resume(mode="auto", expect_step=EVERY, max_step=EVERY)
    again = run_config(slower, bucket.target(), processes=processes, attempt=2, resume=resume)
    with traced(again, tmp_path / "two", bucket) as second:
        assert second.end() == 0, second.text[-4000:]
    words = second.words()
    assert words.resumed_from_step == EVERY and words.resolved is not None
    assert words.resolved.resume_exact is False and "0.0005 from there on" in (words.resolved.resume_note or "")
    rates = {step: line["learning_rate"] for (step, _), line in lines(bucket, "a2-").items() if step > EVERY}
    before = {step: line["learning_rate"] for (step, _), line in whole.lines.items() if step in rates}
    assert STEPS in rates and before.keys() == rates.keys()
    assert rates == {step: pytest.approx(rate / 2, rel=1e-6) for step, rate in before.items()}


def test_less_memory_trains_the_same(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:  # fmt: skip
    """A micro-batch of 2 does not fit; the next attempt takes 1, and twice as many of them. Named, not exact, and close."""
    whole = undisturbed(s3_server, tmp_path_factory.getbasetemp(), model, rows, "full", 1, "plain")
    spec = spec_of(model, rows, "full")
    with traced(run_config(spec, bucket.target()), tmp_path / "one", bucket, breaks="memory:19") as first:
        assert first.end() == 71, first.text[-4000:]
    assert (first.words().code, first.words().committed_step) == ("GpuOutOfMemory", 2 * EVERY)
    smaller = merged(spec, {"training": {"batchSizePerDevice": 1, "gradientAccumulationSteps": 4}})
    again = run_config(smaller, bucket.target(), attempt=2, resume=Resume(mode="auto", expect_step=2 * EVERY))
    with traced(again, tmp_path / "two", bucket) as second:
        assert second.end() == 0, second.text[-4000:]
    resolved = second.words().resolved
    assert resolved is not None and resolved.resume_exact is False and "split otherwise" in (resolved.resume_note or "")
    require_close(bucket, [second], whole)


@pytest.mark.slow
def test_one_rank_with_less_memory_than_the_other(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    """Row 23: rank 1 of two has room for one row. The operator's ladder goes there in two rungs, at the same effective batch.

    The rows fill every step: where an epoch's last one is not full, what is taken once more to fill it depends on the split.
    """
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:32])
    spec = merged(spec_of(model, rows, "full"), {"training": {"batchSizePerDevice": 4, "gradientAccumulationSteps": 1}})
    whole_bucket = Bucket(bucket.name, bucket.endpoint, bucket.root + "-whole")
    with traced(run_config(spec, whole_bucket.target(), processes=2), tmp_path / "whole", whole_bucket) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    whole, batch = story(whole_bucket, [pod], pod.words()), pod.words().resolved

    run = run_config(spec, bucket.target(), processes=2)
    pods, changes = [], []
    for attempt in (1, 2):
        with traced(run, tmp_path / f"attempt-{attempt}", bucket, breaks="room:19:1:1") as pod:
            assert pod.end() == 71, pod.text[-4000:]
        words = pod.words()
        assert (words.code, words.class_, words.rank, words.step) == ("GpuOutOfMemory", FailureClass.OUT_OF_MEMORY, 1, 18)
        assert words.committed_step == 2 * EVERY
        rung = adapt_to_out_of_memory(run.spec, datetime.now(UTC))
        assert isinstance(rung, Adaptation)
        changes.append(rung.set)
        pods.append(pod)
        run = next_attempt(run, rung, 2 * EVERY)
    assert [(one[BATCH], one[ACCUMULATION]) for one in changes] == [(2, 2), (1, 4)]
    with traced(run, tmp_path / "attempt-3", bucket, breaks="room:19:1:1") as last:
        assert last.end() == 0, last.text[-4000:]
    resolved = last.words().resolved
    assert resolved is not None and batch is not None and resolved.effective_batch == batch.effective_batch == 8
    assert resolved.resume_exact is False and "split otherwise" in (resolved.resume_note or "")
    require_close(bucket, [*pods, last], whole)


def next_attempt(run: RunConfig, rung: Adaptation, expect: int) -> RunConfig:
    """What the operator tells the next attempt after one more rung of its ladder."""
    number = run.attempt + 1
    return run.model_copy(
        update={
            "attempt": number, "spec": apply_adaptations(run.spec, [rung]), "resume": Resume(mode="auto", expect_step=expect),
            "world": run.world.model_copy(update={"rendezvous_id": f"{run.uid}-{number}"}),
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_other_ranks_train_the_same(bucket: Bucket, model: Path, rows: Path, tmp_path: Path, strategy: str) -> None:
    """Row 25: four ranks, then two, then one: the same rows at each step, states split anew. fsdp needs two: refused on one."""
    spec = merged(spec_of(model, rows, "full"), {"training": {"batchSizePerDevice": 1}})
    whole_bucket = Bucket(bucket.name, bucket.endpoint, bucket.root + "-whole")
    with resized(1, spec, "none", whole_bucket, tmp_path / "whole") as pod:
        assert pod.end() == 0, pod.text[-4000:]
    whole = story(whole_bucket, [pod], pod.words())

    pods = [stopped(resized(4, spec, strategy, bucket, tmp_path / "four", hold=15))]
    second = resized(2, spec, strategy, bucket, tmp_path / "two", attempt=2, expect=15, hold=27)
    pods.append(stopped(second))
    assert_split_anew(second.words(), 15, "4 ranks")
    kept = committed(bucket)
    with resized(1, spec, "none", bucket, tmp_path / "one", attempt=3, expect=27) as last:
        code = last.end()
    if strategy == "fsdp":
        assert_refused(last, code, "was made by fsdp", "fsdp keeps the optimizer's state in another form")
        assert committed(bucket) == kept
        with resized(2, spec, strategy, bucket, tmp_path / "again", attempt=4, expect=27) as last:
            assert last.end() == 0, last.text[-4000:]
    else:
        assert code == 0, last.text[-4000:]
        assert_split_anew(last.words(), 27, "2 ranks")
    require_close(bucket, [*pods, last], whole)


@pytest.mark.slow
def test_the_states_of_zero_are_not_split_anew(bucket: Bucket, model: Path, rows: Path, tmp_path: Path) -> None:
    """Row 25: DeepSpeed's checkpoint of two ranks is refused on one, with or without DeepSpeed, and stays what it was."""
    spec = merged(spec_of(model, rows, "full"), {"training": {"batchSizePerDevice": 1}})
    stopped(resized(2, spec, "deepspeed", bucket, tmp_path / "two", hold=9))
    kept = committed(bucket)
    for attempt, strategy in enumerate(("deepspeed", "none"), 2):
        with resized(1, spec, strategy, bucket, tmp_path / strategy, attempt=attempt, expect=9) as pod:
            code = pod.end()
        reason = f"was made by deepspeed on 2 ranks, now it is {strategy} on 1: DeepSpeed's optimizer state cannot be split anew"
        assert_refused(pod, code, "step-00000009", reason)
    assert committed(bucket) == kept and 9 in kept


def resized(
    ranks: int, spec: dict[str, Any], strategy: str, bucket: Bucket, folder: Path, *, attempt: int = 1, expect: int = 0,
    hold: int = 0,
) -> Pod:  # fmt: skip
    """So many ranks for four rows a step. `hold`: the step before which it waits for a stop."""
    change = {"distributed": {"strategy": strategy}, "training": {"gradientAccumulationSteps": 4 // ranks}}
    resume = Resume(mode="auto", expect_step=expect)
    run = run_config(merged(spec, change), bucket.target(), processes=ranks, attempt=attempt, resume=resume)
    return traced(run, folder, bucket, hold=f"forward:{hold}" if hold else "")


def stopped(pod: Pod) -> Pod:
    """It comes to the step at which it waits, is told to stop, and saves."""
    with pod:
        pod.wait_until((pod.folder / "work" / "held").exists)
        pod.terminate()
        assert pod.end() == 75, pod.text[-4000:]
    return pod


def assert_split_anew(words: TerminationMessage, step: int, before: str) -> None:
    """It went on from that step, and said that other ranks had made it."""
    assert words.resumed_from_step == step and words.resolved is not None
    assert words.resolved.resume_exact is False and before in (words.resolved.resume_note or "")


def assert_refused(pod: Pod, code: int, *reasons: str) -> None:
    """64 before any step, with the reasons."""
    words = pod.words()
    assert (code, words.code, words.class_) == (64, "CheckpointIncompatible", FailureClass.USER), pod.text[-4000:]
    assert all(reason in (words.message or "") for reason in reasons), words.message
    assert not list((pod.folder / "work").glob("rows-*.jsonl"))


def require_close(bucket: Bucket, pods: list[Pod], whole: Story) -> None:
    """What these attempts logged: losses and gradient norms are close, rates the same; each step learned from the same rows."""
    expected_rows = by_step(whole.rows)
    for pod in pods:
        logged = lines(bucket, f"a{pod.run.attempt}-")
        for key, found in logged.items():
            expected = whole.lines[key]
            for name, close in CLOSE.items():
                assert found[name] == pytest.approx(expected[name], rel=close), (pod.run.attempt, key, name)
            assert found["learning_rate"] == expected["learning_rate"]
        done = (pod.words().step or 0) if pod.words().exit_code else STEPS
        learned = by_step(rows_learned([pod]))
        assert all(expected_rows[step] == rows for step, rows in learned.items() if step <= done)
    assert (STEPS, "loss") in logged


def by_step(rows: dict[tuple[int, int], list[list[str]]]) -> dict[int, list[str]]:
    """All rows of a step, whoever learned from them."""
    found: dict[int, list[str]] = {}
    for (step, _), batches in rows.items():
        found[step] = sorted([*found.get(step, []), *(row for batch in batches for row in batch)])
    return found
