"""Fixtures of the operator's integration tests: one control plane for all tests, one operator process per module, one namespace per test."""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from localcluster import Endpoint
from tests.integration.operator.rig import Heartbeat, Operator, Progress, Rig, install_crd, open_rig

CRD_FILE = Path(__file__).parents[3] / "crds" / "finetunejobs.yaml"
numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as an integration test, because it needs the API server."""
    for item in items:
        if "tests/integration/operator" in str(item.path):
            item.add_marker("integration")


@pytest.fixture(scope="session")
def endpoint_with_crd(control_plane: Endpoint) -> Iterator[Endpoint]:
    """A control plane with the installed CRD and a node that stays Ready."""
    install_crd(control_plane, CRD_FILE)
    heartbeat = Heartbeat(control_plane)
    yield control_plane
    heartbeat.close()


@pytest.fixture(scope="session")
def progress() -> Iterator[Progress]:
    """One HTTP server that replaces the progress servers of all pods."""
    server = Progress()
    yield server
    server.close()


@pytest.fixture(scope="session")
def config(progress: Progress) -> dict[str, object]:
    """A configuration of the operator with short intervals and two node pools."""
    return {
        "trainer": {"image": "registry.example.com/trainer:1"},
        "http": {"host": "127.0.0.1", "port": 0},
        "scrape": {"url": progress.url, "intervalSeconds": 0.2, "startingIntervalSeconds": 0.1},
        "progressSeconds": 0.2,
        "lostNodeSeconds": 1,
        "retry": {"baseSeconds": 0.2, "maxSeconds": 1},
        "log": {"level": "debug"},
        "workers": 4,
        "nodePools": [
            {"name": "h100", "default": True, "gpusPerNode": 8, "nodeSelector": {"gpu": "h100"}},
            {"name": "mig", "gpusPerNode": 7, "gpuResource": "nvidia.com/mig-1g.10gb"},
        ],
    }


@pytest.fixture(scope="module")
def operator(
    endpoint_with_crd: Endpoint, config: dict[str, object], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Operator]:
    """A running operator. The operator stops at the end of the module, because tests in other folders run their own operators on the same API server."""
    running_operator = Operator(tmp_path_factory.mktemp("operator"), endpoint_with_crd.kubeconfig, config)
    running_operator.start()
    yield running_operator
    code = running_operator.stop()
    log = running_operator.log.read_text()
    assert code == 0, log[-3000:]
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]


@pytest.fixture
async def world_without_operator(endpoint_with_crd: Endpoint, progress: Progress, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """A namespace without an operator, for a test that starts its own operator."""
    async with open_rig(endpoint_with_crd, _make_namespace_name(request), progress) as rig:
        yield rig


@pytest.fixture
async def world(operator: Operator, world_without_operator: Rig) -> Rig:
    """A namespace whose jobs the module's operator reconciles."""
    return world_without_operator


def _make_namespace_name(request: pytest.FixtureRequest) -> str:
    test_name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower().removeprefix("test_"))
    return f"{test_name[:40].strip('-')}-{next(numbers)}"
