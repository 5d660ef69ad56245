"""How much checkpoints slow down training: the stall of each checkpoint, and the effect of a slow S3 server on step times.

    python -m benchmarks.checkpoint_stall

Method. A pod (supervisor and one rank of the real trainer, one thread) trains a small Llama on this machine's CPU and uploads to a real S3 server on
the same machine. The stall is the time for which a checkpoint stops training: from the decision to save a step until the rank notifies the
supervisor, measured on the rank's clock. The benchmark measures two training states in turn: a LoRA adapter with its optimizer, and a full model with
its optimizer (1 GB). Each is saved after every second step. Then the same LoRA training runs alternately without checkpoints and with a checkpoint
after every 10th step. A proxy limits each upload to 1 MB/s. Each pair of consecutive runs yields a ratio: the median step time with checkpoints
(without the steps that save) divided by the median step time without checkpoints. The result is the median of these ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks import record
from benchmarks.lib.bench_pods import Workspace, open_workspace, summarize
from tests.support.s3proxy import Bandwidth, S3Proxy

LORA_MODEL_SHAPE = {"hidden": 512, "layers": 8}
FULL_MODEL_SHAPE = {"hidden": 1024, "layers": 9}
SLOW_BYTES_PER_SECOND = 1e6
STEPS_PER_CHECKPOINT = 10


def run_training(
    workspace: Workspace, name: str, spec: dict[str, Any], *, endpoint_url: str | None = None
) -> tuple[list[float], list[float], int]:
    """Run a training. Returns the seconds of each step that does not save, the seconds of each stall, and the bytes of the largest checkpoint."""
    target = workspace.target(name, endpoint_url=endpoint_url)
    with workspace.pod(name, spec, target, "benchmarks.lib.timed_train", env={"OMP_NUM_THREADS": "1"}) as pod:
        code = pod.end(580)
        assert code == 0, pod.text[-3000:]
        size = max((checkpoint.bytes or 0 for checkpoint in pod.termination_message().checkpoints), default=0)
        time_records = [json.loads(line) for line in (pod.folder / "work" / "times.jsonl").read_text().splitlines()]
    end_by_step = {entry["step"]: entry["ended"] for entry in time_records if "ended" in entry}
    stall_by_step = {entry["step"]: entry["stall"] for entry in time_records if "stall" in entry}
    # The time of a step includes the stall of the checkpoint before it.
    steps = [end_by_step[step] - end_by_step[step - 1] for step in end_by_step if step - 1 in end_by_step and step - 1 not in stall_by_step]
    return steps[2:], list(stall_by_step.values()), size


def training_spec(workspace: Workspace, method: str, model_shape: dict[str, Any], steps: int, checkpoint_steps: int | None) -> dict[str, Any]:
    checkpoint = {"steps": checkpoint_steps, "keep": 2} if checkpoint_steps else {"strategy": "no"}
    return workspace.spec(
        model_shape, method={"type": method}, checkpoint=checkpoint, tracking={"loggingSteps": 10},
        training={"maxSteps": steps, "batchSizePerDevice": 1, "gradientAccumulationSteps": 1, "learningRate": 1e-4},
        policy={"stallTimeoutSeconds": 600},
    )  # fmt: skip


def measure_stalls(workspace: Workspace, method: str, model_shape: dict[str, Any], steps: int) -> dict[str, Any]:
    """Measure the stalls of one kind of training state."""
    step_seconds, stall_seconds, size = run_training(workspace, f"stall-{method}", training_spec(workspace, method, model_shape, steps, 2))
    return {
        "checkpointBytes": size, "stallSeconds": summarize(stall_seconds, 4), "stepSeconds": round(statistics.median(step_seconds), 4),
    }  # fmt: skip


def measure_slow_store(workspace: Workspace, round_count: int, steps: int) -> dict[str, Any]:
    """Measure how much a server limited to 1 MB/s slows down steps. Runs with and without checkpoints alternate."""
    median_pairs: list[tuple[float, float]] = []
    with S3Proxy(workspace.server.host_url) as proxy:
        proxy.fault(Bandwidth(SLOW_BYTES_PER_SECOND), operation="PutObject")
        proxy.fault(Bandwidth(SLOW_BYTES_PER_SECOND), operation="UploadPart", key="checkpoints/")
        for number in range(round_count):
            checkpoint_settings = (None, STEPS_PER_CHECKPOINT) if number % 2 == 0 else (STEPS_PER_CHECKPOINT, None)
            median_by_setting = {}
            for checkpoint_steps in checkpoint_settings:
                spec = training_spec(workspace, "lora", {}, steps, checkpoint_steps)
                step_seconds, _, _ = run_training(workspace, f"slow-{number}-{checkpoint_steps}", spec, endpoint_url=proxy.url)
                median_by_setting[checkpoint_steps] = statistics.median(step_seconds)
            median_pairs.append((median_by_setting[None], median_by_setting[STEPS_PER_CHECKPOINT]))
            print(
                f"round {number}: {median_by_setting[None] * 1000:.2f} ms without, {median_by_setting[STEPS_PER_CHECKPOINT] * 1000:.2f} ms with",
                flush=True,
            )
    ratios = [slow / none for none, slow in median_pairs]
    return {
        "bytesPerSecond": SLOW_BYTES_PER_SECOND, "rounds": round_count, "stepsEach": steps, "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios], "stepMsWithout": round(1000 * statistics.median(a for a, _ in median_pairs), 2),
    }  # fmt: skip


def main() -> None:
    """Measure and write the result. A part that is not measured keeps its measurements of the last run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="lora,full,slow", help="parts to measure")
    parser.add_argument("--lora-steps", type=int, default=240)
    parser.add_argument("--full-steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slow-steps", type=int, default=600)
    options = parser.parse_args()
    parts = options.parts.split(",")
    path = record.RESULTS_FOLDER / "checkpoint_stall.json"
    measurements: dict[str, Any] = json.loads(path.read_text())["figures"] if path.exists() else {}
    with open_workspace() as workspace:
        if "lora" in parts:
            measurements["lora"] = measure_stalls(workspace, "lora", LORA_MODEL_SHAPE, options.lora_steps)
        if "full" in parts:
            measurements["full"] = measure_stalls(workspace, "full", FULL_MODEL_SHAPE, options.full_steps)
        if "slow" in parts:
            measurements["slowStore"] = measure_slow_store(workspace, options.rounds, options.slow_steps)
    print(json.dumps(measurements, indent=1))
    print(record.write_result("checkpoint_stall", measurements, method=record.extract_method(__doc__)))


if __name__ == "__main__":
    main()
