"""A preparation pod checks storage, model and data without a GPU. It refuses a bad job, and reports where the error is and a hint.

`tests/unit/operator/test_preparation.py` and `tests/e2e/jobs/test_bad_jobs.py` test that no GPU pod of a refused job is created.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from finetune_api.memory.changes import NO_CHANGE_HINT
from finetune_api.names import FailureClass
from finetune_api.pod import GpuPool, RunConfig, TerminationMessage
from finetune_api.status import DataReport
from pod_buckets import Bucket
from pod_harness import ROWS, Pod, run_config, write_rows

from tests.support.bad_jobs import BAD_JOBS, BadJob
from tests.support.slices import quick_slice

GPUS_PER_NODE = 8


def prepare(bucket: Bucket, folder: Path, run: RunConfig, env: dict[str, str] | None = None) -> tuple[TerminationMessage, str]:
    """Run a preparation pod, and return its termination message and its log."""
    with Pod(run, folder / "pod", bucket.env | (env or {}), command="prepare") as pod:
        code = pod.end()
    message = pod.termination_message()
    assert message.exit_code == code, pod.text[-3000:]
    return message, pod.text


def test_a_gpu_job_is_prepared_without_a_gpu_and_without_weights(bucket: Bucket, tmp_path: Path, model: Path) -> None:
    for file in sorted(model.iterdir()):
        bucket.client.upload_file(str(file), bucket.name, f"{bucket.root}/base/{file.name}")
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[0]])
    spec: dict[str, Any] = {
        "model": {"source": f"s3://{bucket.name}/{bucket.root}/base"}, "method": {"type": "qlora"},
        "dataset": {"train": f"file://{rows}", "format": "messages", "checks": {"deduplicate": True}},
        "training": {"maxSteps": 4, "mixedPrecision": "bf16"}, "distributed": {"strategy": "fsdp"},
    }  # fmt: skip
    message, log = prepare(bucket, tmp_path, run_config(spec, bucket.target(), nodes=2, processes=GPUS_PER_NODE, gpus=GPUS_PER_NODE))
    assert message.exit_code == 0, log[-3000:]
    assert message.data is not None and message.data.digest is not None and message.data.prepared_sha256 is not None
    assert message.data.prepared_uri == f"s3://{bucket.name}/{bucket.root}/team/_prepared/{message.data.digest}"
    assert message.data.model_copy(update={"digest": None, "prepared_uri": None, "prepared_sha256": None}) == DataReport(
        rows={"train": 36, "validation": 0, "test": 0}, bad_rows=0, duplicates=1, tokens=926, trained_tokens=242, median_length=26, longest=27, truncated=0,
        tokenised_rows=36,
    )  # fmt: skip
    assert message.plan is not None and message.plan.memory is not None and message.plan.memory.expected_bytes > 0
    assert message.plan.work is not None and message.plan.work.steps == 4
    assert message.resolved is not None
    assert (message.resolved.trainable_parameters, message.resolved.total_parameters) == (32768, 164160)
    assert (message.resolved.dataset_rows, message.resolved.model_revision) == (36, None)
    downloaded_names = {file.name for file in (tmp_path / "pod" / "work" / "fetched" / "model").iterdir()}
    assert "config.json" in downloaded_names and not any(name.endswith(".safetensors") for name in downloaded_names)


# ---- the plan chooses fields that the spec leaves out; the GPUs of its pools do not exist ----


def make_planned_run(bucket: Bucket, model: Path, rows: Path, *pools: GpuPool, training: dict[str, Any]) -> RunConfig:
    """Return the run configuration of a job with one GPU that may run in each of these pools."""
    spec = {"model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"}, "training": training}
    return run_config(spec, bucket.target(), gpus=1).model_copy(update={"pools": list(pools)})


def test_a_preparation_chooses_what_the_spec_leaves_out(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    pools = [GpuPool(name="small", memory_bytes=10**8, is_current=True), GpuPool(name="l4", memory_bytes=24 * 2**30, gpu_type="l4-24gb")]
    message, log = prepare(bucket, tmp_path, make_planned_run(bucket, model, rows, *pools, training={"maxSteps": 4, "effectiveBatchSize": 12}))
    assert message.plan is not None, log[-3000:]
    assert {choice.field: choice.value for choice in message.plan.choices or []} == {
        "resources.nodePool": "l4", "training.batchSizePerDevice": 12, "training.gradientAccumulationSteps": 1, "training.gradientCheckpointing": "disabled",
    }  # fmt: skip
    assert (message.exit_code, message.plan.no_choices, message.plan.work and message.plan.work.steps) == (0, None, 4)


def test_a_job_that_fits_into_no_pool_is_refused_with_a_hint(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    pool = GpuPool(name="small", memory_bytes=10**8, is_current=True)
    message, _ = prepare(bucket, tmp_path, make_planned_run(bucket, model, rows, pool, training={"maxSteps": 4}))
    assert (message.code, message.class_, message.exit_code) == ("DoesNotFit", FailureClass.USER, 64)
    match = re.fullmatch(r"the job is expected to need at least 0\.\d\d GB on each GPU, (.*)", message.message or "")
    assert match is not None and match[1] == "but no pool that it may use has so much GPU memory: small (0.10 GB)"
    assert message.hint == NO_CHANGE_HINT


def test_the_plan_says_why_it_has_chosen_nothing(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    message, _ = prepare(bucket, tmp_path, make_planned_run(bucket, model, rows, training={"maxSteps": 4}))
    assert message.plan is not None and message.plan.memory is not None
    assert (message.plan.choices, message.plan.no_choices) == (None, "the memory of the GPUs is not known")


# ---- bad jobs ----


QUICK_BAD_JOBS = ("wrong secret key", "unknown role", "target modules that the model lacks")


@pytest.mark.parametrize("name", quick_slice(BAD_JOBS, QUICK_BAD_JOBS))
def test_a_bad_job_is_refused_with_location_and_hint(bucket: Bucket, tmp_path: Path, model: Path, rows: Path, name: str) -> None:
    change, code, failure_class, location = BAD_JOBS[name]
    good_spec: dict[str, Any] = {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"}, "training": {"maxSteps": 4},
    }  # fmt: skip
    bad_job = BadJob(tmp_path, model, bucket.name, good_spec)
    change(bad_job)
    run = run_config(bad_job.spec, bucket.target(**bad_job.storage), processes=GPUS_PER_NODE, gpus=GPUS_PER_NODE)
    message, log = prepare(bucket, tmp_path, run, bad_job.env)
    assert (message.code, message.class_) == (code, failure_class), f"{message.code} {message.class_}: {message.message} | {message.hint}"
    assert message.hint and location in f"{message.message} {message.hint}", f"{message.message} | {message.hint}"
    assert bucket.endpoint.secret_key not in log + message.to_json()


def test_a_stopped_preparation_ends_at_once_and_may_be_repeated(bucket: Bucket, tmp_path: Path, model: Path, rows: Path) -> None:
    spec = {"model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"}, "training": {"maxSteps": 4}}
    with Pod(run_config(spec, bucket.target(), processes=GPUS_PER_NODE, gpus=GPUS_PER_NODE), tmp_path / "pod", bucket.env, command="prepare") as pod:
        pod.wait_until(lambda: bool(pod.pids("check")))
        assert pod.process is not None
        pod.process.terminate()
        assert pod.end() == 75
        assert pod.pids("check") == []
