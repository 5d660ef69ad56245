"""Record a run so that tests can compare two runs with `==`: every logged value, the rows of every step and the final weights."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.pod import RunConfig, TerminationMessage
from pod_buckets import Bucket, new_bucket
from pod_harness import PYTHONPATH, Pod, merge, run_config

from localcluster.s3 import S3Endpoint

STEPS, CHECKPOINT_STEPS = 40, 8
TIMED_SUFFIXES = ("_per_second", "runtime", "data_wait_share", "peak_memory_gb", "mfu", "unix_time", "training_seconds", "step_time")
"""Name suffixes of the logged values that measure time or memory. These values differ even between two equal runs."""
Lines = dict[tuple[int, str], dict[str, Any]]
"""The values of each log line. The key of a line is its step and the name of the loss in it (`loss` or `eval_loss`)."""
Rows = dict[tuple[int, int], list[list[str]]]
"""The hashes of the rows of each micro-batch, by (step, rank)."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": {"tracking": {"loggingSteps": 5}},
    "packing": {
        "dataset": {"packing": True, "maxSequenceLength": 128}, "training": {"batchSizePerDevice": 1},
        "tracking": {"loggingSteps": 3},
    },
    "boundary": {"checkpoint": {"steps": 9}},
    "epochs": {"checkpoint": {"strategy": "epoch"}, "dataset": {"split": {"validation": 0.2}}, "evaluation": {"strategy": "epoch"}},
    "best": {
        "dataset": {"split": {"validation": 0.2}}, "evaluation": {"strategy": "steps", "steps": CHECKPOINT_STEPS},
        "checkpoint": {"loadBestAtEnd": True}, "tracking": {"loggingSteps": 3},
    },
    "early": {
        "dataset": {"split": {"validation": 0.2}}, "evaluation": {"strategy": "steps", "steps": CHECKPOINT_STEPS},
        "training": {"earlyStopping": {"patience": 2, "threshold": 1000.0}},
    },
    "fsdp": {"distributed": {"strategy": "fsdp"}, "tracking": {"loggingSteps": 3}},
    "zero": {"distributed": {"strategy": "deepspeed", "deepspeed": {"zeroStage": 2}}, "tracking": {"loggingSteps": 3}},
}  # fmt: skip
"""The spec fields that each variant changes. On one rank, an epoch has 9 steps: 36 rows with 4 rows per step. In the variant `early`,
early stopping ends the run at the third evaluation, because no loss improves by the threshold of 1000."""
LAST_STEP = {"early": 3 * CHECKPOINT_STEPS}
"""The last step of each variant that ends before `STEPS`."""


@dataclass(frozen=True)
class RecordedRun:
    """The log lines, trained rows and weight hashes of a run with one or several attempts."""

    lines: Lines
    rows: Rows
    weight_hashes: dict[str, str]


def make_spec(model: Path, rows: Path, method: str, variant: str = "plain") -> dict[str, Any]:
    """Return a spec with shuffled rows and gradient accumulation. Most checkpoints of the run are saved in the middle of an epoch and of a logging window."""
    spec = {
        "model": {"source": f"file://{model}"},
        "method": {"type": method, **({"lora": {"dropout": 0.1}} if method == "lora" else {})},
        "dataset": {"train": f"file://{rows}"},
        "training": {
            "maxSteps": STEPS, "batchSizePerDevice": 2, "gradientAccumulationSteps": 2, "learningRate": 1e-3
        },
        "checkpoint": {"steps": CHECKPOINT_STEPS, "keep": 0},
        "tracking": {"loggingSteps": 1},
    }  # fmt: skip
    spec_with_variant = merge(spec, VARIANTS[variant])
    if spec_with_variant["checkpoint"].get("strategy"):
        del spec_with_variant["checkpoint"]["steps"]
    return spec_with_variant


def make_traced_pod(
    run: RunConfig, folder: Path, bucket: Bucket, *, hold_point: str = "", failure_point: str = "", node_rank: int = 0
) -> Pod:
    """Create a pod that runs `traced_train`: the real training, which also records the rows of each step."""
    env = {
        "PYTHONPATH": os.pathsep.join([PYTHONPATH, str(Path(__file__).parent)]), "FINETUNE_TRAINER_MODULE": "traced_train",
        **({"TRACE_HOLD": hold_point} if hold_point else {}), **({"TRACE_BREAK": failure_point} if failure_point else {}),
    }  # fmt: skip
    return Pod(run, folder, bucket.env | env, node_rank=node_rank)


def record_run(bucket: Bucket, pods: Iterable[Pod], termination: TerminationMessage) -> RecordedRun:
    """Read the record of a run from the work folders of its pods and from its bucket."""
    return RecordedRun(read_log_lines(bucket), read_trained_rows(pods), read_weight_hashes(bucket, termination))


def read_log_lines(bucket: Bucket, attempt_prefix: str = "") -> Lines:
    """Read the logged values of one attempt (for example `a2-`), or of all attempts by default. Fail if two attempts logged different values for a step."""
    lines_by_step: Lines = {}
    for key in bucket.keys(f"metrics/{attempt_prefix or 'a'}"):
        for text in bucket.read(key).decode().splitlines():
            line_values = json.loads(text)
            kind = next((name for name in ("loss", "eval_loss") if name in line_values), None)
            if kind is None:
                continue
            comparable_values = {name: number for name, number in line_values.items() if not name.endswith(TIMED_SUFFIXES)}
            assert lines_by_step.setdefault((line_values["step"], kind), comparable_values) == comparable_values, (
                f"another attempt logged other values for step {line_values['step']} of {key}"
            )
    return lines_by_step


def read_trained_rows(pods: Iterable[Pod]) -> Rows:
    """Read which rows of the data each rank trained on in each step. Fail if two attempts trained a step on different rows."""
    rows_by_step: Rows = {}
    for pod in pods:
        for file in sorted((pod.folder / "work").glob("rows-*.jsonl")):
            rank = int(file.stem.removeprefix("rows-"))
            for text in file.read_text().splitlines(keepends=True):
                if not text.endswith("\n"):
                    continue  # the rank was killed while it wrote this line, before the step was complete
                entry = json.loads(text)
                hashes = entry["rows"]
                assert rows_by_step.setdefault((entry["step"], rank), hashes) == hashes, (
                    f"another attempt trained step {entry['step']} of {file} on other rows"
                )
    return rows_by_step


def read_weight_hashes(bucket: Bucket, termination: TerminationMessage) -> dict[str, str]:
    """Return the sha256 of each weight file of the final model, as its manifest lists them."""
    assert termination.output is not None and termination.output.uri is not None
    manifest = json.loads(bucket.read(termination.output.uri.split("/job/", 1)[1].split("/", 1)[1] + "/manifest.json"))
    return {item["path"]: item["sha256"] for item in manifest["files"] if item["path"].endswith(".safetensors")}


def list_committed_steps(bucket: Bucket) -> list[int]:
    """Return the steps of all committed checkpoints, in ascending order."""
    keys = [key.split("/") for key in bucket.keys("checkpoints/") if key.endswith("_COMMITTED")]
    return sorted(int(folder.removeprefix("step-")) for _, folder, _ in keys)


def run_uninterrupted(
    server: S3Endpoint, folder: Path, model: Path, rows: Path, method: str, processes: int, variant: str = "plain"
) -> RecordedRun:
    """Return the record of a run without interruptions. All tests share one run for each variant, method and number of ranks.

    The workers of pytest-xdist also share these runs, because the tiny model and the rows have the same content in every worker.
    """
    name = f"uninterrupted-{variant}-{method}-{processes}"
    shared_folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    record_file = shared_folder / f"{name}.pickle"
    with record_file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be recording this run
        if not record_file.exists():
            record = _record_uninterrupted(server, folder / name, make_spec(model, rows, method, variant), processes, variant)
            record_file.write_bytes(pickle.dumps(record))
        record = pickle.loads(record_file.read_bytes())
        assert isinstance(record, RecordedRun)
        return record


def _record_uninterrupted(server: S3Endpoint, folder: Path, spec: dict[str, Any], processes: int, variant: str) -> RecordedRun:
    bucket = new_bucket(server)
    run = run_config(spec, bucket.target(), processes=processes)
    with make_traced_pod(run, folder, bucket) as pod:
        assert pod.end() == 0, pod.text[-4000:]
    record = record_run(bucket, [pod], pod.termination_message())
    last_step, log_interval = LAST_STEP.get(variant, STEPS), run.spec.tracking.logging_steps or 1
    logged_steps = [step for step, kind in sorted(record.lines) if kind == "loss"]
    assert logged_steps == sorted({1, *range(log_interval, last_step + 1, log_interval), last_step}), "the run logged other steps than its spec requests"
    assert sorted(record.rows) == [(step, rank) for step in range(1, last_step + 1) for rank in range(processes)]
    return record
