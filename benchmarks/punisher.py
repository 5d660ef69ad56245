"""A run that is killed again and again: does it end, is it exact, what is lost, how fast does it recover?

    python -m benchmarks.punisher --kills 1000 --every 1 --seconds 420 --folder ~/.cache/finetune-operator/punisher

Method. Ranks that keep a chain of hashes instead of training (tests/pod/toy_rank.py) run below the real supervisor, agent,
checkpoint protocol and a real S3 server. A random victim (rank, agent, or the whole pod) is killed by SIGKILL, or the pod is asked
to stop by SIGTERM, at a random moment of the interval between two checkpoints, after the attempt's first new step; the next attempt
starts at once, as the operator would start it.
Steps lost: those that were made while the checkpoint in flight and the one that waits were brought; with a step of 50 ms, and a
checkpoint at each, that is a matter of how busy the machine is.
Goodput: seconds of steps that were kept over all seconds that pods were held. Recovery: from the kill to the next attempt's first new
step. At every restart all committed checkpoints are read back and compared with their manifests; in the end every step must have a
logged state, and all of them and the final one are compared with those of a run that nothing happened to, which a chain of hashes
lets anyone compute.

With --folder and --seconds it stops between two kills when the time is over, and the same command goes on where it stopped.
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
from finetune_trainer.checkpoint.tree import Tree
from finetune_trainer.storage.roots import open_store
from pydantic import BaseModel, Field

from benchmarks import record
from benchmarks.lib.bench_pods import Bench, bench, spread
from tests.pod.pod_harness import Pod
from tests.pod.toy_rank import CHAIN, link

VICTIMS = ("rank", "agent", "pod", "stop")
POLL_SECONDS = 0.01


class Ledger(BaseModel):
    """What has happened so far; kept on disk so that a run may be done in pieces."""

    attempt: int = 0
    kills: int = 0
    newest: int = 0
    held: float = Field(default=0.0, description="Seconds that pods were held.")
    recoveries: list[float] = Field(default_factory=list)
    lost: list[int] = Field(default_factory=list)
    codes: dict[str, int] = Field(default_factory=dict, description="Attempts by victim and exit code.")
    checked: int = Field(default=0, description="Committed checkpoints read back.")
    done: bool = False


def strike(pod: Pod, victim: str) -> None:
    """Kill, or ask to stop."""
    if victim == "pod":
        pod.kill()
    elif victim == "stop":
        pod.terminate()
    else:
        for pid in pod.pids("train" if victim == "rank" else "agent")[:1]:
            os.kill(pid, signal.SIGKILL)


def check(tree: Tree, folder: Path, ledger: Ledger) -> int:
    """Newest committed step, after every committed checkpoint was compared with its manifest."""
    newest = 0
    for committed in tree.committed():
        manifest = tree.manifest(committed)
        assert manifest is not None, f"{committed.folder} is committed without its manifest"
        problem = fetch_verified(tree, committed.folder, manifest, folder / committed.folder, lambda path: True)
        assert problem is None, problem
        newest = max(newest, manifest.step)
        ledger.checked += 1
    return newest


def reference(steps: int) -> list[str]:
    """State after each step of a run that nothing happens to; index 0: before the first."""
    states = [""]
    for step in range(1, steps + 1):
        states.append(link(states[-1], 0, step))
    return states


def same_curve(tree: Tree, steps: int) -> int:
    """Logged states that were compared with the reference; fails at the first that differs, and if a step has none."""
    states, compared = reference(steps), 0
    seen: set[int] = set()
    for stat in tree.store.list("metrics/"):
        for line in (tree.store.get(stat.key) or b"").decode().splitlines():
            value = json.loads(line)
            assert value["chain"] == states[value["step"]], f"{stat.key}: step {value['step']} is another state"
            compared += 1
            seen.add(value["step"])
    unlogged = set(range(1, steps + 1)) - seen
    assert not unlogged, f"steps without a logged line: {sorted(unlogged)[:10]}"
    model = tree.marker(None)
    assert model is not None and tree.store.get(f"{model.folder}/{CHAIN.format(0)}") == states[-1].encode()
    return compared


def attempt(place: Bench, options: argparse.Namespace, ledger: Ledger, draw: random.Random) -> None:
    """One attempt: start, wait for a new step, hurt it, look at what is left."""
    ledger.attempt += 1
    target, name = place.target("punished"), f"attempt-{ledger.attempt}"
    spec = place.spec(checkpoint={"steps": options.every})
    script = json.dumps({"steps": options.steps, "every": options.every, "pause": options.pause})
    began, tree = time.monotonic(), Tree(open_store(target))
    with place.pod(
        name, spec, target, "toy_rank", attempt=ledger.attempt, newest=ledger.newest, env={"TOY_SCRIPT": script}
    ) as pod:
        assert pod.process is not None
        while pod.step() <= ledger.newest and pod.process.poll() is None:
            time.sleep(POLL_SECONDS)
        if ledger.kills:
            ledger.recoveries.append(time.monotonic() - began)
        seen, victim = pod.step(), "none"
        if ledger.kills < options.kills:
            time.sleep(draw.uniform(0, options.every * options.pause))
            seen, victim = pod.step(), draw.choice(VICTIMS)
            strike(pod, victim)
            ledger.kills += 1
        code = pod.end(600)
    ledger.held += time.monotonic() - began
    ledger.codes[f"{victim} {code}"] = ledger.codes.get(f"{victim} {code}", 0) + 1
    ledger.done = code == 0
    if not ledger.done:
        ledger.newest = check(tree, place.folder / "check", ledger)
        ledger.lost.append(max(0, seen - ledger.newest))
        print(f"kill {ledger.kills}: {victim:<5} at step {seen}, code {code}, committed {ledger.newest}", flush=True)


def figures_of(place: Bench, options: argparse.Namespace, ledger: Ledger) -> dict[str, Any]:
    compared = same_curve(Tree(open_store(place.target("punished"))), options.steps)
    return {
        "steps": options.steps, "checkpointEvery": options.every, "stepSeconds": options.pause, "kills": ledger.kills,
        "attempts": ledger.attempt, "endings": dict(sorted(ledger.codes.items())), "podSeconds": round(ledger.held, 1),
        "goodput": round(options.steps * options.pause / ledger.held, 4), "recoverySeconds": spread(ledger.recoveries),
        "stepsLost": {"most": max(ledger.lost, default=0), "mean": round(sum(ledger.lost) / max(1, len(ledger.lost)), 2)},
        "checkpointsReadBack": ledger.checked, "statesCompared": compared, "curveEqual": True,
    }  # fmt: skip


def main() -> None:
    """Punish and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds a step takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep state here, and go on from it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many, between two kills")
    options = parser.parse_args()
    began = time.monotonic()
    with bench(options.folder) as place:
        book = place.folder / "ledger.json"
        ledger = Ledger.model_validate_json(book.read_text()) if book.exists() else Ledger()
        while not ledger.done and time.monotonic() - began < options.seconds:
            draw = random.Random(f"{options.seed}/{ledger.attempt}")
            attempt(place, options, ledger, draw)
            book.write_text(ledger.model_dump_json())
        if not ledger.done:
            print(f"{ledger.kills} kills, step {ledger.newest} of {options.steps}: the same command goes on")
            return
        figures = figures_of(place, options, ledger)
    print(json.dumps(figures, indent=1))
    print(record.write("punisher", figures, method=record.method(__doc__)))


if __name__ == "__main__":
    main()
