"""Fixtures that run commands of `finetune` in the test process, against a real API server. Each test has its own namespace.

No operator is running, so the tests write the status of their jobs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_cli import main, output
from ruamel.yaml import YAML

from localcluster import Endpoint
from tests.support.kubeapi import KubeApi

CRD_FILE = Path(__file__).parents[3] / "crds" / "finetunejobs.yaml"
numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as an integration test, because it needs the API server."""
    for item in items:
        if "tests/integration/cli" in str(item.path):
            item.add_marker("integration")


@dataclass(frozen=True)
class Result:
    """Exit code, standard output and standard error of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def api(control_plane: Endpoint) -> KubeApi:
    """Install the CRD, and return a client of the API server."""
    client = KubeApi(control_plane)
    crd = YAML(typ="safe").load(CRD_FILE.read_text(encoding="utf-8"))
    if client.find("customresourcedefinitions", None, crd["metadata"]["name"]) is None:
        client.create("customresourcedefinitions", None, crd)
    client.wait(
        "customresourcedefinitions", None, crd["metadata"]["name"],
        lambda installed: any(c["type"] == "Established" and c["status"] == "True" for c in (installed.get("status") or {}).get("conditions") or []),
    )  # fmt: skip
    return client


@pytest.fixture
def namespace(api: KubeApi) -> str:
    """Create a namespace for the test, and return its name."""
    name = f"cli-{next(numbers)}"
    api.create("namespaces", None, {"metadata": {"name": name}})
    return name


@pytest.fixture
def finetune(
    control_plane: Endpoint, namespace: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Return a function that runs a `finetune` command in the test's namespace."""
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*words: str, default_namespace: bool = True) -> Result:
        output.stdout_console.cache_clear()
        output.error_console.cache_clear()
        namespace_words = ["-n", namespace] if default_namespace else []
        capsys.readouterr()
        code = main.run([*words, *namespace_words], [])
        captured_output = capsys.readouterr()
        return Result(code, captured_output.out, captured_output.err)

    return run


@pytest.fixture
def job(api: KubeApi, namespace: str) -> Callable[..., dict[str, Any]]:
    """Return a function that creates a FineTuneJob and, if a status is given, writes this status."""

    def create_job(name: str = "bot", status: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
        body = {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name},
            "spec": {"model": {"source": "org/m"}, "dataset": {"train": "s3://data/t.jsonl"}, **spec},
        }
        created_object = api.create(names.PLURAL, namespace, body)
        return set_status(api, namespace, name, status) if status else created_object

    return create_job


def set_status(api: KubeApi, namespace: str, name: str, status: dict[str, Any]) -> dict[str, Any]:
    """Write the status of a job, as the operator would."""
    return api.patch(f"{names.PLURAL}/status", namespace, name, {"status": status})


def condition(condition_type: str, status: str = "True", reason: str = "R", message: str = "") -> dict[str, Any]:
    """Return a condition for a job's status."""
    time = "2026-01-01T00:00:00Z"
    return {
        "type": condition_type,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": time,
        "observedGeneration": 1,
    }
