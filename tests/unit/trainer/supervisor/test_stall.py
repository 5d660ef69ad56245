"""Missing heartbeats are a stall, but only in stages in which ranks send heartbeats."""

from __future__ import annotations

import pytest
from finetune_api.status import Stage
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.stall import StallWatch

from tests.unit.trainer.supervisor.conftest import FakeClock


def test_the_default_timeout_follows_the_median_step(clock: FakeClock) -> None:
    state = RunState()
    watch = StallWatch(state, None)
    clock.now += 10_000
    assert watch.stall_error() is None, "a stall cannot be detected before the first steps"
    state.enter_stage(Stage.TRAINING)
    for step in (1, 2):
        clock.now += 60
        state.record_step(step)
        state.record_activity()
    assert watch.timeout_seconds() == 1200.0
    clock.now += 1199
    assert watch.stall_error() is None
    clock.now += 2
    stalled = watch.stall_error()
    assert stalled is not None and stalled.code == "Stalled" and "after step 2" in stalled.message
    state.record_activity()
    assert watch.stall_error() is None


@pytest.mark.parametrize(
    ("stage", "watched"),
    [
        (Stage.STARTING, False), (Stage.DOWNLOADING, False), (Stage.LOADING, False), (Stage.TRAINING, True),
        (Stage.EVALUATING, True), (Stage.STOPPING, True), (Stage.UPLOADING, False),
    ],
)  # fmt: skip
def test_only_stages_with_heartbeats_are_watched(clock: FakeClock, stage: Stage, watched: bool) -> None:
    state = RunState()
    watch = StallWatch(state, 5)
    state.enter_stage(stage)
    state.record_activity()
    clock.now += 6
    assert (watch.stall_error() is not None) == watched


def test_a_configured_timeout_also_limits_the_first_step(clock: FakeClock) -> None:
    state = RunState()
    watch = StallWatch(state, 60)
    clock.now += 10_000
    assert watch.stall_error() is None, "the loading stage has no time limit"
    state.enter_stage(Stage.TRAINING)
    state.record_activity()
    clock.now += 61
    assert watch.stall_error() is not None
    assert StallWatch(state, 5).timeout_seconds() == 5.0
