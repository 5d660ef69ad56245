"""A run that is killed again and again: does it end, is it exact, what is lost, how fast does it recover?

    python benchmarks/punisher.py --steps 2000 --every 20 --kills 1000 --seed 0

Method. Ranks that count steps instead of training (tests/pod/toy_rank.py) run below the real supervisor, agent, checkpoint
protocol and a real S3 server. A random victim (rank, agent, or the whole pod) is killed by SIGKILL, or the pod is asked to stop
by SIGTERM, at a random moment after the attempt's first step; the next attempt starts at once, as the operator would start it.
Goodput: seconds of steps that were kept over all seconds from first start to end. Recovery: from the kill to the next
attempt's first new step. At every restart all committed checkpoints are read back and compared with their manifests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/pod"), str(ROOT / "tests/support"), str(Path(__file__).resolve().parent)]

import record  # noqa: E402 - the path comes first
from finetune_api.pod import Resume, StoreTarget  # noqa: E402 - likewise
from finetune_trainer.checkpoint.restore import fetch_verified  # noqa: E402 - likewise
from finetune_trainer.checkpoint.tree import Tree  # noqa: E402 - likewise
from finetune_trainer.storage.roots import open_store  # noqa: E402 - likewise
from pod_harness import PYTHONPATH, UID, Pod, run_config, write_rows  # noqa: E402 - likewise
from tiny import make_tiny_model  # noqa: E402 - likewise

from localcluster.s3 import S3Process  # noqa: E402 - likewise

VICTIMS = ("rank", "agent", "pod", "stop")


def strike(pod: Pod, victim: str) -> None:
    """Kill, or ask to stop."""
    if victim == "pod":
        pod.kill()
    elif victim == "stop":
        pod.terminate()
    else:
        for pid in pod.pids("train" if victim == "rank" else "agent")[:1]:
            os.kill(pid, signal.SIGKILL)


def check(tree: Tree, folder: Path) -> int:
    """Newest committed step, after every committed checkpoint was compared with its manifest."""
    newest = 0
    for committed in tree.committed():
        manifest = tree.manifest(committed)
        assert manifest is not None, f"{committed.folder} is committed without its manifest"
        problem = fetch_verified(tree, committed.folder, manifest, folder / committed.folder, lambda path: True)
        assert problem is None, problem
        newest = max(newest, manifest.step)
    return newest


def main() -> None:
    """Punish and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds a step takes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name, S3Process(Path(name) / "s3") as server:
        folder = Path(name)
        os.environ |= {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        server.client().create_bucket(Bucket="punisher")
        target = StoreTarget(uri=f"s3://punisher/root/team/job/{UID}", endpoint=server.host_url)
        tree = Tree(open_store(target))
        spec = {
            "model": {"source": f"file://{make_tiny_model(folder / 'model')}"},
            "dataset": {"train": f"file://{write_rows(folder / 'rows.jsonl')}", "format": "messages"},
            "checkpoint": {"steps": options.every},
        }  # fmt: skip
        env = {
            "PYTHONPATH": os.pathsep.join([PYTHONPATH, str(ROOT / "tests/pod")]), "FINETUNE_TRAINER_MODULE": "toy_rank",
            "TOY_SCRIPT": json.dumps({"steps": options.steps, "every": options.every, "pause": options.pause}),
            "AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key,
        }  # fmt: skip
        began, struck_at, kills, attempt, newest = time.monotonic(), None, 0, 0, 0
        recoveries: list[float] = []
        lost: list[int] = []
        code = -1
        while code != 0:
            attempt += 1
            run = run_config(spec, target, attempt=attempt, resume=Resume(mode="auto", expect_step=newest))
            with Pod(run, folder / f"attempt-{attempt}", env) as pod:
                pod.wait_until(
                    lambda pod=pod, newest=newest: pod.step() > newest or pod.process.poll() is not None, 300
                )
                if struck_at is not None:
                    recoveries.append(time.monotonic() - struck_at)
                if kills < options.kills:
                    time.sleep(draw.uniform(0, 3 * options.every * options.pause))
                    seen, victim = pod.step(), draw.choice(VICTIMS)
                    struck_at = time.monotonic()
                    strike(pod, victim)
                    kills += 1
                code = pod.end(600)
                if code != 0:
                    newest = check(tree, folder / "check")
                    lost.append(max(0, seen - newest))
                    print(
                        f"kill {kills}: {victim:<5} at step {seen}, code {code}, committed {newest}, lost {lost[-1]}",
                        flush=True,
                    )
        seconds = time.monotonic() - began
        recoveries.sort()
        figures = {
            "steps": options.steps, "checkpointEvery": options.every, "kills": kills, "attempts": attempt, "seconds": round(seconds, 1),
            "goodput": round(options.steps * options.pause / seconds, 4),
            "recoverySeconds": {
                "p50": round(statistics.median(recoveries), 2) if recoveries else None,
                "p99": round(recoveries[int(0.99 * (len(recoveries) - 1))], 2) if recoveries else None,
            },
            "stepsLost": {"most": max(lost, default=0), "mean": round(statistics.mean(lost), 2) if lost else 0},
        }  # fmt: skip
        assert max(lost, default=0) <= 2 * options.every, "more than one interval and one upload was lost"
        print(figures)
        print(record.write("punisher", figures, method=(__doc__ or "").split("\n\n")[2]))


if __name__ == "__main__":
    main()
