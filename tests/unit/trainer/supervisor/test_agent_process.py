"""The command and the environment with which the agent is started."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor import agent_process as subject
from finetune_trainer.supervisor.agent_process import build_rank_environment
from finetune_trainer.supervisor.gang import StoreAddress

RUN: Any = SimpleNamespace(attempt=1, world=SimpleNamespace(processes_per_node=1))


def test_ranks_get_no_credentials_of_storage_and_hub_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_HUB_TOKEN", "hidden")
    monkeypatch.setenv("MODEL_AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("KEPT", "seen")
    environment = build_rank_environment(RUN, Settings.from_env(work_folder=str(tmp_path)), "socket")
    assert "hidden" not in environment.values()
    assert environment["KEPT"] == "seen" and not [name for name in environment if "AWS_" in name and "ACCESS_KEY" in name]


def test_future_warnings_of_libraries_are_hidden_unless_the_user_sets_pythonwarnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    settings = Settings.from_env(work_folder=str(tmp_path))
    assert build_rank_environment(RUN, settings, "socket")["PYTHONWARNINGS"] == "ignore::FutureWarning"
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    assert build_rank_environment(RUN, settings, "socket")["PYTHONWARNINGS"] == "default"


class RecordedProcess:
    """Starts no process, but records the command and the environment of the process to start."""

    def __init__(self, command: list[str], environment: dict[str, str], *, pass_fds: tuple[int, ...] = ()) -> None:
        self.command, self.environment, self.pass_fds = command, environment, pass_fds

    def get_option(self, name: str) -> str | None:
        return self.command[self.command.index(name) + 1] if name in self.command else None


@pytest.mark.parametrize(
    ("node_count", "address", "port", "local_address"), [(1, "127.0.0.1", "0", "127.0.0.1"), (2, "rank-0.host", "29400", None)]
)
def test_the_agent_meets_other_nodes_at_the_master_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node_count: int, address: str, port: str, local_address: str | None
) -> None:
    monkeypatch.setattr(subject, "ChildProcess", RecordedProcess)
    world = SimpleNamespace(nodes=node_count, processes_per_node=3, master_address="rank-0.host", master_port=29400, rendezvous_id="r")
    agent: Any = subject.start_agent(SimpleNamespace(attempt=1, world=world), Settings.from_env(work_folder=str(tmp_path)), "socket")  # type: ignore[arg-type] # a fake run
    options = ("--nodes", "--processes", "--address", "--port", "--local-address")
    assert [agent.get_option(name) for name in options] == [str(node_count), "3", address, port, local_address]


@pytest.mark.parametrize("has_store", [True, False])
def test_the_agent_of_a_protected_gang_uses_the_loopback_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_store: bool) -> None:
    """The agent of rank 0's pod also gets the bound socket of the store."""
    monkeypatch.setattr(subject, "ChildProcess", RecordedProcess)
    world = SimpleNamespace(nodes=2, processes_per_node=3, master_address="rank-0.host", master_port=29400, rendezvous_id="r")
    listener = socket.create_server(("127.0.0.1", 0)) if has_store else None
    descriptor = listener.fileno() if listener else None
    run: Any = SimpleNamespace(attempt=1, world=world)
    agent: Any = subject.start_agent(run, Settings.from_env(work_folder=str(tmp_path)), "socket", StoreAddress(4711, listener))
    assert [agent.get_option(name) for name in ("--address", "--port", "--local-address")] == ["127.0.0.1", "4711", None]
    assert (agent.get_option("--store-fd"), agent.pass_fds) == ((str(descriptor), (descriptor,)) if has_store else (None, ()))
    assert listener is None or listener.fileno() == -1  # Only the agent has the socket now.


@pytest.mark.parametrize(("rank_count", "thread_count"), [(1, "8"), (3, "2"), (8, "1"), (16, "1")])
def test_ranks_share_the_cpus_of_the_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_count: int, thread_count: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(subject.os, "sched_getaffinity", lambda pid: set(range(8)))
    run: Any = SimpleNamespace(attempt=1, world=SimpleNamespace(processes_per_node=rank_count))
    assert build_rank_environment(run, Settings.from_env(work_folder=str(tmp_path)), "socket")["OMP_NUM_THREADS"] == thread_count
