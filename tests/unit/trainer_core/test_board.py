"""What `/progress` says, made from what ranks said."""

from __future__ import annotations

import pytest
from finetune_api.status import Checkpoint, Resolved, Stage
from finetune_trainer.supervisor import board as subject
from finetune_trainer.supervisor.board import Board, duration, shown
from finetune_trainer.supervisor.server import exposition, take_kubeflow
from finetune_trainer.supervisor.stall import StallWatch


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(subject.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_progress_for_people(clock: Clock) -> None:
    board = Board()
    board.progress({"step": 0, "totalSteps": 500, "epoch": 0.0})
    for step in range(1, 121):
        clock.now += 2
        board.heartbeat(step)
    progress = board.report().progress
    assert (progress.display, progress.percent, progress.seconds_remaining, progress.eta) == (
        "120/500 (24%)",
        24,
        760,
        "12m40s",
    )
    clock.now += 5
    health = board.report().health
    assert (health.median_step_seconds, health.seconds_since_step) == (2.0, 5.0)


def test_a_late_message_does_not_turn_the_step_back(clock: Clock) -> None:
    board = Board()
    for step in (1, 2, 3, 2):
        board.heartbeat(step)
    assert board.step == 3


def test_fields_left_out_keep_what_was_said(clock: Clock) -> None:
    board = Board()
    board.metrics({"trainLoss": 1.0})
    board.metrics({"evalLoss": 2.0})
    board.resolve(Resolved(strategy="ddp"))
    board.resolve(Resolved(device="cpu"))
    board.note("once")
    board.note("once")
    report = board.report()
    assert (report.metrics.train_loss, report.metrics.eval_loss) == (1.0, 2.0)
    assert (report.resolved.strategy, report.resolved.device, report.resolved.notes) == ("ddp", "cpu", ["once"])


def test_stages_are_timed(clock: Clock) -> None:
    board = Board()
    clock.now += 1
    board.stage(Stage.DOWNLOADING)
    clock.now += 3
    board.stage(Stage.TRAINING)
    clock.now += 4
    assert board.report().timings == {"starting": 1.0, "downloading": 3.0, "training": 4.0}


def test_the_newest_five_and_the_best_are_shown() -> None:
    found = [Checkpoint(step=step, uri="u", eval_loss=abs(step - 2)) for step in range(9, 0, -1)]
    assert [one.step for one in shown(found)] == [9, 8, 7, 6, 5, 2]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59, "59s"), (200, "3m20s"), (4320, "1h12m"), (-3, "0s")])
def test_durations(seconds: int, text: str) -> None:
    assert duration(seconds) == text


def test_the_kubeflow_protocol() -> None:
    board = Board()
    take_kubeflow(
        board,
        {"progressPercentage": 30, "estimatedRemainingSeconds": 60, "metrics": [{"name": "eval_loss", "value": "1.5"}]},
    )
    report = board.report()
    assert (report.progress.percent, report.progress.seconds_remaining, report.metrics.eval_loss) == (30, 60, 1.5)


def test_prometheus() -> None:
    board = Board()
    board.heartbeat(7)
    board.count("checkpoints", 2)
    lines = exposition(board).splitlines()
    assert "finetune_trainer_step 7" in lines and "finetune_trainer_checkpoints_total 2" in lines
    assert 'finetune_trainer_stage{stage="starting"} 1' in lines


def test_stalls_are_seen_only_where_steps_are_due(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()
    watch = StallWatch(board, None)
    clock.now += 10_000
    assert watch.stalled() is None, "nothing is watched before the first steps"
    board.stage(Stage.TRAINING)
    for step in (1, 2):
        clock.now += 60
        board.heartbeat(step)
        watch.sign_of_life()
    assert watch.allowed() == 1200.0
    clock.now += 1199
    assert watch.stalled() is None
    clock.now += 2
    stalled = watch.stalled()
    assert stalled is not None and stalled.code == "Stalled" and "after step 2" in stalled.message
    watch.sign_of_life()
    assert watch.stalled() is None
    clock.now += 2000
    board.stage(Stage.UPLOADING)
    assert watch.stalled() is None
    assert StallWatch(board, 5).allowed() == 5.0


def test_a_limit_that_was_written_holds_for_the_first_step_too(clock: Clock) -> None:
    board = Board()
    watch = StallWatch(board, 60)
    clock.now += 10_000
    assert watch.stalled() is None, "loading takes what it takes"
    board.stage(Stage.TRAINING)
    watch.sign_of_life()
    clock.now += 61
    assert watch.stalled() is not None


def test_a_sign_of_life_is_younger_than_the_step(clock: Clock) -> None:
    board = Board()
    board.alive()
    assert board.report().health.seconds_since_heartbeat is None
    board.heartbeat(1)
    clock.now += 700
    board.alive()
    clock.now += 5
    health = board.report().health
    assert (health.seconds_since_step, health.seconds_since_heartbeat) == (705.0, 5.0)
    board.heartbeat(2)
    assert board.report().health.seconds_since_heartbeat == 0.0
