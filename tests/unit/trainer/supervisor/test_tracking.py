"""What the tracker process gets from the supervisor, and what the supervisor does if the process hangs or crashes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import DataError
from finetune_api.names import ExitCode
from finetune_api.pod import RunConfig
from finetune_trainer.checkpoint.manifest import RunFacts
from finetune_trainer.checkpoint.restore import RestoreResult
from finetune_trainer.failure import RankFailure
from finetune_trainer.processes import kill_all_descendants
from finetune_trainer.settings import Settings
from finetune_trainer.supervisor import tracking
from finetune_trainer.supervisor.agent_process import build_rank_environment
from finetune_trainer.supervisor.exit_decision import ExitDecision
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.tracking import (
    RunTracking,
    describe_tracked_run,
    flatten_parameters,
    list_data_sources,
    read_checkpoint_log,
    to_run_end,
)
from finetune_trainer.trackers.events import RunEnd

from tests.support.learning import make_run

STARTED_AT = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
FAILURE = ExitDecision(ExitCode.DATA_INVALID, RankFailure(DataError("DatasetEmpty", "no rows")))


def make_run_config(folder: Path, spec: dict[str, Any] | None = None) -> RunConfig:
    return make_run(folder, folder / "model", spec or {"tracking": {"reportTo": ["tensorboard"]}})[0]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in {"WANDB_API_KEY": "k", "MONGODB_URI": "k", "MLFLOW_TRACKING_PASSWORD": "k", "OPENAI_API_KEY": "k"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    return Settings.from_env(run_file=str(tmp_path / "run.json"), work_folder=str(tmp_path / "work"), port=0)


def test_only_the_tracker_process_gets_credentials_of_trackers(settings: Settings, tmp_path: Path) -> None:
    run = make_run_config(tmp_path)
    rank_environment = build_rank_environment(run, settings, "socket")
    assert not {"WANDB_API_KEY", "MONGODB_URI", "MLFLOW_TRACKING_PASSWORD"} & set(rank_environment) and rank_environment["OPENAI_API_KEY"] == "k"
    environment = RunTracking(run, settings, RunState())._build_environment()
    assert {environment[name] for name in ("WANDB_API_KEY", "MONGODB_URI", "MLFLOW_TRACKING_PASSWORD")} == {"k"}
    assert "OPENAI_API_KEY" not in environment
    assert environment["HOME"] == environment["WANDB_CACHE_DIR"] == str(tmp_path / "work" / "tracking" / "home")


def test_parameters_are_values_by_path_without_secrets(tmp_path: Path) -> None:
    spec = {
        "dataset": {"train": "https://user:k3y@host/rows.jsonl?signature=k3y"},
        "tracking": {"reportTo": ["wandb"], "wandb": {"apiKeySecretRef": {"name": "k3y", "key": "k3y"}}},
        "placement": {"env": [{"name": "TOKEN", "value": "k3y"}]}, "method": {"lora": {"targetModules": ["q_proj"]}},
    }  # fmt: skip
    parameters = flatten_parameters(make_run_config(tmp_path, spec))
    assert parameters["training.learningRate"] == "0.005" and parameters["method.lora.targetModules"] == '["q_proj"]'
    assert parameters["dataset.train"] == "https://host/rows.jsonl"
    assert "k3y" not in json.dumps(parameters)


def test_signatures_in_lists_of_sources_are_not_tracked(tmp_path: Path) -> None:
    mixture = [{"source": f"https://host/{name}.jsonl?X-Amz-Signature=k3y", "weight": 1} for name in ("a", "b")]
    parameters = flatten_parameters(make_run_config(tmp_path, {"dataset": {"train": None, "mixture": mixture}}))
    assert "https://host/a.jsonl" in parameters["dataset.mixture"] and "k3y" not in json.dumps(parameters)


def test_the_name_of_a_run_is_the_same_in_all_attempts(tmp_path: Path) -> None:
    run = make_run_config(tmp_path, {"tracking": {"reportTo": ["tensorboard"]}, "output": {"runName": {"prefix": "exp-", "suffix": "-a"}}})
    names = {describe_tracked_run(run.model_copy(update={"attempt": attempt}), STARTED_AT).name for attempt in (1, 2)}
    assert names == {"exp-20260301-120000-a"}


def test_data_sources_have_digests(tmp_path: Path) -> None:
    run = make_run_config(tmp_path, {"dataset": {"train": "s3://b/t.jsonl", "test": "s3://b/test.jsonl"}, "tracking": {"reportTo": ["tensorboard"]}})
    sources = list_data_sources(run, RunFacts(dataset_digest="d1", other_inputs={"test data": "d2"}))
    assert [(entry.context, entry.source, entry.digest) for entry in sources] == [("training", "s3://b/t.jsonl", "d1"), ("testing", "s3://b/test.jsonl", "d2")]


def test_the_log_lines_in_a_checkpoint_are_those_of_all_attempts(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": float("nan")}]}))
    entries = read_checkpoint_log(RestoreResult(local_folder=tmp_path))
    assert [(entry.step, entry.loss, entry.eval_loss) for entry in entries] == [(1, 2.5, None), (2, None, None)]
    assert read_checkpoint_log(RestoreResult(local_folder=tmp_path / "missing")) == [] == read_checkpoint_log(RestoreResult())


@pytest.mark.parametrize(
    ("decision", "is_ended_by_user", "end"),
    [
        (ExitDecision(ExitCode.OK), False, "finished"),
        (ExitDecision(ExitCode.PREEMPTED_SAVED), False, "interrupted"),
        (ExitDecision(ExitCode.PREEMPTED_UNSAVED), True, "killed"),
        (FAILURE, False, "failed"),
    ],
)
def test_a_requested_stop_is_not_a_failure(decision: ExitDecision, is_ended_by_user: bool, end: str) -> None:
    assert to_run_end(decision, is_ended_by_user=is_ended_by_user) == end


@pytest.fixture
def cleanup() -> Iterator[None]:
    yield
    from finetune_trainer import processes

    processes._spared_pids.clear()
    kill_all_descendants()


def use_program(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Replace the tracker process with a Python program."""
    import sys

    from finetune_trainer.processes import ChildProcess

    monkeypatch.setattr(tracking, "ChildProcess", lambda command, env: ChildProcess([sys.executable, "-c", program, command[-1]], env))


def test_a_tracker_process_that_does_not_end_is_killed_and_adds_a_note(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleanup: None
) -> None:
    use_program(monkeypatch, "import time; time.sleep(600)")
    state = RunState()
    run_tracking = RunTracking(make_run_config(tmp_path), settings, state)
    run_tracking.start(STARTED_AT, [], resumed_from_step=0)
    kill_all_descendants()  # The end of a stage kills all processes except the tracker process.
    assert run_tracking._process is not None and run_tracking._process.poll() is None
    run_tracking.record_log_line(1, {"loss": 2.0})
    run_tracking.finish(ExitDecision(ExitCode.OK), is_ended_by_user=False, get_latest_end=lambda: 0)
    run_tracking._process._process.wait()
    [note] = state.report().resolved.notes or []
    assert note.startswith("tensorboard did not accept all values in time; values are missing there, but ")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "work/tracking/events.jsonl").read_text().splitlines()]
    assert kinds == ["log", "end"]


def test_a_stop_during_the_wait_for_trackers_ends_the_wait(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleanup: None) -> None:
    use_program(monkeypatch, "import time; time.sleep(600)")
    run_tracking = RunTracking(make_run_config(tmp_path), settings, RunState())
    run_tracking.start(STARTED_AT, [], resumed_from_step=0)
    ends = iter([float("inf"), float("inf"), 0.0])  # the third call returns an end in the past, as if a stop were requested during the wait
    run_tracking.finish(ExitDecision(ExitCode.OK), is_ended_by_user=False, get_latest_end=lambda: next(ends))
    assert run_tracking._process is not None and run_tracking._process._process.wait() == -9 and next(ends, None) is None


@pytest.mark.parametrize(("end", "seconds"), [("finished", 120.0), ("failed", 120.0), ("interrupted", 5.0), ("killed", 5.0)])
def test_how_an_attempt_ended_decides_the_wait_for_trackers(end: str, seconds: float, settings: Settings, tmp_path: Path) -> None:
    assert RunTracking(make_run_config(tmp_path), settings, RunState())._choose_max_wait_seconds(RunEnd(end)) == seconds


def test_a_tracker_process_that_crashes_is_started_again_a_few_times(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cleanup: None
) -> None:
    use_program(monkeypatch, "import sys; open(sys.argv[1] + '/starts', 'a').write('x'); sys.exit(1)")
    monkeypatch.setattr(tracking, "RESTART_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "POLL_SECONDS", 0.01)
    state = RunState()
    run_tracking = RunTracking(make_run_config(tmp_path), settings, state)
    run_tracking.start(STARTED_AT, [], resumed_from_step=0)
    assert run_tracking._monitor is not None
    run_tracking._monitor.join()
    assert (tmp_path / "work/tracking/starts").read_text() == "xxxx"
    assert state.report().health.tracker_problem == "TrackerFailed: the tracker process has ended 4 times; see the pod's log"


def test_without_trackers_there_is_no_process_and_no_file(settings: Settings, tmp_path: Path) -> None:
    run_tracking = RunTracking(make_run_config(tmp_path, {"training": {"epochs": 1}}), settings, RunState())
    run_tracking.start(STARTED_AT, [], resumed_from_step=0)
    run_tracking.record_log_line(1, {"loss": 2.0})
    run_tracking.finish(FAILURE, is_ended_by_user=False, get_latest_end=lambda: 0)
    assert list((tmp_path / "work").iterdir()) == []
