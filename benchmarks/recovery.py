"""The time from the kill of a rank to the first new step, by stage.

    python -m benchmarks.recovery --kills 12

Method. The real trainer trains a tiny Llama with LoRA on one rank with the real supervisor and a real S3 server, on this machine's CPU. The rank is
killed with SIGKILL at a random time after a commit. `detect` is the time from the kill until the pod has exited and its termination message is
readable. This program starts the next attempt at once, and requests its progress every 10 ms until its first new step. The time for creating a Job and
starting a pod is not included; first_step.py measures it. The pod measures its own stages. In `starting` and `downloading`, the supervisor checks the
storage and downloads model and data, while the rank imports its libraries. In `restoring`, the checkpoint is downloaded and verified. `loading` covers
the remaining imports and loading the model. `training` covers loading the optimizer state, skipping the data of earlier steps, and the first step. The
first kill warms the page cache and is not counted.
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


def wait_for_first_new_step(pod: Pod, newest_step: int) -> dict[str, float]:
    """Wait for the first step after `newest_step`. Returns the seconds of each stage, as measured by the pod."""
    while True:
        assert pod.process is not None and pod.process.poll() is None, pod.text[-3000:]
        report = pod.report()
        if report is not None and (report.progress.step or 0) > newest_step:
            return {stage: report.timings.get(stage, 0.0) for stage in STAGES}
        time.sleep(POLL_SECONDS)


def kill_rank(pod: Pod, newest_step: int, rng: random.Random) -> tuple[float, float, int]:
    """Kill the rank after the next commit. Returns the time of the kill, the seconds until the end of the pod, and the newest committed step."""
    pod.wait_committed(newest_step + 1)
    time.sleep(rng.uniform(0, 0.3))
    killed_at = time.monotonic()
    os.kill(pod.pids("train")[0], signal.SIGKILL)
    assert pod.end() == 74, pod.text[-3000:]
    return killed_at, time.monotonic() - killed_at, pod.termination_message().committed_step or 0


def measure_recoveries(workspace: Workspace, kill_count: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    spec = workspace.make_spec(
        method={"type": "lora"}, checkpoint={"steps": STEPS_PER_CHECKPOINT}, tracking={"loggingSteps": 10},
        training={"maxSteps": 100_000, "batchSizePerDevice": 2, "gradientAccumulationSteps": 1},
    )  # fmt: skip
    target, newest_step, killed_at = workspace.make_target("recovered"), 0, 0.0
    detection_seconds: list[float] = []
    total_seconds: list[float] = []
    seconds_by_stage: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for attempt in range(1, kill_count + 2):
        with workspace.create_pod(
            f"attempt-{attempt}", spec, target, "finetune_trainer.train", attempt=attempt, newest_step=newest_step
        ) as pod:
            stage_seconds = wait_for_first_new_step(pod, newest_step)
            if attempt > 2:
                total_seconds.append(time.monotonic() - killed_at)
                for stage, seconds in stage_seconds.items():
                    seconds_by_stage[stage].append(seconds)
            killed_at, seconds_to_end, newest_step = kill_rank(pod, newest_step, rng)
            if attempt > 1:
                detection_seconds.append(seconds_to_end)
        print(f"kill {attempt}: step {newest_step}, {total_seconds[-1] if total_seconds else 0:.2f} s to the first new step", flush=True)
    median_by_stage = {stage: round(statistics.median(seconds), 3) for stage, seconds in seconds_by_stage.items()}
    return {
        "kills": kill_count,
        "totalSeconds": summarize(total_seconds),
        "detectSeconds": summarize(detection_seconds),
        "medianSecondsByStage": median_by_stage,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with open_workspace() as workspace:
        figures = measure_recoveries(workspace, options.kills, options.seed)
    print(json.dumps(figures, indent=1))
    print(record.write_result("recovery", figures, method=record.extract_method(__doc__)))


if __name__ == "__main__":
    main()
