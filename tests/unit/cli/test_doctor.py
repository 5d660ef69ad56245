"""The checks of `finetune doctor` that need no cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from finetune_cli import doctor
from finetune_cli.doctor import CheckName, CheckState, Doctor
from finetune_cli.installation import InstallationMissing


def run_checks(*checks: CheckName) -> list[Any]:
    return list(Doctor(None, skipped=frozenset(CheckName) - set(checks)).run())  # type: ignore[arg-type]  # these checks use no cluster


def test_skipped_checks_do_not_run_and_the_pools_are_read_without_the_check_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    read_namespaces: list[str | None] = []

    def find_installation(_cluster: Any, namespace: str | None) -> Any:
        read_namespaces.append(namespace)
        return SimpleNamespace(namespace="operators", config=SimpleNamespace(node_pools=[]))

    monkeypatch.setattr(doctor, "find_installation", find_installation)
    monkeypatch.setattr(doctor, "list_nodes", lambda _cluster: [{"status": {"allocatable": {"nvidia.com/gpu": "8"}}}])
    (result,) = run_checks(CheckName.POOLS)
    assert (result.check, result.state, result.message) == (CheckName.POOLS, CheckState.OK, "no node pools are configured; the nodes have 8 nvidia.com/gpu")
    assert read_namespaces == [None], "the configuration is read once"
    assert run_checks() == [] and read_namespaces == [None]


def test_a_missing_configuration_makes_the_pools_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_installation(_cluster: Any, _namespace: str | None) -> Any:
        raise InstallationMissing("no ConfigMap")

    monkeypatch.setattr(doctor, "find_installation", find_installation)
    (result,) = run_checks(CheckName.POOLS)
    assert (result.state, result.message) == (CheckState.UNKNOWN, "the operator's configuration cannot be read: no ConfigMap")
