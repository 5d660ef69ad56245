"""Runs the ranks of one pod with the launcher of torchelastic. This process is called the agent.

The agent writes the exit code of each failed rank to a file for the supervisor (`agent_result`), because `torchrun` exits with
1 for every failure. The agent does not restart ranks: a failed rank ends the attempt, and the operator starts the next attempt.

If the run has only one rank, the agent starts it directly, because a single rank needs no rendezvous. The agent then need not import torch, which
takes seconds.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from finetune_api.names import ExitCode

from finetune_trainer.agent_result import FailuresByRank, write_failures
from finetune_trainer.failure import installation_error
from finetune_trainer.processes import die_with_parent

RENDEZVOUS_TIMEOUT_SECONDS = 1800
MONITOR_INTERVAL_SECONDS = 0.05
SHUTDOWN_TIMEOUT_SECONDS = 5
"""Seconds between SIGTERM and SIGKILL for the remaining ranks after one rank has failed."""
RANK_COMMAND = [sys.executable, "-u", "-m", "finetune_trainer", "train"]


def main(arguments: list[str]) -> int:
    """Run the ranks of this pod. Returns 0 if all ranks ended with exit code 0, 78 if the image lacks a package or a library, else 1."""
    die_with_parent()
    options = _parse_arguments(arguments)
    try:
        failures_by_rank = _run_single_rank() if options.nodes * options.processes == 1 else _run_ranks(options)
    except (ImportError, OSError) as error:
        if installation_error(error) is None:
            raise
        traceback.print_exc()
        return ExitCode.INSTALLATION_BROKEN
    write_failures(options.work, failures_by_rank)
    return 1 if failures_by_rank else 0


def _run_single_rank() -> FailuresByRank:
    rank_process = subprocess.Popen(RANK_COMMAND)
    exit_code = rank_process.wait()
    return {"0": {"exitCode": exit_code, "pid": rank_process.pid, "time": int(time.time())}} if exit_code else {}


def _run_ranks(options: argparse.Namespace) -> FailuresByRank:
    """Run this pod's ranks with torchelastic."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    listener = _open_store_listener(options)
    port = options.port if listener is None else int(listener.getsockname()[1])
    backend = "static"
    if listener is not None:
        from finetune_trainer.rendezvous import register_loopback_rendezvous

        backend = register_loopback_rendezvous(listener)
    config = LaunchConfig(
        min_nodes=options.nodes, max_nodes=options.nodes, nproc_per_node=options.processes, run_id=options.id,
        role="trainer", rdzv_backend=backend, rdzv_endpoint=f"{options.address}:{port}",
        rdzv_configs={"rank": options.node_rank, "timeout": RENDEZVOUS_TIMEOUT_SECONDS}, max_restarts=0,
        monitor_interval=MONITOR_INTERVAL_SECONDS, start_method="spawn", logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=SHUTDOWN_TIMEOUT_SECONDS, local_addr=options.local_address,
    )  # fmt: skip
    try:
        elastic_launch(config, RANK_COMMAND[0])(*RANK_COMMAND[1:])
    except ChildFailedError as error:
        return {str(rank): _failure_to_json(failure) for rank, failure in error.failures.items()}
    return {}


def _open_store_listener(options: argparse.Namespace) -> socket.socket | None:
    """Return the loopback socket for the TCPStore that this agent creates.

    None if another pod creates the store, or if the operator is too old to give the gang a secret. Without a secret, the store listens on all interfaces.
    """
    if options.store_fd is not None:
        return socket.socket(fileno=options.store_fd)
    return socket.create_server(("127.0.0.1", 0)) if options.nodes == 1 else None


def _failure_to_json(failure: Any) -> dict[str, int]:
    return {"exitCode": int(failure.exitcode), "pid": int(failure.pid), "time": int(failure.timestamp)}


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finetune-trainer agent")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--node-rank", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--local-address", default=None)
    parser.add_argument("--store-fd", type=int, default=None, help="bound socket for the TCPStore, on the pod of rank 0")
    parser.add_argument("--id", required=True)
    parser.add_argument("--work", type=Path, required=True)
    return parser.parse_args(arguments)
