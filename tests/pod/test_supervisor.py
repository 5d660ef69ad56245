"""The supervisor of toy ranks, which only count steps: exit codes, termination messages, stalls, stops, and the end of all processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from finetune_api.names import FailureClass
from finetune_api.pod import ResumeConfig, StoreTarget, TerminationMessage
from pod_harness import PYTHONPATH, UID, Pod, merge, run_config

TESTS_FOLDER = Path(__file__).parent


@pytest.fixture
def spec(model: Path, rows: Path) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{model}"}, "dataset": {"train": f"file://{rows}", "format": "messages"},
        "checkpoint": {"steps": 5}, "policy": {"stallTimeoutSeconds": 600},
    }  # fmt: skip


def make_toy_pod(
    folder: Path,
    spec: dict[str, Any],
    script: dict[str, Any],
    *,
    env: dict[str, str] | None = None,
    name: str = "pod",
    **run: Any,
) -> Pod:
    """Create a pod whose ranks follow a script of `toy_rank` and whose storage is a local folder."""
    config = run_config(spec, StoreTarget(uri=f"file://{folder}/root/team/job/{UID}"), **run)
    python_path = os.pathsep.join([PYTHONPATH, str(TESTS_FOLDER)])
    toy_variables = {"PYTHONPATH": python_path, "FINETUNE_TRAINER_MODULE": "toy_rank", "TOY_SCRIPT": json.dumps(script)}
    return Pod(config, folder / name, toy_variables | (env or {}))


def list_committed_steps(folder: Path) -> list[int]:
    """Return the steps of all committed checkpoints, in ascending order."""
    markers = (folder / "root/team/job" / UID / "checkpoints").glob("step-*/_COMMITTED")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in markers)


def wait_for_exit(pod: Pod) -> tuple[int, TerminationMessage]:
    """Wait until the pod ends. Returns its exit code and its termination message."""
    exit_code = pod.end()
    termination = pod.termination_message()
    assert termination.exit_code == exit_code, pod.text[-3000:]
    return exit_code, termination


def test_a_finished_run_commits_its_model(tmp_path: Path, spec: dict[str, Any]) -> None:
    with make_toy_pod(tmp_path, spec, {}) as pod:
        code, termination = wait_for_exit(pod)
    assert code == 0, pod.text[-3000:]
    assert termination.output is not None and termination.output.uri is not None and termination.output.kind == "adapter"
    folder = Path(termination.output.uri.removeprefix("file://"))
    assert (folder / "adapter_model.safetensors").read_text() == "final 20"
    assert (termination.step, termination.committed_step, termination.class_, termination.code) == (20, 20, None, None)
    assert list_committed_steps(tmp_path) == [10, 15, 20]
    assert not list(pod.folder.glob("work/output/checkpoint-*")), "uploaded checkpoints are still on the pod's disk"
    assert not list(pod.folder.glob("work/staged/*"))


@pytest.mark.parametrize(
    ("event", "expected_exit_code", "error_code", "failure_class"),
    [
        ("bad-data", 65, "NoTrainableToken", FailureClass.DATA),
        ("diverge", 72, "LossNotFinite", FailureClass.DIVERGED),
        ("out-of-memory", 71, "HostMemory", FailureClass.OUT_OF_MEMORY),
        ("die", 74, "RankKilled", FailureClass.INFRASTRUCTURE),
        ("exit", 70, "RankCrashed", FailureClass.INTERNAL),
        ("crash", 70, "TrainerCrashed", FailureClass.INTERNAL),
    ],
)
def test_a_failing_rank_is_named_in_the_termination_message(
    tmp_path: Path, spec: dict[str, Any], event: str, expected_exit_code: int, error_code: str, failure_class: FailureClass
) -> None:
    with make_toy_pod(tmp_path, spec, {"at": {"0:7": event}}) as pod:
        exit_code, termination = wait_for_exit(pod)
    assert (exit_code, termination.code, termination.class_, termination.rank, termination.origin) == (expected_exit_code, error_code, failure_class, 0, True)
    assert list_committed_steps(tmp_path) == [5] and termination.committed_step == 5
    assert len((pod.folder / "termination-message").read_bytes()) <= 4096


def test_the_termination_message_names_the_rank_that_failed_first(tmp_path: Path, spec: dict[str, Any]) -> None:
    script = {"at": {"0:7": "lose-peer", "1:9": "diverge"}, "pause": 0.02}
    with make_toy_pod(tmp_path, spec, script, processes=2) as pod:
        code, termination = wait_for_exit(pod)
    assert (code, termination.code, termination.rank) in [(72, "LossNotFinite", 1), (74, "PeerLost", 0)]
    if termination.rank == 0:  # rank 1 was killed before it reported its failure, so only the report of rank 0 exists
        assert termination.origin is False


def test_a_huge_log_does_not_damage_the_termination_message(tmp_path: Path, spec: dict[str, Any]) -> None:
    with make_toy_pod(tmp_path, spec, {"at": {"0:3": "shout"}}) as pod:
        code, termination = wait_for_exit(pod)
    assert (code, termination.code) == (70, "TrainerCrashed")
    assert (pod.folder / "log").stat().st_size > 100_000_000


def test_a_frozen_rank_is_reported_as_a_stall(tmp_path: Path, spec: dict[str, Any]) -> None:
    quick = merge(spec, {"policy": {"stallTimeoutSeconds": 2}})
    with make_toy_pod(tmp_path, quick, {"at": {"0:7": "freeze"}}) as pod:
        code, termination = wait_for_exit(pod)
    assert (code, termination.code, termination.class_) == (74, "Stalled", FailureClass.INFRASTRUCTURE)
    assert "after step 6" in (termination.message or "")


def test_a_rank_that_hangs_while_it_loads_is_reported_as_a_stall(tmp_path: Path, spec: dict[str, Any]) -> None:
    quick = merge(spec, {"policy": {"stallTimeoutSeconds": 2}})
    with make_toy_pod(tmp_path, quick, {"at": {"import:0": "hang"}}) as pod:
        code, termination = wait_for_exit(pod)
    assert (code, termination.code, termination.class_) == (74, "Stalled", FailureClass.INFRASTRUCTURE)
    assert "while loading model and data: the ranks neither compute nor read" in (termination.message or "")
    assert "toy_rank.py" in pod.text and "in preload" in pod.text


def test_a_hanging_rank_leaves_its_stacks_in_the_log(tmp_path: Path, spec: dict[str, Any]) -> None:
    quick = merge(spec, {"policy": {"stallTimeoutSeconds": 2}})
    with make_toy_pod(tmp_path, quick, {"at": {"0:7": "hang"}}) as pod:
        code, termination = wait_for_exit(pod)
    assert (code, termination.code) == (74, "Stalled")
    assert "toy_rank.py" in pod.text and "in run_scripted_event" in pod.text


def test_a_stop_saves_and_the_next_attempt_resumes(tmp_path: Path, spec: dict[str, Any]) -> None:
    script = {"steps": 2000, "every": 1000, "pause": 0.005}
    with make_toy_pod(tmp_path, spec, script) as pod:
        pod.wait_step(10)
        pod.terminate()
        code, termination = wait_for_exit(pod)
    assert (code, termination.class_, termination.code) == (75, FailureClass.PREEMPTED, "StoppedSaved")
    assert termination.step == termination.committed_step and list_committed_steps(tmp_path) == [termination.step]
    resumed_script = {"steps": termination.step + 5, "every": 1000}
    with make_toy_pod(tmp_path, spec, resumed_script, name="two", attempt=2, resume=ResumeConfig(mode="auto", expect_step=termination.step)) as pod:
        code, second_termination = wait_for_exit(pod)
    assert (code, second_termination.resumed_from_step) == (0, termination.step)


def test_a_stop_before_the_first_step_loses_nothing(tmp_path: Path, spec: dict[str, Any]) -> None:
    with make_toy_pod(tmp_path, spec, {"at": {"import:0": "hang"}}) as pod:
        pod.wait_until(lambda: bool(pod.pids("train")))
        pod.terminate()
        code, termination = wait_for_exit(pod)
    assert (code, termination.code) == (75, "StoppedSaved")


def test_a_stop_during_the_imports_is_not_lost(tmp_path: Path, spec: dict[str, Any]) -> None:
    """The supervisor also obeys a SIGTERM that arrives while it still imports its modules."""
    with make_toy_pod(tmp_path, spec, {"steps": 100000}) as pod:
        assert pod.process is not None
        status_file = Path(f"/proc/{pod.process.pid}/status")

        def handles_sigterm() -> bool:
            mask = next(line for line in status_file.read_text().splitlines() if line.startswith("SigCgt"))
            return bool(int(mask.split()[1], 16) >> (signal.SIGTERM - 1) & 1)

        pod.wait_until(handles_sigterm)
        pod.terminate()
        code, termination = wait_for_exit(pod)
    assert (code, termination.code, termination.step) == (75, "StoppedSaved", None)


def test_a_second_ctrl_c_ends_the_pod_without_waiting(tmp_path: Path, spec: dict[str, Any]) -> None:
    with make_toy_pod(tmp_path, spec, {"at": {"0:7": "hang"}}, grace=3600) as pod:
        pod.wait_step(6)
        assert pod.process is not None
        pod.process.send_signal(signal.SIGINT)
        pod.wait_until(lambda: (pod.folder / "work" / "stop").exists())
        pod.process.send_signal(signal.SIGINT)
        code, _ = wait_for_exit(pod)
    assert code == 76


def test_a_stop_that_exceeds_the_grace_period_ends_without_a_checkpoint(tmp_path: Path, spec: dict[str, Any]) -> None:
    """The rank hangs until the grace period ends. The pod exits with 76 and leaves no incomplete checkpoint."""
    with make_toy_pod(tmp_path, spec, {"at": {"0:7": "hang"}}, grace=2) as pod:
        pod.wait_step(6)
        pod.terminate()
        code, termination = wait_for_exit(pod)
    assert (code, termination.code, termination.class_) == (76, "StoppedUnsaved", FailureClass.PREEMPTED)
    assert list_committed_steps(tmp_path) == [5]


def test_checkpoints_are_skipped_while_staging_fails(tmp_path: Path, spec: dict[str, Any]) -> None:
    """Training continues, and the progress report shows the problem. As soon as files can be staged again, checkpoints are committed."""
    with make_toy_pod(tmp_path, spec, {"steps": 100000}) as pod:
        pod.wait_committed(5)
        staging_folder = pod.folder / "work" / "staged"
        staging_folder.rename(staging_folder.with_name("away"))
        staging_folder.touch()
        pod.wait_until(lambda: "StagingFailed" in (read_checkpoint_problem(pod) or ""))
        step_of_problem = pod.step()
        pod.wait_step(step_of_problem + 10)
        staging_folder.unlink()
        staging_folder.mkdir()
        pod.wait_committed(step_of_problem + 10)
        pod.wait_until(lambda: read_checkpoint_problem(pod) is None)


def read_checkpoint_problem(pod: Pod) -> str | None:
    report = pod.report()
    return report.health.checkpoint_problem if report else None


def test_a_final_model_that_cannot_be_staged_is_a_storage_failure(tmp_path: Path, spec: dict[str, Any]) -> None:
    with make_toy_pod(tmp_path, spec, {"steps": 40, "every": 1000, "pause": 0.02}) as pod:
        pod.wait_step(1)
        (pod.folder / "work" / "staged").rmdir()
        (pod.folder / "work" / "staged").touch()
        code, termination = wait_for_exit(pod)
    assert (code, termination.code, termination.class_) == (69, "StagingFailed", FailureClass.STORAGE)


def test_a_new_attempt_of_a_finished_run_reports_the_existing_output(tmp_path: Path, spec: dict[str, Any]) -> None:
    with make_toy_pod(tmp_path, spec, {}) as pod:
        _, first_termination = wait_for_exit(pod)
    with make_toy_pod(tmp_path, spec, {}, name="two", attempt=2, resume=ResumeConfig(mode="auto", expect_step=20)) as pod:
        code, second_termination = wait_for_exit(pod)
    assert code == 0 and first_termination.output == second_termination.output and first_termination.output is not None


@pytest.mark.parametrize("victim", ["supervisor", "agent"])
def test_ranks_end_after_the_supervisor_or_the_agent_is_killed(tmp_path: Path, spec: dict[str, Any], victim: str) -> None:
    with make_toy_pod(tmp_path, spec, {"steps": 100000}, processes=2) as pod:
        pod.wait_step(3)
        rank_pids = pod.pids("train")
        assert len(rank_pids) == 2 and pod.process is not None
        os.kill(pod.process.pid if victim == "supervisor" else pod.pids("agent")[0], signal.SIGKILL)
        code = pod.end()
    assert code == (-signal.SIGKILL if victim == "supervisor" else 74)
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in rank_pids):
        assert time.monotonic() < deadline, "a rank still runs"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_http_server_reports_progress_and_metrics(tmp_path: Path, spec: dict[str, Any]) -> None:
    with make_toy_pod(tmp_path, spec, {"steps": 100000}) as pod:
        pod.wait_until(lambda: pod.get("/healthz") == b"ok\n")
        pod.wait_committed(10)
        report = pod.report()
        assert report is not None and report.uid == UID and report.attempt == 1 and report.stage == "training"
        assert report.progress.total_steps == 100000 and report.progress.percent == 0 and report.progress.eta
        assert report.resolved.storage == {"kind": "folder", "conditionalWrites": True, "canDelete": True}
        assert report.health.healthy and report.health.last_save_seconds is not None
        metrics = (pod.get("/metrics") or b"").decode()
        assert (
            'finetune_trainer_stage{stage="training"} 1' in metrics and "finetune_trainer_checkpoints_total" in metrics
        )
        body = {"trainerStatus": {"progressPercentage": 7, "metrics": [{"name": "loss", "value": "0.5"}]}}
        url = f"http://127.0.0.1:{pod.port}/apis/trainer.kubeflow.org/v1alpha1/namespaces/n/trainjobs/j/status"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), method="POST")) as answer:
            assert answer.status == 200
        assert pod.get("/nothing") is None


def test_a_port_that_is_already_in_use_is_reported(tmp_path: Path, spec: dict[str, Any]) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as listening_socket:
        listening_socket.bind(("", 0))
        listening_socket.listen()
        port = str(listening_socket.getsockname()[1])
        with make_toy_pod(tmp_path, spec, {}, env={"FINETUNE_PORT": port}) as pod:
            code, termination = wait_for_exit(pod)
    assert (code, termination.code) == (70, "PortInUse") and port in (termination.message or "")
    assert "Traceback" not in pod.text


def test_no_storage_credentials_reach_a_rank(tmp_path: Path, spec: dict[str, Any]) -> None:
    env = {"AWS_SECRET_ACCESS_KEY": "hidden-word", "MODEL_AWS_SECRET_ACCESS_KEY": "hidden-word", "KEPT": "seen"}
    with make_toy_pod(tmp_path, spec, {"steps": 100000}, env=env) as pod:
        pod.wait_step(1)
        environment = Path(f"/proc/{pod.pids('train')[0]}/environ").read_bytes()
    assert b"KEPT=seen" in environment and b"hidden-word" not in environment
