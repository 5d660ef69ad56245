"""The agent: torchelastic's launcher in a process of ours, so that the real exit codes of ranks are seen.

`torchrun` ends with 1 whatever happened. Here each failed rank's code is written to `<work>/agent.json`, which the supervisor
reads. Nothing is restarted: one attempt is one gang, and the operator starts the next.

A single rank has nobody to meet: it is started at once, without torch in this process, which saves seconds of every such run.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from finetune_trainer.supervisor.children import die_with_parent

RESULT = "agent.json"
RENDEZVOUS_SECONDS = 1800
MONITOR_SECONDS = 0.05
SHUTDOWN_SECONDS = 5
"""After one rank failed the others get SIGTERM, and SIGKILL so much later."""
COMMAND = [sys.executable, "-u", "-m", "finetune_trainer", "train"]
Failures = dict[str, dict[str, int]]
"""By rank: how it failed."""


def main(arguments: list[str]) -> int:
    """Run the ranks of this pod; 0 if all ended with 0."""
    die_with_parent()
    options = _parse(arguments)
    failures = _alone() if options.nodes * options.processes == 1 else _gang(options)
    _write(options.work, failures)
    return 1 if failures else 0


def _alone() -> Failures:
    """The only rank, as a child."""
    rank = subprocess.Popen(COMMAND)
    code = rank.wait()
    return {"0": {"exitCode": code, "pid": rank.pid, "time": int(time.time())}} if code else {}


def _gang(options: argparse.Namespace) -> Failures:
    """This pod's part of several ranks, by torchelastic."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    port = options.port or free_port()
    config = LaunchConfig(
        min_nodes=options.nodes, max_nodes=options.nodes, nproc_per_node=options.processes, run_id=options.id,
        role="trainer", rdzv_backend="static", rdzv_endpoint=f"{options.address}:{port}",
        rdzv_configs={"rank": options.node_rank, "timeout": RENDEZVOUS_SECONDS}, max_restarts=0,
        monitor_interval=MONITOR_SECONDS, start_method="spawn", logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=SHUTDOWN_SECONDS, local_addr=options.local_address,
    )  # fmt: skip
    try:
        elastic_launch(config, COMMAND[0])(*COMMAND[1:])
    except ChildFailedError as error:
        return {str(rank): _told(failure) for rank, failure in error.failures.items()}
    return {}


def _told(failure: Any) -> dict[str, int]:
    return {"exitCode": int(failure.exitcode), "pid": int(failure.pid), "time": int(failure.timestamp)}


def _write(work: Path, failures: Failures) -> None:
    beside = work / f".{RESULT}"
    beside.write_text(json.dumps({"failures": failures, "time": time.time()}))
    beside.rename(work / RESULT)


def read_result(work: Path) -> dict[int, int] | None:
    """Exit code by rank of the ranks that failed; None if the agent did not come to write it."""
    try:
        value = json.loads((work / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return {int(rank): int(one["exitCode"]) for rank, one in value["failures"].items()}


def free_port() -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune-trainer agent")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--local-address", default=None)
    parser.add_argument("--id", required=True)
    parser.add_argument("--work", type=Path, required=True)
    return parser.parse_args(arguments)
