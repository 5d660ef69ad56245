"""Exact resume through a real S3 server: killed or stopped runs that go on equal an undisturbed one, bit by bit."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from finetune_api.pod import LastWords, Resume
from pod_buckets import Bucket, new_bucket
from pod_harness import Pod, merged, run_config

from localcluster.s3 import S3Endpoint

STEPS, EVERY = 40, 8


def spec_of(model: Path, rows: Path, method: str, **training: Any) -> dict[str, Any]:
    """Dropout, shuffling, accumulation, and checkpoints in the middle of epochs."""
    return {
        "model": {"source": f"file://{model}"},
        "method": {"type": method, **({"lora": {"dropout": 0.1}} if method == "lora" else {})},
        "dataset": {"train": f"file://{rows}"},
        "training": {
            "maxSteps": STEPS, "batchSizePerDevice": 2, "gradientAccumulationSteps": 2, "learningRate": 1e-3, **training
        },
        "checkpoint": {"steps": EVERY, "keep": 0},
        "tracking": {"loggingSteps": 1},
    }  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packing": {"dataset": {"packing": True, "maxSequenceLength": 128}, "training": {"batchSizePerDevice": 1}},
    "boundary": {"checkpoint": {"steps": 9}},
    "epochs": {"checkpoint": {"strategy": "epoch"}, "dataset": {"split": {"validation": 0.2}}, "evaluation": {"strategy": "epoch"}},
    "best": {
        "dataset": {"split": {"validation": 0.2}}, "evaluation": {"strategy": "steps", "steps": EVERY},
        "checkpoint": {"loadBestAtEnd": True},
    },
    "fsdp": {"distributed": {"strategy": "fsdp"}},
}  # fmt: skip
"""What else a resumed run must get right: 36 rows, 4 a step on one rank, so that an epoch has 9 steps."""


def curve(bucket: Bucket) -> dict[int, dict[str, float]]:
    """Loss, gradient norm and rate of every step; steps that several attempts did must be equal."""
    found: dict[int, dict[str, float]] = {}
    for key in bucket.keys("metrics/"):
        body = bucket.client.get_object(Bucket=bucket.name, Key=bucket.target().uri.split("/", 3)[3] + "/" + key)[
            "Body"
        ]
        for line in body.read().decode().splitlines():
            value = json.loads(line)
            if "loss" not in value:
                continue
            kept = {name: value[name] for name in ("loss", "grad_norm", "learning_rate")}
            assert found.setdefault(value["step"], kept) == kept, f"step {value['step']} of {key}"
    return found


def weights(bucket: Bucket, words: LastWords) -> dict[str, str]:
    """sha256 of the final model's weight files, from its manifest."""
    assert words.output is not None and words.output.uri is not None
    key = words.output.uri.split("/", 3)[3] + "/manifest.json"
    manifest = json.loads(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())
    return {one["path"]: one["sha256"] for one in manifest["files"] if one["path"].endswith(".safetensors")}


@cache
def undisturbed(
    server: S3Endpoint, folder: Path, model: Path, rows: Path, method: str, processes: int, variant: str = "plain"
) -> tuple[dict[int, dict[str, float]], dict[str, str]]:
    """Curve and weights of a run that nothing happens to; one for all tests."""
    bucket = new_bucket(server)
    run = run_config(merged(spec_of(model, rows, method), VARIANTS[variant]), bucket.target(), processes=processes)
    with Pod(run, folder / f"undisturbed-{variant}-{method}-{processes}", bucket.env) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    assert sorted(curve(bucket)) == list(range(1, STEPS + 1))
    return curve(bucket), weights(bucket, pod.words())


def rank_killed(pod: Pod) -> tuple[int, int]:
    """kill -9 of the last rank."""
    os.kill(pod.pids("train")[-1], signal.SIGKILL)
    return pod.end(), 74


def agent_killed(pod: Pod) -> tuple[int, int]:
    os.kill(pod.pids("agent")[0], signal.SIGKILL)
    return pod.end(), 74


def pod_killed(pod: Pod) -> tuple[int, int]:
    """PID 1 and all below it at once, as when a node dies."""
    pod.kill()
    return -signal.SIGKILL, -signal.SIGKILL


def stopped(pod: Pod) -> tuple[int, int]:
    """SIGTERM, as from an eviction."""
    pod.terminate()
    return pod.end(), 75


def case(method: str, processes: int, disturb: Callable[[Pod], tuple[int, int]], variant: str = "plain") -> Any:
    marks = [] if variant == "plain" else [pytest.mark.faults]
    return pytest.param(
        method, processes, disturb, variant, marks=marks, id=f"{variant}-{method}-{processes}-{disturb.__name__}"
    )


@pytest.mark.parametrize(
    ("method", "processes", "disturb", "variant"),
    [
        case("lora", 2, rank_killed), case("lora", 2, stopped), case("full", 1, pod_killed),
        case("lora", 1, stopped, "packing"), case("full", 1, stopped, "boundary"), case("lora", 2, agent_killed, "boundary"),
        case("lora", 1, pod_killed, "epochs"), case("lora", 1, stopped, "epochs"), case("lora", 1, rank_killed, "best"),
        case("full", 2, rank_killed, "fsdp"), case("lora", 2, stopped, "fsdp"),
    ],
)  # fmt: skip
def test_a_disturbed_run_equals_an_undisturbed_one(
    s3_server: S3Endpoint, bucket: Bucket, model: Path, rows: Path, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory, method: str, processes: int, disturb: Callable[[Pod], tuple[int, int]],
    variant: str,
) -> None:  # fmt: skip
    losses, final = undisturbed(s3_server, tmp_path_factory.getbasetemp(), model, rows, method, processes, variant)
    spec = merged(spec_of(model, rows, method), VARIANTS[variant])
    with Pod(run_config(spec, bucket.target(), processes=processes), tmp_path / "one", bucket.env) as first:
        first.wait_committed(EVERY)
        code, expected = disturb(first)
    assert code == expected, first.text[-4000:]
    steps = [
        int(key.split("/")[1].removeprefix("step-"))
        for key in bucket.keys("checkpoints/")
        if key.endswith("_COMMITTED")
    ]
    assert steps and not bucket.keys("model/")

    again = run_config(
        spec, bucket.target(), processes=processes, attempt=2, resume=Resume(mode="auto", expect_step=min(steps))
    )
    with Pod(again, tmp_path / "two", bucket.env) as second:
        assert second.end() == 0, second.text[-4000:]
    words = second.words()
    assert words.resumed_from_step == max(steps)
    assert words.resolved is not None and words.resolved.resume_exact is True
    assert curve(bucket) == losses
    assert weights(bucket, words) == final
