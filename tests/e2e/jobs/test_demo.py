"""The demo on a real cluster, with a tiny model instead of the demo's own model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import demo
import pytest
from demo_clusters import DemoCluster
from parallel_steps import Step
from rich.console import Console

from localcluster import S3Endpoint
from tests.e2e.jobs.installation import ROOT, Installation
from tests.support.tiny import make_tiny_model


class RunningCluster(DemoCluster):
    """The cluster that all tests share. The demo must not start or stop this cluster."""

    name = "tests"

    def __init__(self, installation: Installation) -> None:
        self._installation = installation

    def steps(self) -> list[Step]:
        return []

    def up(self) -> None:
        """Do nothing, because the cluster already runs."""

    def down(self) -> None:
        """Do nothing, because other tests still use the cluster."""

    @property
    def kubeconfig(self) -> Path:
        return self._installation.cluster.kubeconfig

    @property
    def s3(self) -> S3Endpoint:
        return self._installation.cluster.s3

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self._installation.cluster.kubectl(*arguments, stdin=stdin)


@pytest.fixture
def borrowed_installation(installation: Installation) -> Iterator[Installation]:
    """The shared installation. After the test, the chart is installed again with the values that the other tests expect."""
    yield installation
    installation.install()


def test_the_demo_runs_to_its_end(
    borrowed_installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=128, layers=4)
    output_file = tmp_path / "out.txt"
    with output_file.open("w") as file:
        monkeypatch.setattr(demo, "console", Console(file=file, width=200))
        monkeypatch.setattr(demo, "ensure_model", lambda: model)
        demo.run_demo(RunningCluster(borrowed_installation))
    borrowed_installation.api.delete("namespaces", None, demo.NAMESPACE)
    text = output_file.read_text()
    for expected_text in (
        "kubectl apply -f examples/quickstart.yaml", "phase Running", "phase Succeeded", "100 % of the steps done",
        "quickstart   Succeeded   40/40 (100%)", "model/_COMMITTED", "checkpoints/step-00000040/_COMMITTED",
        *demo.UNSEEN_QUESTIONS,
    ):  # fmt: skip
        assert expected_text in text, text
    assert text.count("    tuned  ") == len(demo.UNSEEN_QUESTIONS)


def test_the_demo_refuses_a_second_cluster_with_one_line(installation: Installation) -> None:
    """Only one cluster with nodes can run on a machine. When the demo refuses to start a second one, it leaves the running cluster unchanged."""
    env = {**os.environ, "CLUSTER": "local", "KEEP": ""}
    completed_process = subprocess.run([sys.executable, ROOT / "scripts/demo.py"], env=env, capture_output=True, text=True)
    assert completed_process.returncode == 1
    assert [line for line in completed_process.stdout.splitlines() if line.startswith("demo: ")]
    assert "Traceback" not in completed_process.stdout + completed_process.stderr
    assert installation.api.list("nodes")
