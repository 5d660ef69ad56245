"""Exact resume through a real S3 server: a killed or stopped run that resumes is bitwise equal to an uninterrupted run.

Each run pauses at a fixed point until the test interrupts it, so the result does not depend on the speed of the machine.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import ResumeConfig
from pod_buckets import Bucket
from pod_harness import Pod, run_config
from recorded_run import (
    CHECKPOINT_STEPS,
    STEPS,
    list_committed_steps,
    make_spec,
    make_traced_pod,
    record_run,
    run_uninterrupted,
)

from localcluster.s3 import S3Endpoint
from tests.support.s3proxy import Blackhole, S3Proxy

SLOW_DISK_NOTE = "checkpoints are due faster than the pod writes them to its disk: training waits for each of them"
WAITING_POINTS = {
    "epochs": ("forward:16", 8), "boundary": ("forward:18", 9), "end": (f"end:{STEPS}", STEPS), "early-end": ("end:24", 24),
}  # fmt: skip
"""For each variant: the point at which the run pauses (the end of an epoch or of the run), and the newest committed checkpoint at this point."""
SPEC_OF_VARIANT = {"end": "plain", "early-end": "early"}
"""For each variant that only pauses at another point: the variant whose spec it uses."""
DEFAULT_WAITING_POINT = ("accumulation:19", 16)
"""The default point lies within an epoch, a logging window and an effective batch, and between two checkpoints."""


def kill_rank(pod: Pod) -> tuple[int, int]:
    """Send SIGKILL to the last rank. Returns the pod's exit code and the expected exit code."""
    os.kill(pod.pids("train")[-1], signal.SIGKILL)
    return pod.end(), 74


def kill_agent(pod: Pod) -> tuple[int, int]:
    """Send SIGKILL to the agent. Returns the pod's exit code and the expected exit code."""
    os.kill(pod.pids("agent")[0], signal.SIGKILL)
    return pod.end(), 74


def kill_pod(pod: Pod) -> tuple[int, int]:
    """Send SIGKILL to the supervisor and all its descendants. Returns -SIGKILL as the exit code and as the expected exit code."""
    pod.kill()
    return -signal.SIGKILL, -signal.SIGKILL


def stop_pod(pod: Pod) -> tuple[int, int]:
    """Send SIGTERM, as an eviction does. Returns the pod's exit code and the expected exit code."""
    pod.terminate()
    return pod.end(), 75


def make_resume_case(
    method: str, processes: int, interrupt: Callable[[Pod], tuple[int, int]], variant: str, *, is_quick: bool = False
) -> Any:
    """Return one case of a parametrized test. `make test` runs only the quick cases.

    `make test` also resumes pods with two ranks in tests/e2e/jobs/test_resume.py, and ranks without a pod in tests/pod/strategies.
    """
    marks = [] if is_quick else [pytest.mark.faults]
    return pytest.param(
        method, processes, interrupt, variant, marks=marks, id=f"{variant}-{method}-{processes}-{interrupt.__name__}"
    )


@pytest.mark.parametrize(
    ("method", "processes", "interrupt", "variant"),
    [
        make_resume_case("lora", 2, stop_pod, "windows"), make_resume_case("full", 1, kill_pod, "end"),
        make_resume_case("full", 1, kill_pod, "plain"), make_resume_case("lora", 1, kill_pod, "early-end"),
        make_resume_case("lora", 2, kill_rank, "windows"), make_resume_case("full", 1, stop_pod, "plain", is_quick=True),
        make_resume_case("lora", 1, stop_pod, "packing"),
        make_resume_case("full", 1, stop_pod, "boundary"), make_resume_case("lora", 2, kill_agent, "boundary"),
        make_resume_case("lora", 1, kill_pod, "epochs"), make_resume_case("lora", 1, stop_pod, "epochs"), make_resume_case("lora", 1, kill_rank, "best"),
        make_resume_case("lora", 1, stop_pod, "best"), make_resume_case("lora", 1, kill_rank, "early"), make_resume_case("lora", 1, stop_pod, "early"),
        make_resume_case("full", 2, kill_rank, "fsdp"), make_resume_case("lora", 2, stop_pod, "fsdp"),
    ],
)  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_run(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, method: str, processes: int, interrupt: Callable[[Pod], tuple[int, int]],
    variant: str,
) -> None:  # fmt: skip
    spec_variant = SPEC_OF_VARIANT.get(variant, variant)
    expected_run = run_uninterrupted(
        s3_server, tmp_path_factory.getbasetemp(), model, rows, method, processes, spec_variant
    )
    spec = make_spec(model, rows, method, spec_variant)
    hold_point, newest_step = WAITING_POINTS.get(variant, DEFAULT_WAITING_POINT)
    run = run_config(spec, bucket.target(), processes=processes)
    with make_traced_pod(run, tmp_path / "one", bucket, hold_point=hold_point) as first_pod:
        first_pod.wait_until((first_pod.folder / "work" / "held").exists)
        first_pod.wait_committed(newest_step)
        exit_code, expected_exit_code = interrupt(first_pod)
    assert exit_code == expected_exit_code, first_pod.text[-4000:]
    resume_step = int(hold_point.partition(":")[2]) if interrupt is stop_pod else newest_step
    assert max(list_committed_steps(bucket)) == resume_step and not bucket.keys("model/")

    resumed_config = run_config(
        spec, bucket.target(), processes=processes, attempt=2, resume=ResumeConfig(mode="auto", expect_step=newest_step)
    )
    with make_traced_pod(resumed_config, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    termination = second_pod.termination_message()
    assert termination.resumed_from_step == resume_step
    assert termination.resolved is not None and termination.resolved.resume_exact is True
    assert record_run(bucket, [first_pod, second_pod], termination) == expected_run


@pytest.mark.parametrize(
    ("method", "processes", "interrupt", "variant", "phase"),
    [
        pytest.param("full", 1, kill_pod, "plain", "write", id="write"),
        *(
            pytest.param(*case, marks=pytest.mark.faults, id=f"{case[4]}-{case[3]}-{case[2].__name__}")
            for case in (
                ("full", 1, kill_pod, "plain", "copy"), ("full", 1, kill_pod, "plain", "upload"), ("lora", 2, kill_rank, "windows", "write"),
                ("full", 2, kill_rank, "fsdp", "copy"), ("full", 2, kill_rank, "fsdp", "write"), ("full", 2, kill_rank, "zero", "write"),
            )
        ),
    ],
)  # fmt: skip
def test_a_kill_before_a_checkpoint_is_complete_resumes_from_the_previous_one(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, method: str, processes: int, interrupt: Callable[[Pod], tuple[int, int]],
    variant: str, phase: str,
) -> None:  # fmt: skip
    """Kill the run while the checkpoint of step 16 is copied to host memory, written to the disk, or uploaded."""
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, method, processes, variant)
    spec = make_spec(model, rows, method, variant)
    with S3Proxy(s3_server.host_url) as proxy:
        upload = proxy.fault(Blackhole(), operation="PutObject", key="/checkpoints/step-00000016/")
        run = run_config(spec, bucket.target(endpoint=proxy.url), processes=processes)
        with make_traced_pod(run, tmp_path / "one", bucket, hold_point=f"{phase}:16") as first_pod:
            first_pod.wait_until((lambda: upload.hits > 0) if phase == "upload" else (first_pod.folder / "work" / "held").exists)
            first_pod.wait_committed(8)
            exit_code, expected_exit_code = interrupt(first_pod)
    assert exit_code == expected_exit_code, first_pod.text[-4000:]
    assert list_committed_steps(bucket) == [8] and not bucket.keys("model/")

    resumed_config = run_config(spec, bucket.target(), processes=processes, attempt=2, resume=ResumeConfig(mode="auto", expect_step=8))
    with make_traced_pod(resumed_config, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    assert second_pod.termination_message().resumed_from_step == 8
    assert record_run(bucket, [first_pod, second_pod], second_pod.termination_message()) == expected_run


@pytest.mark.faults
def test_a_stop_waits_until_a_checkpoint_is_written_in_the_background(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:  # fmt: skip
    """The checkpoint of step 16 is still being written when the checkpoint of step 24 is due.

    Training waits until the write is complete. After the stop request, both checkpoints and the checkpoint of the stop are saved.
    """
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "full", 1, "plain")
    spec = make_spec(model, rows, "full", "plain")
    with make_traced_pod(run_config(spec, bucket.target()), tmp_path / "one", bucket, hold_point="write:16") as first_pod:
        first_pod.wait_until((first_pod.folder / "work" / "held").exists)
        first_pod.wait_step(24)
        first_pod.terminate()
        assert first_pod.end() == 75, first_pod.text[-4000:]
    stop_message = first_pod.termination_message()
    assert stop_message.committed_step == 25 and 16 in list_committed_steps(bucket)
    assert stop_message.resolved is not None and SLOW_DISK_NOTE in (stop_message.resolved.notes or [])
    resumed_config = run_config(spec, bucket.target(), attempt=2, resume=ResumeConfig(mode="auto", expect_step=25))
    with make_traced_pod(resumed_config, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    assert record_run(bucket, [first_pod, second_pod], second_pod.termination_message()) == expected_run


@pytest.mark.slow  # `make test` runs the first test of this file, which stops a pod during a step
@pytest.mark.faults
def test_a_stop_during_an_evaluation_completes_the_evaluation(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:  # fmt: skip
    """A run that is stopped during an evaluation completes the evaluation and one more step. The next attempt does not repeat the evaluation."""
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", 1, "best")
    spec = make_spec(model, rows, "lora", "best")
    with make_traced_pod(run_config(spec, bucket.target()), tmp_path / "one", bucket, hold_point="evaluation:16") as first_pod:
        first_pod.wait_until((first_pod.folder / "work" / "held").exists)
        first_pod.terminate()
        assert first_pod.end() == 75, first_pod.text[-4000:]
    assert first_pod.termination_message().committed_step == 17
    resumed_config = run_config(spec, bucket.target(), attempt=2, resume=ResumeConfig(mode="auto", expect_step=17))
    with make_traced_pod(resumed_config, tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    assert second_pod.termination_message().resumed_from_step == 17
    assert record_run(bucket, [first_pod, second_pod], second_pod.termination_message()) == expected_run


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_repeatedly_equals_an_uninterrupted_run(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, seed: int,
) -> None:  # fmt: skip
    """Kill five attempts of a run at random steps. Some attempts are killed before they have committed a checkpoint."""
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", 1, "windows")
    spec, random_generator = make_spec(model, rows, "lora", "windows"), random.Random(seed)
    pods: list[Pod] = []
    newest_step = 0
    for attempt in range(1, 7):
        kill_step = random_generator.randint(newest_step + 1, min(STEPS, newest_step + 2 * CHECKPOINT_STEPS)) if attempt < 6 else 0
        resume = ResumeConfig(mode="auto", expect_step=newest_step)
        run = run_config(spec, bucket.target(), attempt=attempt, resume=resume)
        pod = make_traced_pod(run, tmp_path / f"attempt-{attempt}", bucket, hold_point=f"forward:{kill_step}" if kill_step else "")
        pods.append(pod)
        with pod:
            if kill_step:
                pod.wait_until((pod.folder / "work" / "held").exists)
                exit_code, expected_exit_code = kill_rank(pod)
                assert exit_code == expected_exit_code, pod.text[-4000:]
            else:
                assert pod.end() == 0, pod.text[-4000:]
        newest_step = max(newest_step, (kill_step - 1) // CHECKPOINT_STEPS * CHECKPOINT_STEPS)
        assert max(list_committed_steps(bucket), default=0) == (newest_step if kill_step else STEPS)
    assert record_run(bucket, pods, pods[-1].termination_message()) == expected_run
