"""grpo while its vLLM server ends: the attempt fails with an exit code that is retried, and the resumed run equals an uninterrupted run.

`tests.support.generation_server` replaces vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import ExitCode, FailureClass
from finetune_api.pod import TerminationMessage
from pod_buckets import Bucket, new_bucket
from pod_harness import Pod, run_config
from recorded_run import read_log_lines, read_weight_hashes

from localcluster.s3 import S3Endpoint
from tests.support.generation_server import DIES_AT, start_server

STEPS, CHECKPOINT_STEPS, RANKS = 6, 2, 2


def make_grpo_spec(model: Path, rows: Path) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{model}"},
        "method": {"type": "lora", "lora": {"dropout": 0.1}},
        "dataset": {"train": f"file://{rows}"},
        "training": {"maxSteps": STEPS, "batchSizePerDevice": 4, "gradientAccumulationSteps": 1, "learningRate": 0.02},
        "checkpoint": {"steps": CHECKPOINT_STEPS, "keep": 0},
        "tracking": {"loggingSteps": 1},
        "trainer": {
            "type": "grpo", "maxCompletionLength": 6, "rewards": [{"builtin": "regex", "parameters": {"pattern": "e"}}],
            "grpo": {"numGenerations": 4, "generation": {"backend": "vllm", "gpus": 0, "startTimeoutSeconds": 300}},
        },
    }  # fmt: skip


def run_attempt(folder: Path, bucket: Bucket, spec: dict[str, Any], attempt: int = 1, **fault_variables: str) -> tuple[int, TerminationMessage, int]:
    """Run an attempt with its own server, which gets `fault_variables` in its environment.

    Returns the exit code, the termination message and the number of generations.
    """
    with start_server(folder / "work" / "generation", folder / "record.jsonl", **fault_variables) as server:
        run = run_config(spec, bucket.target(), attempt=attempt, processes=RANKS).model_copy(update={"generation_url": server.url})
        with Pod(run, folder, bucket.env) as pod:
            return pod.end(), pod.termination_message(), len(server.generations)


@pytest.mark.slow
def test_a_run_that_resumes_after_its_server_ended_equals_an_uninterrupted_run(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path
) -> None:
    spec, undisturbed_bucket = make_grpo_spec(model, rows), new_bucket(s3_server)
    code, undisturbed_message, generation_count = run_attempt(tmp_path / "undisturbed", undisturbed_bucket, spec)
    assert (code, generation_count) == (ExitCode.OK, STEPS), undisturbed_message

    code, failure_message, generation_count = run_attempt(tmp_path / "first", bucket, spec, **{DIES_AT: "4"})
    assert (code, failure_message.code, failure_message.class_) == (ExitCode.PEER_FAILED, "GenerationServerEnded", FailureClass.INFRASTRUCTURE), failure_message
    assert (failure_message.rank, failure_message.origin, failure_message.step, generation_count) == (0, True, 3, 3)
    assert failure_message.committed_step == CHECKPOINT_STEPS

    code, resumed_message, generation_count = run_attempt(tmp_path / "second", bucket, spec, attempt=2)
    assert (code, resumed_message.resumed_from_step, generation_count) == (ExitCode.OK, CHECKPOINT_STEPS, STEPS - CHECKPOINT_STEPS), resumed_message
    assert read_log_lines(bucket) == read_log_lines(undisturbed_bucket)
    assert read_weight_hashes(bucket, resumed_message) == read_weight_hashes(undisturbed_bucket, undisturbed_message)
