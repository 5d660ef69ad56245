"""W&B's library writes the file of an offline run. An online run is a fake that records calls, because no server is available."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.trackers.events import RunEnd
from finetune_trainer.trackers.wandb import Wandb
from wandb.errors import AuthenticationError, CommError, UsageError

from tests.support.tracking import UID, FolderStorage, compute_loss, end_events, log_events, tracked_run
from tests.support.wandb_file import read_history, read_records, read_summary

OFFLINE_PROGRAM = """
import sys
from pathlib import Path
from finetune_trainer.trackers.wandb import Wandb
from tests.support.tracking import FolderStorage, end_events, log_events, start_events, tracked_run
folder = Path(sys.argv[1])
for attempt in (1, 2):
    tracker = Wandb(tracked_run(attempt=attempt), folder / "work", FolderStorage(folder / "store"), project=None, entity=None, system_metrics=False)
    tracker.open()
    tracker.send([*start_events(), *log_events(1, 14, evaluated_steps=(10,))] if attempt == 1 else log_events(1, 20, evaluated_steps=(10, 20)))
    tracker.send(end_events(14, end="interrupted") if attempt == 1 else end_events(20))
    tracker.flush()
"""


def test_the_file_of_an_offline_run_has_each_step_once(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    (tmp_path / "home").mkdir()
    folders = dict.fromkeys(("HOME", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), home)
    env = {**os.environ, **folders, "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    completed_process = subprocess.run([sys.executable, "-c", OFFLINE_PROGRAM, str(tmp_path)], env=env, capture_output=True, text=True, check=False)
    assert completed_process.returncode == 0, completed_process.stderr
    [file] = (tmp_path / "store").rglob("*.wandb")
    assert str(file.relative_to(tmp_path / "store")) == f"tracking/wandb/offline-run-20260301_120000-{UID}/run-{UID}.wandb"
    rows = read_history(file)
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == [(step, compute_loss(step)) for step in range(1, 21)]
    assert [(row["_step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [(10, compute_loss(10) + 0.5), (20, compute_loss(20) + 0.5)]
    summary = read_summary(file)
    assert summary["evaluate/perplexity"] == 5.25 and summary["artifact/model"] == "s3://bucket/team/job/model/a1-1"
    [run] = [record.run for record in read_records(file) if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.display_name, run.project) == (UID, "support-bot", "support")
    exits = [record.exit.exit_code for record in read_records(file) if record.WhichOneof("record_type") == "exit"]
    assert exits == [0]


class FakeRun:
    """A remote run that continues at `step`."""

    url = "https://wandb.ai/team/support/runs/1"

    def __init__(self, step: int) -> None:
        self.step, self.calls, self.summary, self.config = step, [], {}, self
        self.values: dict[str, Any] = {}

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values["loss"]))

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.values |= values

    def mark_preempting(self) -> None:
        self.calls.append("preempting")

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.mark.parametrize(
    ("end", "calls"),
    [(RunEnd.FINISHED, [("finish", 0)]), (RunEnd.FAILED, [("finish", 1)]), (RunEnd.INTERRUPTED, ["preempting", ("finish", 1)])],
)
def test_an_online_run_continues_after_the_newest_step_of_the_server(
    end: RunEnd, calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    remote, options = FakeRun(15), {}

    def init(**init_options: Any) -> FakeRun:
        options.update(init_options)
        return remote

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = Wandb(tracked_run(attempt=2), tmp_path, FolderStorage(tmp_path), project="p", entity="e", system_metrics=True)
    tracker.open()
    tracker.open()
    tracker.send(log_events(1, 16))
    tracker.send(end_events(16, end=end)[-1:])
    assert (options["id"], options["resume"], options["mode"], options["project"], options["entity"]) == (UID, "allow", "online", "p", "e")
    assert remote.calls == [(15, compute_loss(15)), (16, compute_loss(16)), *calls]
    assert tracker.run_address == FakeRun.url


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (AuthenticationError("API key k3y"), "TrackerCredentialsRejected", "does not accept the credentials; check the API key"),
        (UsageError("no entity k3y"), "TrackerFailed", "check tracking.wandb.project"),
        (CommError("connection refused by k3y"), "TrackerUnavailable", "wandb at https://api.wandb.ai could not be reached: the connection was refused"),
    ],
)
def test_errors_name_the_cause_and_no_secret(error: Exception, reason: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = Wandb(tracked_run(), tmp_path, FolderStorage(tmp_path), project=None, entity=None, system_metrics=False)
    explanation = tracker.explain(error)
    assert explanation.reason == reason and text in explanation.message and "k3y" not in explanation.message
