"""How much checkpoints slow down training: the stall of each checkpoint, written in the background or not, and the effect of a slow S3 server.

    python -m benchmarks.checkpoint_stall

Method. A pod (supervisor and one rank of the real trainer, one thread) trains a small Llama on this machine's CPU and uploads to a real S3 server on
the same machine. The stall is the time for which a checkpoint stops training: from the decision to save a step until the rank notifies the
supervisor, measured on the rank's clock. The benchmark measures two training states in turn: a LoRA adapter with its optimizer, and a full model with
its optimizer (1 GB unless an option says otherwise). Runs whose checkpoints are written in the background alternate with blocking runs, whose
training waits until the files are written. Each pair of consecutive runs gives two ratios of background to blocking: the ratio of the median stalls,
and the ratio of the times from the second step to the last. The results are the medians of these ratios. The checkpoints are far enough apart that
each is written before the next one is due. The part `copy` needs no pod: it saves a state of 16-megabyte tensors, in turn in the background and
blocking, and compares the times after which the caller continues. The first save of each kind is not counted, because it allocates memory. In the
part `slow`, a proxy limits each upload to 1 MB/s, and the same LoRA training runs alternately without checkpoints and with a checkpoint after every
10th step. Each pair of consecutive runs gives a ratio: the median time of the steps that save no checkpoint, divided by the median step time of the
run without checkpoints. The result is the median of these ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.lib.bench_pods import Workspace, open_workspace, summarize
from tests.support.s3proxy import Bandwidth, S3Proxy

LORA_MODEL_SHAPE = {"hidden": 512, "layers": 8}
SLOW_STORE_BYTES_PER_SECOND = 1e6
STEPS_PER_CHECKPOINT = 10
STEPS_PER_CHECKPOINT_BY_METHOD = {"lora": 10, "full": 15}
"""Number of steps from one checkpoint to the next in the runs that measure stalls, by method."""


@dataclass(frozen=True)
class TimedTraining:
    """The times of one run, in seconds."""

    step_seconds: list[float]
    """Durations of the steps that do not follow a checkpoint."""
    stall_seconds: list[float]
    """Stalls of all checkpoints except the checkpoint of the last step, because the files of the last checkpoint are not copied."""
    checkpoint_bytes: int
    """Size of the largest checkpoint."""
    total_seconds: float
    """Time from the end of the first step to the end of the last step."""


def run_training(
    workspace: Workspace, name: str, spec: dict[str, Any], *, endpoint_url: str | None = None, writes_in_background: bool = True
) -> TimedTraining:
    """Train once and return the times. If `writes_in_background` is false, training waits until each checkpoint is written."""
    target = workspace.make_target(name, endpoint_url=endpoint_url)
    environment = {"OMP_NUM_THREADS": "1", "BENCHMARK_CHECKPOINTS": "background" if writes_in_background else "blocking"}
    with workspace.create_pod(name, spec, target, "benchmarks.lib.timed_train", env=environment) as pod:
        exit_code = pod.end(580)
        assert exit_code == 0, pod.text[-3000:]
        largest_checkpoint_bytes = max((checkpoint.bytes or 0 for checkpoint in pod.termination_message().checkpoints), default=0)
        time_records = [json.loads(line) for line in (pod.folder / "work" / "times.jsonl").read_text().splitlines()]
    end_by_step = {entry["step"]: entry["ended"] for entry in time_records if "ended" in entry}
    stall_by_step = {entry["step"]: entry["stall"] for entry in time_records if "stall" in entry}
    # The time of a step includes the stall of the checkpoint before it.
    step_seconds = [end_by_step[step] - end_by_step[step - 1] for step in end_by_step if step - 1 in end_by_step and step - 1 not in stall_by_step]
    stalls_before_last_step = [stall for step, stall in stall_by_step.items() if step < max(end_by_step)]
    return TimedTraining(step_seconds[2:], stalls_before_last_step, largest_checkpoint_bytes, max(end_by_step.values()) - min(end_by_step.values()))


def make_training_spec(workspace: Workspace, method: str, model_shape: dict[str, Any], step_count: int, steps_per_checkpoint: int | None) -> dict[str, Any]:
    checkpoint_settings = {"steps": steps_per_checkpoint, "keep": 2} if steps_per_checkpoint else {"strategy": "no"}
    return workspace.make_spec(
        model_shape, method={"type": method}, checkpoint=checkpoint_settings, tracking={"loggingSteps": 10},
        training={"maxSteps": step_count, "batchSizePerDevice": 1, "gradientAccumulationSteps": 1, "learningRate": 1e-4},
        policy={"stallTimeoutSeconds": 600},
    )  # fmt: skip


def measure_stalls(workspace: Workspace, method: str, model_shape: dict[str, Any], step_count: int, round_count: int) -> dict[str, Any]:
    """Measure the stalls for one method. Runs that write checkpoints in the background alternate with blocking runs."""
    # The key says whether the run writes its checkpoints in the background.
    runs_by_background: dict[bool, list[TimedTraining]] = {True: [], False: []}
    for round_number in range(round_count):
        for writes_in_background in (True, False) if round_number % 2 == 0 else (False, True):
            spec = make_training_spec(workspace, method, model_shape, step_count, STEPS_PER_CHECKPOINT_BY_METHOD[method])
            run_name = f"stall-{method}-{round_number}-{writes_in_background}"
            runs_by_background[writes_in_background].append(run_training(workspace, run_name, spec, writes_in_background=writes_in_background))
            newest_run = runs_by_background[writes_in_background][-1]
            print(f"{run_name}: stalls {[round(stall, 3) for stall in newest_run.stall_seconds]}, {newest_run.total_seconds:.1f} s", flush=True)
    run_pairs = list(zip(runs_by_background[True], runs_by_background[False], strict=True))
    stall_ratios = [
        statistics.median(background_run.stall_seconds) / statistics.median(blocking_run.stall_seconds) for background_run, blocking_run in run_pairs
    ]
    time_ratios = [background_run.total_seconds / blocking_run.total_seconds for background_run, blocking_run in run_pairs]
    return {
        "checkpointBytes": runs_by_background[True][0].checkpoint_bytes, "stepsPerCheckpoint": STEPS_PER_CHECKPOINT_BY_METHOD[method], "rounds": round_count,
        "stallRatio": round(statistics.median(stall_ratios), 4), "stallRatios": [round(ratio, 4) for ratio in stall_ratios],
        "trainingTimeRatio": round(statistics.median(time_ratios), 4), "trainingTimeRatios": [round(ratio, 4) for ratio in time_ratios],
        "stallSeconds": summarize([stall for run in runs_by_background[True] for stall in run.stall_seconds], 4),
        "blockingStallSeconds": summarize([stall for run in runs_by_background[False] for stall in run.stall_seconds], 4),
        "stepSeconds": round(statistics.median(step for run in runs_by_background[False] for step in run.step_seconds), 4),
    }  # fmt: skip


def measure_save_stalls(folder: Path, megabytes: int, round_count: int) -> dict[str, Any]:
    """Measure in this process how long a save blocks its caller. Saves in the background alternate with blocking saves."""
    import torch
    from finetune_trainer.checkpoint.background import BackgroundWriter

    torch.set_num_threads(1)
    state = {f"tensor{number}": torch.full((4_000_000,), float(number)) for number in range(max(1, megabytes // 16))}
    writer, seconds_by_background = BackgroundWriter(), {True: [], False: []}  # type: tuple[BackgroundWriter, dict[bool, list[float]]]
    for number in range(round_count + 1):
        for writer.writes_in_background in (True, False) if number % 2 == 0 else (False, True):
            started_at = time.monotonic()
            with writer.begin_checkpoint():
                torch.save(state, folder / "state.pt")
            writer.finish_checkpoint()
            seconds_by_background[writer.writes_in_background].append(time.monotonic() - started_at)
            writer.wait()
    seconds_pairs = zip(seconds_by_background[True][1:], seconds_by_background[False][1:], strict=True)
    ratios = [background_seconds / blocking_seconds for background_seconds, blocking_seconds in seconds_pairs]
    return {
        "stateBytes": sum(tensor.nbytes for tensor in state.values()), "rounds": round_count, "stallRatio": round(statistics.median(ratios), 4),
        "stallRatios": [round(ratio, 4) for ratio in ratios], "stallSeconds": summarize(seconds_by_background[True][1:], 4),
        "blockingStallSeconds": summarize(seconds_by_background[False][1:], 4),
    }  # fmt: skip


def measure_slow_store(workspace: Workspace, round_count: int, step_count: int) -> dict[str, Any]:
    """Measure how much uploads limited to 1 MB/s slow down steps. Runs with and without checkpoints alternate."""
    median_pairs: list[tuple[float, float]] = []
    with S3Proxy(workspace.server.host_url) as proxy:
        proxy.fault(Bandwidth(SLOW_STORE_BYTES_PER_SECOND), operation="PutObject")
        proxy.fault(Bandwidth(SLOW_STORE_BYTES_PER_SECOND), operation="UploadPart", key="checkpoints/")
        for round_number in range(round_count):
            checkpoint_intervals = (None, STEPS_PER_CHECKPOINT) if round_number % 2 == 0 else (STEPS_PER_CHECKPOINT, None)
            median_step_seconds_by_interval = {}
            for steps_per_checkpoint in checkpoint_intervals:
                spec = make_training_spec(workspace, "lora", {}, step_count, steps_per_checkpoint)
                timed_training = run_training(workspace, f"slow-{round_number}-{steps_per_checkpoint}", spec, endpoint_url=proxy.url)
                median_step_seconds_by_interval[steps_per_checkpoint] = statistics.median(timed_training.step_seconds)
            without, with_checkpoints = median_step_seconds_by_interval[None], median_step_seconds_by_interval[STEPS_PER_CHECKPOINT]
            median_pairs.append((without, with_checkpoints))
            print(f"round {round_number}: {without * 1000:.2f} ms without, {with_checkpoints * 1000:.2f} ms with", flush=True)
    ratios = [with_checkpoints / without for without, with_checkpoints in median_pairs]
    return {
        "bytesPerSecond": SLOW_STORE_BYTES_PER_SECOND, "rounds": round_count, "stepsEach": step_count, "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios], "stepMsWithout": round(1000 * statistics.median(without for without, _ in median_pairs), 2),
    }  # fmt: skip


def main() -> None:
    """Measure the chosen parts and write the result. A part that is not measured keeps its result from the last run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="copy,lora,full,slow", help="parts to measure")
    parser.add_argument("--lora-steps", type=int, default=240)
    parser.add_argument("--full-steps", type=int, default=64)
    parser.add_argument("--copy-megabytes", type=int, default=1024)
    parser.add_argument("--full-hidden", type=int, default=1024, help="size of the model for full training; the default has a state of 1 GB")
    parser.add_argument("--full-layers", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--slow-steps", type=int, default=600)
    options = parser.parse_args()
    chosen_parts = options.parts.split(",")
    result_file = record.RESULTS_FOLDER / "checkpoint_stall.json"
    measurements: dict[str, Any] = json.loads(result_file.read_text())["figures"] if result_file.exists() else {}
    with open_workspace() as workspace:
        if "copy" in chosen_parts:
            measurements["copy"] = measure_save_stalls(workspace.folder, options.copy_megabytes, 2 * options.rounds)
        if "lora" in chosen_parts:
            measurements["lora"] = measure_stalls(workspace, "lora", LORA_MODEL_SHAPE, options.lora_steps, options.rounds)
        if "full" in chosen_parts:
            full_model_shape = {"hidden": options.full_hidden, "layers": options.full_layers}
            measurements["full"] = measure_stalls(workspace, "full", full_model_shape, options.full_steps, options.rounds)
        if "slow" in chosen_parts:
            measurements["slowStore"] = measure_slow_store(workspace, options.rounds, options.slow_steps)
    print(json.dumps(measurements, indent=1))
    print(record.write_result("checkpoint_stall", measurements, method=record.extract_method(__doc__)))


if __name__ == "__main__":
    main()
