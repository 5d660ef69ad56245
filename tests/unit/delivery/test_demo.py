"""The demo chooses a cluster, and shows the status of the FineTuneJob."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import demo
import demo_clusters
import pytest
from demo_view import Event, Snapshot, follow_job, render_panel
from finetune_api.names import Phase
from finetune_api.status import Failure, FineTuneJobStatus, Metrics, Progress, Workers
from parallel_steps import Commands
from rich.console import Console


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """Set an empty PATH, and remove the demo's environment variables."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in demo_clusters.CurrentCluster.required_variables:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch


def write_program(folder: Path, name: str, script: str = "exit 0") -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_unknown_cluster_is_refused() -> None:
    with pytest.raises(demo_clusters.NoCluster, match="^CLUSTER=minikube is unknown: set CLUSTER to kind, local or current"):
        demo_clusters.choose_cluster("minikube", keep_running=False)


def test_kind_is_chosen_if_docker_is_running(bare_machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("docker", "kubectl", "kind"):
        write_program(tmp_path, name)
    assert demo_clusters.choose_cluster("", keep_running=False).name == "kind"


def test_local_is_chosen_for_root_on_linux_without_docker(bare_machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_program(tmp_path, "docker", "exit 1")
    write_program(tmp_path, "go")
    bare_machine.setattr(sys, "platform", "linux")
    bare_machine.setattr(os, "geteuid", lambda: 0)
    assert demo_clusters.choose_cluster("", keep_running=False).name == "local"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_error_without_a_cluster_is_one_line(bare_machine: pytest.MonkeyPatch, platform: str) -> None:
    bare_machine.setattr(sys, "platform", platform)
    bare_machine.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(demo_clusters.NoCluster) as raised:
        demo_clusters.choose_cluster("", keep_running=False)
    assert "Docker is not running" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cluster_name", "message"),
    [
        ("kind", "CLUSTER=kind needs Docker"),
        ("local", "CLUSTER=local needs Go"),
        ("current", "CLUSTER=current needs kubectl"),
    ],
)
def test_cluster_without_its_requirements_is_refused(bare_machine: pytest.MonkeyPatch, cluster_name: str, message: str) -> None:
    bare_machine.setattr(sys, "platform", "linux")
    bare_machine.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(demo_clusters.NoCluster, match=f"^{message}"):
        demo_clusters.choose_cluster(cluster_name, keep_running=False)


def test_error_for_cluster_current_names_all_missing_variables(bare_machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_program(tmp_path, "kubectl")
    bare_machine.setenv("TRAINER_IMAGE", "r/t:1")
    with pytest.raises(demo_clusters.NoCluster) as raised:
        demo_clusters.choose_cluster("current", keep_running=False)
    assert "needs OPERATOR_IMAGE, S3_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY:" in str(raised.value)


def test_cluster_kind_builds_the_dockerfiles_of_the_project(bare_machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call_log = tmp_path / "calls"
    for name in ("docker", "kubectl", "kind"):
        write_program(tmp_path, name, f'echo "{name} $*" >> {call_log}')
    cluster = demo_clusters.choose_cluster("kind", keep_running=False)
    for step in cluster.steps():
        step.run(Commands(tmp_path / "logs"))
    root = demo_clusters.ROOT
    calls = call_log.read_text().splitlines()
    for name, file in (("operator", "operator/Dockerfile"), ("trainer", "trainer-image/Dockerfile")):
        assert f"docker build -q -f {root}/{file} -t localhost/finetune-{name}:dev {root}" in calls
    assert [call for call in calls if call.startswith("kind create cluster --name finetune-demo")]


@dataclass
class FakeJob:
    """A job whose `read` returns the given snapshots in order and then repeats the last snapshot."""

    snapshots: list[Snapshot]

    def read(self) -> Snapshot:
        return self.snapshots.pop(0) if len(self.snapshots) > 1 else self.snapshots[0]


def make_running_status(step: int) -> FineTuneJobStatus:
    return FineTuneJobStatus(
        observed_generation=1, phase=Phase.RUNNING, attempt=1, workers=Workers(ready=1, total=1, display="1/1"),
        progress=Progress(step=step, total_steps=40, percent=step * 100 // 40, display=f"{step}/40", eta="12s"),
        metrics=Metrics(train_loss=1.2345),
    )  # fmt: skip


EVENT = Event(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "TrainingStarted", "first step", is_warning=False)


def test_each_change_is_one_line_without_a_terminal() -> None:
    captured_stream = io.StringIO()
    done_status = FineTuneJobStatus(observed_generation=1, phase=Phase.SUCCEEDED)
    snapshots = [Snapshot(None, ()), Snapshot(make_running_status(10), (EVENT,)), Snapshot(make_running_status(11), (EVENT,)), Snapshot(done_status, (EVENT,))]
    last_snapshot = follow_job(FakeJob(snapshots), Console(file=captured_stream), timeout_seconds=60)
    assert last_snapshot.status == done_status
    lines = [line.strip() for line in captured_stream.getvalue().splitlines()]
    assert lines == [
        "phase Waiting for the operator",
        "phase Running",
        EVENT.line,
        "20 % of the steps done",
        "phase Succeeded",
    ]


def test_view_times_out_if_the_job_does_not_finish() -> None:
    with pytest.raises(TimeoutError, match="the job has not finished within 0 s; its phase is Running"):
        follow_job(FakeJob([Snapshot(make_running_status(1), ())]), Console(file=io.StringIO()), timeout_seconds=0)


def test_live_view_shows_phase_progress_loss_and_events() -> None:
    captured_stream = io.StringIO()
    Console(file=captured_stream, width=100).print(render_panel(Snapshot(make_running_status(10), (EVENT,)), 3.0))
    for text in ("Running", "attempt 1", "1/1 pods ready", "10/40", "loss 1.234", "ready in 12s", "TrainingStarted"):
        assert text in captured_stream.getvalue()


def test_failed_job_ends_the_demo_with_its_failure() -> None:
    failure = Failure.model_validate({"class": "Data", "code": "DatasetEmpty", "message": "0 rows", "hint": "add rows"})
    snapshot = Snapshot(FineTuneJobStatus(observed_generation=1, phase=Phase.FAILED, failure=failure), ())
    with pytest.raises(demo.DemoFailed, match="^the job is Failed: DatasetEmpty: 0 rows add rows$"):
        demo.check_success(snapshot)


@pytest.mark.parametrize(
    ("reference", "chart_values"),
    [
        ("localhost/t:dev", ("localhost/t", "dev", "")),
        ("host:5000/t", ("host:5000/t", "latest", "")),
        ("host:5000/t:1@sha256:ab", ("host:5000/t", "1", "sha256:ab")),
    ],
)
def test_image_references_become_chart_values(reference: str, chart_values: tuple[str, str, str]) -> None:
    assert tuple(demo.split_image_reference(reference).values()) == chart_values
