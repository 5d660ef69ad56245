"""Upload and download throughput of checkpoints, compared with boto3's transfer functions and obstore.

    python -m benchmarks.storage_throughput --megabytes 256 --rounds 5

Method. A real S3 server (SeaweedFS) shares this machine's cores with the client, so only ratios are meaningful.
Three clients transfer the same file one after the other, in a random order in each round: the trainer's `S3Store` (`put_file`, `download`), boto3
(`upload_file`, `download_file`) and, if installed, obstore (`put`, and `get` streamed to a file). Only the trainer's download also computes a
hash. Before an upload, the trainer hashes the file; this time is reported separately as `sha256`. The figures of a client are its median MB/s
over the rounds, its CPU seconds per GB (all threads of this process) and its largest memory increase (the kernel's high-water mark is reset
before each transfer). For each other client, one ratio is reported: the trainer's throughput divided by that client's. One more ratio divides
the trainer's throughput by that of the fastest other client in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from finetune_api.pod import StoreTarget
from finetune_trainer.file_entry import sha256_file
from finetune_trainer.storage.s3 import S3Store

from benchmarks import record
from benchmarks.lib.bench_pods import BUCKET, Workspace, open_workspace

DIRECTIONS = ("up", "down")
OTHER_CLIENTS = ("boto3", "obstore")


@dataclass(frozen=True)
class TransferCost:
    """The cost of one transfer: wall-clock time, CPU time, and increase of memory in bytes."""

    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int


def measure_transfer(transfer: Callable[[], object]) -> TransferCost:
    """Run `transfer` and measure its cost."""
    Path("/proc/self/clear_refs").write_text("5")
    memory_kib_before = _read_memory_kib("VmRSS")
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    transfer()
    return TransferCost(time.perf_counter() - wall_start, time.process_time() - cpu_start, (_read_memory_kib("VmHWM") - memory_kib_before) * 1024)


def _read_memory_kib(field_name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field_name))
    return int(line.split()[1])


def make_transfers(workspace: Workspace, source_file: Path, target_file: Path) -> dict[str, Callable[[], object]]:
    """Return the transfers to measure, by client and direction."""
    store = S3Store(StoreTarget(uri=f"s3://{BUCKET}/ours", endpoint=workspace.server.host_url))
    boto3_client = workspace.server.client()
    transfer_by_task: dict[str, Callable[[], object]] = {
        "ours up": lambda: store.put_file(source_file, "file"),
        "boto3 up": lambda: boto3_client.upload_file(str(source_file), BUCKET, "boto3/file"),
        "ours down": lambda: store.download("file", target_file),
        "boto3 down": lambda: boto3_client.download_file(BUCKET, "boto3/file", str(target_file)),
        "sha256": lambda: sha256_file(source_file),
    }
    if find_spec("obstore"):
        transfer_by_task |= _make_obstore_transfers(workspace, source_file, target_file)
    return transfer_by_task


def _make_obstore_transfers(workspace: Workspace, source_file: Path, target_file: Path) -> dict[str, Callable[[], object]]:
    import obstore

    server = workspace.server
    store = obstore.store.S3Store(
        BUCKET, endpoint=server.host_url, access_key_id=server.access_key, secret_access_key=server.secret_key,
        region=server.region, virtual_hosted_style_request=False, client_options={"allow_http": True},
    )  # fmt: skip

    def download() -> None:
        with target_file.open("wb") as writer:
            for chunk in obstore.get(store, "obstore/file").stream(min_chunk_size=8 * 1024 * 1024):
                writer.write(chunk)

    return {"obstore up": lambda: obstore.put(store, "obstore/file", source_file), "obstore down": download}


def measure_transfers(workspace: Workspace, megabytes: int, round_count: int) -> dict[str, object]:
    source_file, target_file = workspace.folder / "source", workspace.folder / "target"
    source_file.write_bytes(random.Random(0).randbytes(megabytes * 1_000_000))
    transfer_by_task = make_transfers(workspace, source_file, target_file)
    costs_by_task: dict[str, list[TransferCost]] = {task: [] for task in transfer_by_task}
    for round_number in range(round_count + 1):  # the first round warms up
        task_order = list(transfer_by_task)
        if round_number:
            random.Random(round_number).shuffle(task_order)
        for task in task_order:
            cost = measure_transfer(transfer_by_task[task])
            if round_number:
                costs_by_task[task].append(cost)
            print(f"round {round_number}  {task:<13} {megabytes / cost.wall_seconds:8.1f} MB/s", flush=True)
    return {"megabytes": megabytes, "rounds": round_count} | _compute_figures(costs_by_task, megabytes)


def _compute_figures(costs_by_task: dict[str, list[TransferCost]], megabytes: int) -> dict[str, object]:
    figures: dict[str, object] = {
        task: {
            "MBps": round(megabytes / statistics.median(cost.wall_seconds for cost in costs), 1),
            "cpuSecondsPerGB": round(statistics.median(cost.cpu_seconds for cost in costs) * 1000 / megabytes, 2),
            "mostMiBAbove": round(max(cost.memory_bytes for cost in costs) / 2**20, 1),
        }
        for task, costs in costs_by_task.items()
    }
    for direction in DIRECTIONS:
        our_costs = costs_by_task[f"ours {direction}"]
        costs_by_other_client = {name: costs_by_task[f"{name} {direction}"] for name in OTHER_CLIENTS if f"{name} {direction}" in costs_by_task}
        for name, other_client_costs in costs_by_other_client.items():
            ratios = [other_cost.wall_seconds / our_cost.wall_seconds for other_cost, our_cost in zip(other_client_costs, our_costs, strict=True)]
            figures[f"ratio {direction} to {name}"] = round(statistics.median(ratios), 3)
        seconds_by_other_client = ([cost.wall_seconds for cost in costs] for costs in costs_by_other_client.values())
        best_seconds_by_round = [min(seconds) for seconds in zip(*seconds_by_other_client, strict=True)]
        ratios_to_best = [best_seconds / our_cost.wall_seconds for best_seconds, our_cost in zip(best_seconds_by_round, our_costs, strict=True)]
        figures[f"ratio {direction} to the best"] = round(statistics.median(ratios_to_best), 3)
    return figures


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ.pop("AWS_ENDPOINT_URL", None)
    with open_workspace() as workspace:
        figures = measure_transfers(workspace, options.megabytes, options.rounds)
    print(json.dumps(figures, indent=1))
    print(record.write_result("storage_throughput", figures, method=record.extract_method(__doc__)))


if __name__ == "__main__":
    main()
