"""Time from a kill to the first new step, by stage.

    python -m benchmarks.recovery --kills 12

Method. The real trainer trains a tiny Llama with LoRA on one rank with the real supervisor and a real S3 server, on this machine's CPU. The
rank is killed with SIGKILL at a random time after a commit. `detect` is the time until the pod has ended with its termination message. This
program starts the next attempt at once, and requests its progress every 10 ms until its first new step. first_step.py measures the time for
creating a Job and starting a pod. The pod measures its own stages. In `starting` and `downloading`, the supervisor checks the storage and
downloads model and data, while the rank imports its libraries. In `restoring`, the checkpoint is downloaded and verified. `loading` covers
the remaining imports and loading the model. `training` covers loading the optimizer state, skipping used data, and the first step. The first
kill warms the page cache and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import time

from benchmarks import record
from benchmarks.lib.bench_pods import Workspace, open_workspace, summarize
from tests.pod.pod_harness import Pod

STEPS_PER_CHECKPOINT = 10
POLL_SECONDS = 0.01
STAGES = ("starting", "downloading", "checking", "restoring", "loading", "training")


def first_new_step(pod: Pod, newest: int) -> dict[str, float]:
    """Wait for the first new step. Returns the seconds of each stage, as measured by the pod."""
    while True:
        assert pod.process is not None and pod.process.poll() is None, pod.text[-3000:]
        report = pod.report()
        if report is not None and (report.progress.step or 0) > newest:
            return {stage: report.timings.get(stage, 0.0) for stage in STAGES}
        time.sleep(POLL_SECONDS)


def kill_rank(pod: Pod, newest: int, rng: random.Random) -> tuple[float, float, int]:
    """Kill the rank after the next commit. Returns the time of the kill, the seconds until the pod ended, and the newest committed step."""
    pod.wait_committed(newest + 1)
    time.sleep(rng.uniform(0, 0.3))
    killed_at = time.monotonic()
    os.kill(pod.pids("train")[0], signal.SIGKILL)
    assert pod.end() == 74, pod.text[-3000:]
    return killed_at, time.monotonic() - killed_at, pod.termination_message().committed_step or 0


def measure(workspace: Workspace, kills: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    spec = workspace.spec(
        method={"type": "lora"}, checkpoint={"steps": STEPS_PER_CHECKPOINT}, tracking={"loggingSteps": 10},
        training={"maxSteps": 100_000, "batchSizePerDevice": 2, "gradientAccumulationSteps": 1},
    )  # fmt: skip
    target, newest, killed_at = workspace.target("recovered"), 0, 0.0
    detect: list[float] = []
    total: list[float] = []
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for attempt in range(1, kills + 2):
        with workspace.pod(
            f"attempt-{attempt}", spec, target, "finetune_trainer.train", attempt=attempt, newest=newest
        ) as pod:
            stage_seconds = first_new_step(pod, newest)
            if attempt > 2:
                total.append(time.monotonic() - killed_at)
                for stage, seconds in stage_seconds.items():
                    stages[stage].append(seconds)
            killed_at, seconds, newest = kill_rank(pod, newest, rng)
            if attempt > 1:
                detect.append(seconds)
        print(f"kill {attempt}: step {newest}, {total[-1] if total else 0:.2f} s to the first new step", flush=True)
    medians = {stage: round(statistics.median(seconds), 3) for stage, seconds in stages.items()}
    return {
        "kills": kills,
        "totalSeconds": summarize(total),
        "detectSeconds": summarize(detect),
        "medianSecondsByStage": medians,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with open_workspace() as workspace:
        figures = measure(workspace, options.kills, options.seed)
    print(json.dumps(figures, indent=1))
    print(record.write("recovery", figures, method=record.method(__doc__)))


if __name__ == "__main__":
    main()
