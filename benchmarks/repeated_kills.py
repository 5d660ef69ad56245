"""Kill a run repeatedly. Check that the run finishes with an exact result, and measure the lost steps and the recovery time.

    python -m benchmarks.repeated_kills --kills 1000 --every 1 --seconds 420 --folder ~/.cache/finetune-operator/repeated_kills

Method. The ranks compute a chain of hashes instead of training (tests/pod/toy_rank.py); supervisor, agent, checkpoint protocol and S3
server are real. After the first new step of an attempt, at a random time between two checkpoints, either the rank, the agent or the whole pod is
killed with SIGKILL, or the pod is stopped with SIGTERM. This program then starts the next attempt at once, with the same inputs as
the operator. Steps lost: the steps after the newest committed checkpoint. At a kill, one checkpoint may be in upload and another one queued; both are lost.
If each step of 50 ms saves a checkpoint, the number of lost steps also depends on the load of the machine. Goodput: the duration of all
steps that were kept, divided by the running time of all pods. Recovery: the time from a kill to the next attempt's first new step.
After each kill, all committed checkpoints are read and compared with their manifests. At the end, the log must contain a state for each step,
and each logged state must equal that of an uninterrupted run, which is computed from the chain of hashes.

With --seconds, no attempt starts after this time. With --folder, the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from finetune_trainer.checkpoint.restore import fetch_verified
from finetune_trainer.checkpoint.tree import CheckpointTree
from finetune_trainer.storage.roots import open_store
from pydantic import BaseModel, Field

from benchmarks import record
from benchmarks.lib.bench_pods import Workspace, open_workspace, summarize
from tests.pod.pod_harness import Pod
from tests.pod.toy_rank import CHAIN_FILE, next_chain

INTERRUPTIONS = ("rank", "agent", "pod", "stop")
POLL_SECONDS = 0.01


class RunRecord(BaseModel):
    """Counters of a benchmark run. The counters are stored on disk, so that the same command can continue an interrupted run."""

    attempt: int = 0
    kill_count: int = 0
    newest_step: int = 0
    pod_seconds: float = Field(default=0.0, description="Running time of all pods in seconds.")
    recovery_seconds: list[float] = Field(default_factory=list)
    steps_lost: list[int] = Field(default_factory=list)
    codes: dict[str, int] = Field(default_factory=dict, description="Number of attempts by interruption and exit code.")
    verified_checkpoints: int = Field(default=0, description="Committed checkpoints that were read and verified.")
    is_finished: bool = False


def interrupt_pod(pod: Pod, interruption: str) -> None:
    """Kill the rank, the agent or the pod with SIGKILL, or stop the pod with SIGTERM."""
    if interruption == "pod":
        pod.kill()
    elif interruption == "stop":
        pod.terminate()
    else:
        for pid in pod.pids("train" if interruption == "rank" else "agent")[:1]:
            os.kill(pid, signal.SIGKILL)


def verify_checkpoints(checkpoint_tree: CheckpointTree, folder: Path, run_record: RunRecord) -> int:
    """Compare each committed checkpoint with its manifest. Returns the newest committed step."""
    newest_step = 0
    for checkpoint in checkpoint_tree.list_committed():
        manifest = checkpoint_tree.read_manifest(checkpoint)
        assert manifest is not None, f"{checkpoint.folder} is committed without its manifest"
        problem = fetch_verified(checkpoint_tree, checkpoint.folder, manifest, folder / checkpoint.folder, lambda path: True)
        assert problem is None, problem
        newest_step = max(newest_step, manifest.step)
        run_record.verified_checkpoints += 1
    return newest_step


def compute_expected_states(step_count: int) -> list[str]:
    """Compute the state of an uninterrupted run after each step; index 0 is the state before the first step."""
    states = [""]
    for step in range(1, step_count + 1):
        states.append(next_chain(states[-1], 0, step))
    return states


def compare_states(checkpoint_tree: CheckpointTree, step_count: int) -> int:
    """Compare each logged state with the state of an uninterrupted run after the same step. Returns the number of logged states.

    Errors: AssertionError if the log has no state for a step, or another state than the uninterrupted run."""
    expected_states, compared_count = compute_expected_states(step_count), 0
    logged_steps: set[int] = set()
    for stored_file in checkpoint_tree.store.list("metrics/"):
        for line in (checkpoint_tree.store.get(stored_file.key) or b"").decode().splitlines():
            log_entry = json.loads(line)
            assert log_entry["chain"] == expected_states[log_entry["step"]], f"{stored_file.key}: step {log_entry['step']} differs from the expected state"
            compared_count += 1
            logged_steps.add(log_entry["step"])
    unlogged_steps = set(range(1, step_count + 1)) - logged_steps
    assert not unlogged_steps, f"steps without a logged line: {sorted(unlogged_steps)[:10]}"
    final_model = checkpoint_tree.get_committed(None)
    assert final_model is not None and checkpoint_tree.store.get(f"{final_model.folder}/{CHAIN_FILE.format(0)}") == expected_states[-1].encode()
    return compared_count


def run_attempt(workspace: Workspace, options: argparse.Namespace, run_record: RunRecord, rng: random.Random) -> None:
    """Run one attempt: start it, wait for a new step, interrupt it in a random way, and verify the checkpoints."""
    run_record.attempt += 1
    target, name = workspace.make_target("repeated-kills"), f"attempt-{run_record.attempt}"
    spec = workspace.make_spec(checkpoint={"steps": options.every})
    toy_settings_json = json.dumps({"steps": options.steps, "every": options.every, "pause": options.pause})
    began_at, checkpoint_tree = time.monotonic(), CheckpointTree(open_store(target))
    with workspace.create_pod(
        name, spec, target, "toy_rank", attempt=run_record.attempt, newest_step=run_record.newest_step, env={"TOY_SCRIPT": toy_settings_json}
    ) as pod:
        assert pod.process is not None
        while pod.step() <= run_record.newest_step and pod.process.poll() is None:
            time.sleep(POLL_SECONDS)
        if run_record.kill_count:
            run_record.recovery_seconds.append(time.monotonic() - began_at)
        last_step, interruption = pod.step(), "none"
        if run_record.kill_count < options.kills:
            time.sleep(rng.uniform(0, options.every * options.pause))
            last_step, interruption = pod.step(), rng.choice(INTERRUPTIONS)
            interrupt_pod(pod, interruption)
            run_record.kill_count += 1
        exit_code = pod.end(600)
    run_record.pod_seconds += time.monotonic() - began_at
    run_record.codes[f"{interruption} {exit_code}"] = run_record.codes.get(f"{interruption} {exit_code}", 0) + 1
    run_record.is_finished = exit_code == 0
    if not run_record.is_finished:
        run_record.newest_step = verify_checkpoints(checkpoint_tree, workspace.folder / "check", run_record)
        run_record.steps_lost.append(max(0, last_step - run_record.newest_step))
        print(f"kill {run_record.kill_count}: {interruption:<5} at step {last_step}, code {exit_code}, committed {run_record.newest_step}", flush=True)


def compute_figures(workspace: Workspace, options: argparse.Namespace, run_record: RunRecord) -> dict[str, Any]:
    compared_count = compare_states(CheckpointTree(open_store(workspace.make_target("repeated-kills"))), options.steps)
    return {
        "steps": options.steps, "checkpointEvery": options.every, "stepSeconds": options.pause, "kills": run_record.kill_count,
        "attempts": run_record.attempt, "endings": dict(sorted(run_record.codes.items())), "podSeconds": round(run_record.pod_seconds, 1),
        "goodput": round(options.steps * options.pause / run_record.pod_seconds, 4), "recoverySeconds": summarize(run_record.recovery_seconds),
        "stepsLost": {"most": max(run_record.steps_lost, default=0), "mean": round(sum(run_record.steps_lost) / max(1, len(run_record.steps_lost)), 2)},
        "checkpointsReadBack": run_record.verified_checkpoints, "statesCompared": compared_count, "curveEqual": True,
    }  # fmt: skip


def main() -> None:
    """Run attempts until the job has finished or `--seconds` have passed. Write the result if the job has finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds of one step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="folder that keeps the state of the run, so that it can be continued")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further attempt after this time")
    options = parser.parse_args()
    began_at = time.monotonic()
    with open_workspace(options.folder) as workspace:
        record_file = workspace.folder / "run.json"
        run_record = RunRecord.model_validate_json(record_file.read_text()) if record_file.exists() else RunRecord()
        while not run_record.is_finished and time.monotonic() - began_at < options.seconds:
            rng = random.Random(f"{options.seed}/{run_record.attempt}")
            run_attempt(workspace, options, run_record, rng)
            record_file.write_text(run_record.model_dump_json())
        if not run_record.is_finished:
            print(f"{run_record.kill_count} kills, step {run_record.newest_step} of {options.steps}: run the same command to continue")
            return
        figures = compute_figures(workspace, options, run_record)
    print(json.dumps(figures, indent=1))
    print(record.write_result("repeated_kills", figures, method=record.extract_method(__doc__)))


if __name__ == "__main__":
    main()
