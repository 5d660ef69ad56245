"""How fast checkpoints go to S3 and come back, against boto3's own transfer functions on the same file in the same run.

    python benchmarks/storage_throughput.py --megabytes 256 --rounds 5

Method. A real S3 server (SeaweedFS) runs on this machine and shares its cores with the client, so that only ratios mean
anything. Ours (`S3Store.put_file`, `download` with its hash) and boto3's `upload_file`, `download_file` take turns in every
round, in alternating order. Hashing is part of our download and, for uploads, reported apart (`sha256`), since it happens
before. Figures: median over rounds of MB/s, the ratio of ours to boto3's, and client CPU seconds per GB.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import record  # noqa: E402 - the path comes first
from finetune_api.pod import StoreTarget  # noqa: E402 - likewise
from finetune_trainer.storage.base import sha256_file  # noqa: E402 - likewise
from finetune_trainer.storage.s3 import S3Store  # noqa: E402 - likewise

from localcluster.s3 import S3Process  # noqa: E402 - likewise


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure and write down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, S3Process(Path(name) / "s3") as server:
        os.environ |= {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        server.client().create_bucket(Bucket="throughput")
        source, target = Path(name) / "source", Path(name) / "target"
        source.write_bytes(random.Random(0).randbytes(options.megabytes * 1_000_000))
        store = S3Store(StoreTarget(uri="s3://throughput/ours", endpoint=server.host_url))
        plain = server.client()
        tasks: dict[str, Callable[[], object]] = {
            "ours up": lambda: store.put_file(source, "file"),
            "boto3 up": lambda: plain.upload_file(str(source), "throughput", "plain"),
            "ours down": lambda: store.download("file", target),
            "boto3 down": lambda: plain.download_file("throughput", "plain", str(target)),
            "sha256": lambda: sha256_file(source),
        }
        found: dict[str, list[tuple[float, float]]] = {task: [] for task in tasks}
        for number in range(options.rounds + 1):  # the first warms up
            order = list(tasks) if number % 2 else ["boto3 up", "ours up", "boto3 down", "ours down", "sha256"]
            for task in order:
                result = timed(tasks[task])
                if number:
                    found[task].append(result)
                print(f"round {number}  {task:<11} {options.megabytes / result[0]:8.1f} MB/s")
    figures: dict[str, object] = {"megabytes": options.megabytes, "rounds": options.rounds}
    for task, results in found.items():
        figures[task] = {
            "MBps": round(options.megabytes / statistics.median(wall for wall, _ in results), 1),
            "cpuSecondsPerGB": round(statistics.median(cpu for _, cpu in results) * 1000 / options.megabytes, 2),
        }
    for way in ("up", "down"):
        pairs = zip(found[f"boto3 {way}"], found[f"ours {way}"], strict=True)
        figures[f"ratio {way}"] = round(statistics.median(theirs[0] / ours[0] for theirs, ours in pairs), 3)
    print(figures)
    print(record.write("storage_throughput", figures, method=(__doc__ or "").split("\n\n")[2]))


if __name__ == "__main__":
    main()
