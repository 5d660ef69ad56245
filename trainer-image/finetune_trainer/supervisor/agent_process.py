"""Starts the agent, which runs this pod's ranks."""

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
TRACKER_CREDENTIALS = (WANDB_KEY, MONGODB_URI, *MLFLOW_CREDENTIALS)


def start_agent(run: RunConfig, settings: Settings, channel_address: str, store: StoreAddress | None = None) -> ChildProcess:
    """Start `finetune-trainer agent`.

    `channel_address`: the socket that ranks report to. `store`: where this pod reaches the TCPStore of its gang. If it is None,
    the agents of a gang use the master address, and the agent of a single pod uses the loopback interface.
    """
    world = run.world
    address, port = "127.0.0.1", 0
    if store is not None:
        port = store.port
    elif world.nodes > 1:
        address, port = world.master_address, world.master_port
    command = [
        sys.executable, "-m", "finetune_trainer", "agent", "--nodes", str(world.nodes), "--processes",
        str(world.processes_per_node), "--node-rank", str(settings.node_rank), "--address", address, "--port", str(port),
        "--id", world.rendezvous_id, "--work", str(settings.work),
    ]  # fmt: skip
    if world.nodes == 1:
        command += ["--local-address", address]
    listener = store.listener if store is not None else None
    if listener is None:
        return ChildProcess(command, rank_environment(run, settings, channel_address))
    with listener:  # the agent gets a copy of the socket
        descriptor = listener.fileno()
        return ChildProcess(
            [*command, "--store-fd", str(descriptor)], rank_environment(run, settings, channel_address), pass_fds=(descriptor,)
        )


def threads_per_rank(run: RunConfig) -> int:
    """Return the number of CPU threads for each rank: `OMP_NUM_THREADS` of the pod, or the pod's CPUs divided by its ranks."""
    configured = os.environ.get("OMP_NUM_THREADS", "")
    return int(configured) if configured.isdecimal() else max(1, len(os.sched_getaffinity(0)) // run.world.processes_per_node)


def rank_environment(run: RunConfig, settings: Settings, channel_address: str) -> dict[str, str]:
    """Return the environment of agent and ranks. It has no credentials for storage, trackers and the hub push, because ranks do not access these."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith((*CREDENTIAL_VARIABLES, *TRACKER_CREDENTIALS))}
    return {
        "OMP_NUM_THREADS": str(threads_per_rank(run)),
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(settings.work / "hub"),
        "PYTHONWARNINGS": "ignore::FutureWarning",  # Users cannot act on these warnings, because the image pins the libraries.
        **inherited,
        SOCKET_VARIABLE: channel_address, Env.WORK_DIR: str(settings.work), Env.RUN_FILE: str(settings.run_file),
        Env.INCARNATION_FOLDER: settings.incarnation(run), Env.NODE_RANK: str(settings.node_rank),
    }  # fmt: skip
