"""Runs that do not go on as they began: a number that is none, less memory, other ranks. What stays the same is said and shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import FailureClass
from finetune_api.pod import Resume
from pod_buckets import Bucket
from pod_harness import merged, run_config
from stories import EVERY, STEPS, Story, committed, lines, rows_learned, spec_of, story, traced, undisturbed

from localcluster.s3 import S3Endpoint

pytestmark = pytest.mark.faults
CLOSE = 1e-5
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
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_other_ranks_train_the_same(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, strategy: str
) -> None:  # fmt: skip
    """Four ranks, then two: the same rows at each step, states split anew."""
    variant = {"distributed": {"strategy": strategy}, "training": {"batchSizePerDevice": 1}}
    two = merged(spec_of(model, rows, "full"), variant)
    whole_bucket = Bucket(bucket.name, bucket.endpoint, bucket.root + "-whole")
    with traced(run_config(two, whole_bucket.target(), processes=2), tmp_path / "whole", whole_bucket) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    whole = story(whole_bucket, [pod], pod.words())
    four = merged(two, {"training": {"gradientAccumulationSteps": 1}})
    with traced(run_config(four, bucket.target(), processes=4), tmp_path / "one", bucket, hold="forward:19") as first:
        first.wait_until((first.folder / "work" / "held").exists)
        first.terminate()
        assert first.end() == 75, first.text[-4000:]
    again = run_config(two, bucket.target(), processes=2, attempt=2, resume=Resume(mode="auto", expect_step=19))
    with traced(again, tmp_path / "two", bucket) as second:
        assert second.end() == 0, second.text[-4000:]
    resolved = second.words().resolved
    assert resolved is not None and resolved.resume_exact is False and "4 ranks" in (resolved.resume_note or "")
    require_close(bucket, [first, second], whole)


def require_close(bucket: Bucket, pods: list[Any], whole: Story) -> None:
    """What the second attempt logged: losses and gradient norms are close, rates the same; each step learned from the same rows."""
    expected, logged = whole.lines, lines(bucket, "a2-")
    for key, found in logged.items():
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[key][name], rel=CLOSE), (key, name)
        assert found["learning_rate"] == expected[key]["learning_rate"]
    assert (STEPS, "loss") in logged
    expected_rows = by_step(whole.rows)
    assert all(expected_rows[step] == rows for step, rows in by_step(rows_learned(pods)).items())


def by_step(rows: dict[tuple[int, int], list[list[str]]]) -> dict[int, list[str]]:
    """All rows of a step, whoever learned from them."""
    found: dict[int, list[str]] = {}
    for (step, _), batches in rows.items():
        found[step] = sorted([*found.get(step, []), *(row for batch in batches for row in batch)])
    return found
