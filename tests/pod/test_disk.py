"""Training while the disk is full: the work folder is a small file system, or the pod has a disk limit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from finetune_api.names import Env
from finetune_api.pod import ResumeConfig
from finetune_trainer.checkpoint.space import DISK_RESERVE_BYTES
from pod_buckets import Bucket
from pod_harness import run_config
from recorded_run import list_committed_steps, make_spec, make_traced_pod, record_run, run_uninterrupted

from localcluster.s3 import S3Endpoint
from tests.support.slices import quick_slice

DISK_BYTES = 4 * DISK_RESERVE_BYTES
"""The size of the file system, or the pod's disk limit, in bytes."""


@pytest.fixture(params=["file system", "limit"])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, str]]]:
    """The work folder, and environment variables for the pod.

    Depending on the parameter, the work folder is a small file system, or the environment variables set a disk limit.
    """
    if request.param == "limit":
        work = tmp_path / "one" / "work"
        work.mkdir(parents=True)
        yield work, {Env.DISK_LIMIT: str(DISK_BYTES)}
        return
    if os.geteuid() != 0:
        pytest.skip("mounting a file system requires root")
    work = tmp_path / "one" / "work"
    work.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(work)], check=True)
    try:
        yield work, {}
    finally:
        subprocess.run(["umount", "--lazy", str(work)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("processes", quick_slice([1, 2], [2]))
def test_training_continues_without_checkpoints_while_the_disk_is_full(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, small_disk: tuple[Path, dict[str, str]], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, processes: int,
) -> None:  # fmt: skip
    """While the disk is full, two checkpoints are skipped. Once the disk has space, the next checkpoint is committed.

    The run that resumes from this checkpoint equals an uninterrupted run.
    """
    expected_run = run_uninterrupted(s3_server, tmp_path_factory.getbasetemp(), model, rows, "lora", processes, "windows")
    spec = make_spec(model, rows, "lora", "windows")
    work, limit_variables = small_disk
    filler = work / "filler"
    filler.write_bytes(bytes(DISK_BYTES - DISK_RESERVE_BYTES))
    first_pod = make_traced_pod(run_config(spec, bucket.target(), processes=processes), tmp_path / "one", bucket, hold_point="forward:19")
    first_pod.env |= limit_variables
    with first_pod:
        first_pod.wait_until((work / "held").exists)
        report = first_pod.report()
        assert report is not None and report.progress is not None
        assert (report.progress.step, list_committed_steps(bucket)) == (18, [])
        assert report.health.checkpoint_problem == "StagingDiskFull: the checkpoint of step 16 was skipped: the pod's disk is full"
        filler.unlink()
        first_pod.terminate()
        assert first_pod.end() == 75, first_pod.text[-4000:]
    assert list_committed_steps(bucket) == [19]
    resume = ResumeConfig(mode="auto", expect_step=19)
    with make_traced_pod(run_config(spec, bucket.target(), processes=processes, attempt=2, resume=resume), tmp_path / "two", bucket) as second_pod:
        assert second_pod.end() == 0, second_pod.text[-4000:]
    assert record_run(bucket, [first_pod, second_pod], second_pod.termination_message()) == expected_run
