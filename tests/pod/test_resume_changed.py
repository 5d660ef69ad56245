"""Runs that resume with a changed spec or number of ranks after a non-finite loss or a lack of memory. The status reports each inexact resume."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import FailureClass
from finetune_api.pod import ResumeConfig, RunConfig, TerminationMessage
from finetune_api.status import Adaptation
from finetune_operator.policies.adaptations import (
    ACCUMULATION_FIELD,
    BATCH_FIELD,
    adapt_to_out_of_memory,
    apply_adaptations,
)
from pod_buckets import Bucket
from pod_harness import ROWS, Pod, merge, run_config, write_rows
from recorded_run import (
    CHECKPOINT_STEPS,
    STEPS,
    RecordedRun,
    list_committed_steps,
    make_spec,
    make_traced_pod,
    read_log_lines,
    read_trained_rows,
    record_run,
    run_uninterrupted,
)

from localcluster.s3 import S3Endpoint
from tests.support.slices import quick_slice

pytestmark = pytest.mark.faults
RELATIVE_TOLERANCES = {"loss": 1e-6, "grad_norm": 1e-5}
"""The largest allowed relative difference from the expected run. Runs differ because a sum that is computed in another order is rounded differently."""


@pytest.mark.parametrize(("step", "position"), quick_slice([(23, "between two log lines"), (20, "at a log line")], [(23, "between two log lines")]))
def test_a_non_finite_loss_is_never_saved_and_the_replay_is_exact(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, step: int, position: str,
) -> None:  # fmt: skip
    """Every fifth step is logged. A run whose loss is not finite at step 20 or 23 ends before it saves the checkpoint of step 24."""
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", 1, "windows")
    spec = make_spec(model, rows, "lora", "windows")
    with make_traced_pod(run_config(spec, bucket.target()), tmp_path / "one", bucket, failure_point=f"nan:{step}") as first_pod:
        assert first_pod.end() == 72, first_pod.text[-4000:]
    termination = first_pod.termination_message()
    assert (termination.code, termination.class_) == ("LossNotFinite", FailureClass.DIVERGED), position
    assert list_committed_steps(bucket) == [CHECKPOINT_STEPS, 2 * CHECKPOINT_STEPS]
    repeated_run = run_config(spec, bucket.target(), attempt=2, resume=ResumeConfig(mode="auto", expect_step=2 * CHECKPOINT_STEPS))
    with make_traced_pod(repeated_run, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    assert record_run(bucket, [first_pod, second_pod], second_pod.termination_message()) == expected_run


@pytest.mark.parametrize(
    ("method", "processes", "variant"), quick_slice([("lora", 1, "windows"), ("full", 2, "fsdp"), ("full", 2, "zero")], [("full", 2, "zero")])
)
def test_a_halved_learning_rate_applies_after_a_rollback(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, method: str, processes: int, variant: str,
) -> None:  # fmt: skip
    """The new learning rate of the spec replaces the old rate in the saved states of optimizer and scheduler."""
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, method, processes, variant)
    spec = make_spec(model, rows, method, variant)
    run = run_config(spec, bucket.target(), processes=processes)
    with make_traced_pod(run, tmp_path / "one", bucket, failure_point="nan:20") as first_pod:
        assert first_pod.end() == 72, first_pod.text[-4000:]
    slower_spec = merge(spec, {"training": {"learningRate": 5e-4}})
    resume = ResumeConfig(mode="auto", expect_step=CHECKPOINT_STEPS, max_step=CHECKPOINT_STEPS)
    repeated_run = run_config(slower_spec, bucket.target(), processes=processes, attempt=2, resume=resume)
    with make_traced_pod(repeated_run, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    termination = second_pod.termination_message()
    assert termination.resumed_from_step == CHECKPOINT_STEPS and termination.resolved is not None
    assert termination.resolved.resume_exact is False and "is 0.0005 from there on" in (termination.resolved.resume_note or "")
    resumed_rates = {step: line["learning_rate"] for (step, _), line in read_log_lines(bucket, "a2-").items() if step > CHECKPOINT_STEPS}
    expected_rates = {step: line["learning_rate"] for (step, _), line in expected_run.lines.items() if step in resumed_rates}
    assert STEPS in resumed_rates and expected_rates.keys() == resumed_rates.keys()
    assert resumed_rates == {step: pytest.approx(rate / 2, rel=1e-6) for step, rate in expected_rates.items()}


def test_a_smaller_micro_batch_gives_close_losses(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:  # fmt: skip
    """A micro-batch of 2 rows runs out of memory. The next attempt uses 1 row and twice the accumulation steps, and its losses nearly equal those of 2 rows."""
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "full", 1, "plain")
    spec = make_spec(model, rows, "full")
    with make_traced_pod(run_config(spec, bucket.target()), tmp_path / "one", bucket, failure_point="memory:19") as first_pod:
        assert first_pod.end() == 71, first_pod.text[-4000:]
    assert (first_pod.termination_message().code, first_pod.termination_message().committed_step) == ("GpuOutOfMemory", 2 * CHECKPOINT_STEPS)
    smaller_batch_spec = merge(spec, {"training": {"batchSizePerDevice": 1, "gradientAccumulationSteps": 4}})
    repeated_run = run_config(smaller_batch_spec, bucket.target(), attempt=2, resume=ResumeConfig(mode="auto", expect_step=2 * CHECKPOINT_STEPS))
    with make_traced_pod(repeated_run, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    resolved = second_pod.termination_message().resolved
    assert resolved is not None and resolved.resume_exact is False and "split into micro-batches of another size" in (resolved.resume_note or "")
    assert_close_to_run(bucket, [second_pod], expected_run)


@pytest.mark.slow
def test_a_rank_with_less_memory_reduces_the_micro_batch_of_all_ranks(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    """Row 23 of docs/guides/checkpoints.md: the second rank has memory for one row. The operator reduces the micro-batch twice.

    The number of rows is a multiple of the effective batch, because the padding of an incomplete last batch would depend on the
    micro-batch size.
    """
    rows = write_rows(tmp_path / "rows.jsonl", ROWS[:32])
    spec = merge(make_spec(model, rows, "full"), {"training": {"batchSizePerDevice": 4, "gradientAccumulationSteps": 1}})
    whole_bucket = Bucket(bucket.name, bucket.endpoint, bucket.root + "-whole")
    with make_traced_pod(run_config(spec, whole_bucket.target(), processes=2), tmp_path / "whole", whole_bucket) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    expected_run, expected_batch = record_run(whole_bucket, [pod], pod.termination_message()), pod.termination_message().resolved

    run = run_config(spec, bucket.target(), processes=2)
    pods, changes = [], []
    for attempt in (1, 2):
        with make_traced_pod(run, tmp_path / f"attempt-{attempt}", bucket, failure_point="memory-limit:19:1:1") as pod:
            assert pod.end() == 71, pod.text[-4000:]
        termination = pod.termination_message()
        assert (termination.code, termination.class_, termination.rank, termination.step) == ("GpuOutOfMemory", FailureClass.OUT_OF_MEMORY, 1, 18)
        assert termination.committed_step == 2 * CHECKPOINT_STEPS
        adaptation = adapt_to_out_of_memory(run.spec, datetime.now(UTC))
        assert isinstance(adaptation, Adaptation)
        changes.append(adaptation.set)
        pods.append(pod)
        run = make_next_attempt(run, adaptation, 2 * CHECKPOINT_STEPS)
    assert [(change[BATCH_FIELD], change[ACCUMULATION_FIELD]) for change in changes] == [(2, 2), (1, 4)]
    with make_traced_pod(run, tmp_path / "attempt-3", bucket, failure_point="memory-limit:19:1:1") as last_pod:
        assert last_pod.end() == 0, last_pod.text[-4000:]
    resolved = last_pod.termination_message().resolved
    assert resolved is not None and expected_batch is not None and resolved.effective_batch == expected_batch.effective_batch == 8
    assert resolved.resume_exact is False and "split into micro-batches of another size" in (resolved.resume_note or "")
    assert_close_to_run(bucket, [*pods, last_pod], expected_run)


def make_next_attempt(run: RunConfig, adaptation: Adaptation, expected_step: int) -> RunConfig:
    """Return the run configuration of the next attempt, with the adaptation applied to its spec."""
    number = run.attempt + 1
    return run.model_copy(
        update={
            "attempt": number, "spec": apply_adaptations(run.spec, [adaptation]), "resume": ResumeConfig(mode="auto", expect_step=expected_step),
            "world": run.world.model_copy(update={"rendezvous_id": f"{run.uid}-{number}"}),
        }
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_another_number_of_ranks_trains_the_same_rows(bucket: Bucket, model: Path, rows: Path, tmp_path: Path, strategy: str) -> None:
    """Row 25 of docs/guides/checkpoints.md: attempts with 4, 2 and 1 ranks train the same rows at each step.

    With fsdp, the attempt on one rank is refused, because it cannot load a checkpoint that was made by fsdp.
    """
    spec = merge(make_spec(model, rows, "full"), {"training": {"batchSizePerDevice": 1}})
    whole_bucket = Bucket(bucket.name, bucket.endpoint, bucket.root + "-whole")
    with make_resized_pod(1, spec, "none", whole_bucket, tmp_path / "whole") as pod:
        assert pod.end() == 0, pod.text[-4000:]
    expected_run = record_run(whole_bucket, [pod], pod.termination_message())

    pods = [stop_at_hold_step(make_resized_pod(4, spec, strategy, bucket, tmp_path / "four", hold_step=15))]
    second_pod = make_resized_pod(2, spec, strategy, bucket, tmp_path / "two", attempt=2, expected_step=15, hold_step=27)
    pods.append(stop_at_hold_step(second_pod))
    assert_resumed_inexactly(second_pod.termination_message(), 15, "4 ranks")
    steps_before = list_committed_steps(bucket)
    with make_resized_pod(1, spec, "none", bucket, tmp_path / "one", attempt=3, expected_step=27) as last_pod:
        exit_code = last_pod.end()
    if strategy == "fsdp":
        assert_refused(last_pod, exit_code, "was made by fsdp", "fsdp stores the optimizer's state in another form")
        assert list_committed_steps(bucket) == steps_before
        with make_resized_pod(2, spec, strategy, bucket, tmp_path / "again", attempt=4, expected_step=27) as last_pod:
            assert last_pod.end() == 0, last_pod.text[-4000:]
    else:
        assert exit_code == 0, last_pod.text[-4000:]
        assert_resumed_inexactly(last_pod.termination_message(), 27, "2 ranks")
    assert_close_to_run(bucket, [*pods, last_pod], expected_run)


@pytest.mark.slow
def test_a_deepspeed_checkpoint_is_refused_on_another_number_of_ranks(bucket: Bucket, model: Path, rows: Path, tmp_path: Path) -> None:
    """Row 25 of docs/guides/checkpoints.md: a run on one rank, with or without DeepSpeed, refuses a DeepSpeed checkpoint of two ranks.

    The refused checkpoint is not deleted.
    """
    spec = merge(make_spec(model, rows, "full"), {"training": {"batchSizePerDevice": 1}})
    stop_at_hold_step(make_resized_pod(2, spec, "deepspeed", bucket, tmp_path / "two", hold_step=9))
    steps_before = list_committed_steps(bucket)
    for attempt, strategy in enumerate(("deepspeed", "none"), 2):
        with make_resized_pod(1, spec, strategy, bucket, tmp_path / strategy, attempt=attempt, expected_step=9) as pod:
            exit_code = pod.end()
        reason = f"was made by deepspeed on 2 ranks, but this run uses {strategy} on 1: DeepSpeed cannot split its optimizer state"
        assert_refused(pod, exit_code, "step-00000009", reason)
    assert list_committed_steps(bucket) == steps_before and 9 in steps_before


def make_resized_pod(
    ranks: int, spec: dict[str, Any], strategy: str, bucket: Bucket, folder: Path, *, attempt: int = 1, expected_step: int = 0,
    hold_step: int = 0,
) -> Pod:  # fmt: skip
    """Create a pod with `ranks` ranks that trains four rows per step. Before `hold_step`, the pod waits for a stop request."""
    change = {"distributed": {"strategy": strategy}, "training": {"gradientAccumulationSteps": 4 // ranks}}
    resume = ResumeConfig(mode="auto", expect_step=expected_step)
    run = run_config(merge(spec, change), bucket.target(), processes=ranks, attempt=attempt, resume=resume)
    return make_traced_pod(run, folder, bucket, hold_point=f"forward:{hold_step}" if hold_step else "")


def stop_at_hold_step(pod: Pod) -> Pod:
    """Run the pod until it waits for a stop request, stop it, and check that it saves a checkpoint. Returns the pod."""
    with pod:
        pod.wait_until((pod.folder / "work" / "held").exists)
        pod.terminate()
        assert pod.end() == 75, pod.text[-4000:]
    return pod


def assert_resumed_inexactly(termination: TerminationMessage, step: int, previous_ranks: str) -> None:
    """Check that the pod resumed from `step`, and that its note on the inexact resume contains `previous_ranks`."""
    assert termination.resumed_from_step == step and termination.resolved is not None
    assert termination.resolved.resume_exact is False and previous_ranks in (termination.resolved.resume_note or "")


def assert_refused(pod: Pod, exit_code: int, *reasons: str) -> None:
    """Check that the pod ended with exit code 64 before the first step, and that its message contains each reason."""
    termination = pod.termination_message()
    assert (exit_code, termination.code, termination.class_) == (64, "CheckpointIncompatible", FailureClass.USER), pod.text[-4000:]
    assert all(reason in (termination.message or "") for reason in reasons), termination.message
    assert not list((pod.folder / "work").glob("rows-*.jsonl"))


def assert_close_to_run(bucket: Bucket, pods: list[Pod], expected_run: RecordedRun) -> None:
    """Check each step against the expected run: losses and gradient norms are close, and learning rates and rows are equal."""
    expected_rows = join_ranks(expected_run.rows)
    for pod in pods:
        logged_lines = read_log_lines(bucket, f"a{pod.run.attempt}-")
        for key, line in logged_lines.items():
            expected_line = expected_run.lines[key]
            for name, tolerance in RELATIVE_TOLERANCES.items():
                assert line[name] == pytest.approx(expected_line[name], rel=tolerance), (pod.run.attempt, key, name)
            assert line["learning_rate"] == expected_line["learning_rate"]
        last_step = (pod.termination_message().step or 0) if pod.termination_message().exit_code else STEPS
        trained_rows = join_ranks(read_trained_rows([pod]))
        assert all(expected_rows[step] == rows for step, rows in trained_rows.items() if step <= last_step)
    assert (STEPS, "loss") in logged_lines


def join_ranks(rows: dict[tuple[int, int], list[list[str]]]) -> dict[int, list[str]]:
    """Join the rows of all ranks. Returns the sorted row hashes of each step."""
    rows_by_step: dict[int, list[str]] = {}
    for (step, _), batches in rows.items():
        rows_by_step[step] = sorted([*rows_by_step.get(step, []), *(row for batch in batches for row in batch)])
    return rows_by_step
