"""Starts the torchelastic agent, which runs this pod's ranks."""

from __future__ import annotations

import os
import sys

from finetune_api.names import HUB_TOKEN, MLFLOW_CREDENTIALS, MONGODB_URI, WANDB_KEY, Env
from finetune_api.pod import RunConfig

from finetune_trainer.channel import SOCKET_VARIABLE
from finetune_trainer.processes import ChildProcess
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor.gang import StoreAddress

CREDENTIAL_VARIABLES = (Env.STORAGE_ACCESS_KEY, Env.STORAGE_SECRET_KEY, Env.STORAGE_SESSION_TOKEN, Env.STORAGE_CUSTOMER_KEY, HUB_TOKEN)
TRACKER_CREDENTIAL_VARIABLES = (WANDB_KEY, MONGODB_URI, *MLFLOW_CREDENTIALS)


def start_agent(run: RunConfig, settings: Settings, channel_address: str, store_address: StoreAddress | None = None) -> ChildProcess:
    """Start `finetune-trainer agent`.

    `channel_address`: path of the socket to which ranks report. `store_address`: the address at which this pod reaches the TCPStore of its gang. If
    `store_address` is None, the agents of several pods use the master address, and the agent of a single pod uses the loopback interface.
    """
    world = run.world
    address, port = "127.0.0.1", 0
    if store_address is not None:
        port = store_address.port
    elif world.nodes > 1:
        address, port = world.master_address, world.master_port
    command = [
        sys.executable, "-m", "finetune_trainer", "agent", "--nodes", str(world.nodes), "--processes",
        str(world.processes_per_node), "--node-rank", str(settings.node_rank), "--address", address, "--port", str(port),
        "--id", world.rendezvous_id, "--work", str(settings.work_folder),
    ]  # fmt: skip
    if world.nodes == 1:
        command += ["--local-address", address]
    listener = store_address.listener if store_address is not None else None
    if listener is None:
        return ChildProcess(command, build_rank_environment(run, settings, channel_address))
    with listener:  # Closes this process's copy of the socket; the agent has its own.
        descriptor = listener.fileno()
        return ChildProcess(
            [*command, "--store-fd", str(descriptor)], build_rank_environment(run, settings, channel_address), pass_fds=(descriptor,)
        )


def count_threads_per_rank(run: RunConfig) -> int:
    """Return the number of CPU threads for each rank: `OMP_NUM_THREADS` of the pod, or the pod's CPUs divided by its ranks."""
    configured_threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(configured_threads) if configured_threads.isdecimal() else max(1, len(os.sched_getaffinity(0)) // run.world.processes_per_node)


def build_rank_environment(run: RunConfig, settings: Settings, channel_address: str) -> dict[str, str]:
    """Return the environment of the agent and its ranks, without the credentials for storage, trackers and the push to the hub."""
    inherited_variables = {name: value for name, value in os.environ.items() if not name.endswith((*CREDENTIAL_VARIABLES, *TRACKER_CREDENTIAL_VARIABLES))}
    return {
        "OMP_NUM_THREADS": str(count_threads_per_rank(run)),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(settings.work_folder / "hub"),
        "PYTHONWARNINGS": "ignore::FutureWarning",  # Users cannot act on these warnings, because the image pins the libraries.
        **inherited_variables,
        SOCKET_VARIABLE: channel_address, Env.WORK_DIR: str(settings.work_folder), Env.RUN_FILE: str(settings.run_file),
        Env.INCARNATION_FOLDER: settings.incarnation(run), Env.NODE_RANK: str(settings.node_rank),
    }  # fmt: skip
