"""The environment variables of agent and ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor.agent_process import _rank_environment

RUN: Any = SimpleNamespace(attempt=1, world=SimpleNamespace(processes_per_node=1))


def test_ranks_get_no_storage_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("KEPT", "seen")
    environment = _rank_environment(RUN, Settings.from_env(work=str(tmp_path)), "socket")
    assert environment["KEPT"] == "seen" and not [name for name in environment if "AWS_" in name and "ACCESS_KEY" in name]


def test_future_warnings_of_libraries_are_hidden_unless_the_user_sets_pythonwarnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    settings = Settings.from_env(work=str(tmp_path))
    assert _rank_environment(RUN, settings, "socket")["PYTHONWARNINGS"] == "ignore::FutureWarning"
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    assert _rank_environment(RUN, settings, "socket")["PYTHONWARNINGS"] == "default"
