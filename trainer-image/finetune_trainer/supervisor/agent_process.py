"""Starts the agent, which runs this pod's ranks."""

from __future__ import annotations

import os
import sys

from finetune_api.names import HUB_TOKEN, MLFLOW_CREDENTIALS, MONGODB_URI, WANDB_KEY, Env
from finetune_api.pod import RunConfig

from finetune_trainer.channel import SOCKET_VARIABLE
from finetune_trainer.processes import ChildProcess
from finetune_trainer.settings import Settings

CREDENTIAL_VARIABLES = (Env.STORAGE_ACCESS_KEY, Env.STORAGE_SECRET_KEY, Env.STORAGE_SESSION_TOKEN, Env.STORAGE_CUSTOMER_KEY, HUB_TOKEN)
TRACKER_CREDENTIALS = (WANDB_KEY, MONGODB_URI, *MLFLOW_CREDENTIALS)


def start_agent(run: RunConfig, settings: Settings, channel_address: str) -> ChildProcess:
    """Start `finetune-trainer agent`. `channel_address`: the socket that ranks report to."""
    world, several_nodes = run.world, run.world.nodes > 1
    command = [
        sys.executable, "-m", "finetune_trainer", "agent", "--nodes", str(world.nodes), "--processes",
        str(world.processes_per_node), "--node-rank", str(settings.node_rank), "--address",
        world.master_address if several_nodes else "127.0.0.1", "--port", str(world.master_port if several_nodes else 0),
        "--id", world.rendezvous_id, "--work", str(settings.work),
    ]  # fmt: skip
    if not several_nodes:
        command += ["--local-address", "127.0.0.1"]
    return ChildProcess(command, rank_environment(run, settings, channel_address))


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
