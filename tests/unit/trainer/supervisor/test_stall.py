"""A run without heartbeats has stalled, but only in stages in which ranks send heartbeats.

While ranks load the model and the data, the supervisor measures instead whether they compute or read.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_api.status import Stage
from finetune_trainer.supervisor import stall as subject
from finetune_trainer.supervisor.run_state import RunState
from finetune_trainer.supervisor.stall import StallWatch
from finetune_trainer.supervisor.work import Work, WorkWatch, measure_work

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
        state.record_heartbeat()
    assert watch.timeout_seconds() == 1200.0
    clock.now += 1199
    assert watch.stall_error() is None
    clock.now += 2
    error = watch.stall_error()
    assert error is not None and error.code == "Stalled" and "after step 2" in error.message
    state.record_heartbeat()
    assert watch.stall_error() is None


@pytest.mark.parametrize(
    ("stage", "is_watched"),
    [
        (Stage.STARTING, False), (Stage.DOWNLOADING, False), (Stage.TRAINING, True),
        (Stage.EVALUATING, True), (Stage.STOPPING, True), (Stage.UPLOADING, False),
    ],
)  # fmt: skip
def test_only_stages_with_heartbeats_are_watched(clock: FakeClock, stage: Stage, is_watched: bool) -> None:
    state = RunState()
    watch = StallWatch(state, 5)
    state.enter_stage(stage)
    state.record_heartbeat()
    clock.now += 6
    assert (watch.stall_error() is not None) == is_watched


def test_a_configured_timeout_also_limits_the_first_step(clock: FakeClock) -> None:
    state = RunState()
    watch = StallWatch(state, 60)
    clock.now += 10_000
    assert watch.stall_error() is None, "the starting stage has no time limit"
    state.enter_stage(Stage.TRAINING)
    state.record_heartbeat()
    clock.now += 61
    assert watch.stall_error() is not None
    assert StallWatch(state, 5).timeout_seconds() == 5.0


@pytest.mark.parametrize(("step_seconds", "timeout"), [(29, 600.0), (30, 600.0), (31, 620.0)])
def test_the_default_timeout_is_at_least_ten_minutes(clock: FakeClock, step_seconds: float, timeout: float) -> None:
    state = RunState()
    state.enter_stage(Stage.TRAINING)
    for step in (1, 2):
        clock.now += step_seconds
        state.record_step(step)
    state.record_heartbeat()
    watch = StallWatch(state, None)
    clock.now += timeout
    assert (watch.timeout_seconds(), watch.stall_error()) == (timeout, None)
    clock.now += 1
    error = watch.stall_error()
    assert error is not None and f"no progress for {timeout + 1:.0f} s after step 2; a step takes {step_seconds}.00 s" in error.message


def test_without_a_heartbeat_the_time_since_the_start_counts(clock: FakeClock) -> None:
    state = RunState()
    state.enter_stage(Stage.TRAINING)
    watch = StallWatch(state, 60)
    clock.now += 60
    assert watch.stall_error() is None
    clock.now += 1
    error = watch.stall_error()
    assert error is not None and "no progress for 61 s after step 0; a step takes 0.00 s" in error.message


class MeasuredRanks:
    """Ranks whose measured work the test sets."""

    def __init__(self) -> None:
        self.work = Work()

    def measure(self) -> Work:
        return self.work


@pytest.mark.parametrize("work", [Work(cpu_seconds=16), Work(bytes_moved=5_000_000), Work(page_fault_count=301)])
def test_ranks_that_work_while_they_load_do_not_stall(clock: FakeClock, work: Work) -> None:
    state, ranks = RunState(), MeasuredRanks()
    watch = StallWatch(state, None, work_watch=WorkWatch(ranks.measure))
    state.enter_stage(Stage.LOADING)
    for _ in range(20):
        assert watch.stall_error() is None
        clock.now += 300
        ranks.work += work


@pytest.mark.parametrize("work", [Work(), Work(cpu_seconds=0.4, bytes_moved=100_000, page_fault_count=20)])
def test_ranks_that_only_poll_while_they_load_stall_after_the_timeout(clock: FakeClock, work: Work) -> None:
    state, ranks = RunState(), MeasuredRanks()
    watch = StallWatch(state, None, work_watch=WorkWatch(ranks.measure))
    state.enter_stage(Stage.LOADING)
    for _ in range(21):  # the last check is at second 600
        assert watch.stall_error() is None
        clock.now += 30
        ranks.work += work
    error = watch.stall_error()
    assert error is not None and error.code == "Stalled"
    assert error.message == "no progress for 630 s while loading model and data: the ranks neither compute nor read"
    state.enter_stage(Stage.TRAINING)
    assert watch.stall_error() is None
    state.enter_stage(Stage.LOADING)
    assert watch.stall_error() is None, "the time before the stage was entered does not count"


@pytest.mark.parametrize(("blocked_flags", "is_stalled"), [((True, True, True), True), ((True, False, True), False), ((False, False, False), False)])
def test_a_pod_that_waits_for_other_pods_stalls_only_if_a_thread_is_blocked(clock: FakeClock, blocked_flags: tuple[bool, ...], is_stalled: bool) -> None:
    state, ranks = RunState(), MeasuredRanks()
    watch = StallWatch(state, 40, pod_count=2, work_watch=WorkWatch(ranks.measure))
    state.enter_stage(Stage.LOADING)
    assert watch.stall_error() is None
    for is_blocked in blocked_flags:
        clock.now += 15
        ranks.work = Work(is_blocked=is_blocked)
        error = watch.stall_error()
    assert (error is not None) == is_stalled
    assert error is None or error.message.endswith("neither compute nor read; a thread waits for a disk or a file server")


def test_the_work_of_a_process_is_measured_from_outside() -> None:
    code = (
        "import os, sys; sys.stdin.read(1)\n"
        "while sum(os.times()[:2]) < 0.3: pass\n"
        "open('/dev/zero', 'rb').read(3_000_000); print(1, flush=True); sys.stdin.read(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        work_before = measure_work(process.pid)
        process.stdin.write("a")
        process.stdin.flush()
        assert process.stdout.read(1) == "1"
        work_after = measure_work(process.pid)
        assert work_after.cpu_seconds > work_before.cpu_seconds and work_after.bytes_moved >= work_before.bytes_moved + 3_000_000
        assert work_after.shows_work_since(work_before, 1) and not work_before.shows_work_since(work_before, 1)
        process.stdin.write("a")
    assert measure_work(process.pid) == Work(), "the process has ended"


def test_the_work_of_ended_children_counts_for_their_parent() -> None:
    code = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import os\\nwhile sum(os.times()[:2]) < 0.3: pass'], check=True)\n"
        "print(1, flush=True); sys.stdin.read(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.read(1) == "1"
        assert measure_work(process.pid).cpu_seconds >= 0.3
        process.stdin.write("a")


def test_ranks_may_wait_for_the_start_of_a_server(clock: FakeClock) -> None:
    state = RunState()
    watch = StallWatch(state, 40, longest_wait_seconds=1800, work_watch=WorkWatch(MeasuredRanks().measure))
    state.enter_stage(Stage.LOADING)
    assert watch.stall_error() is None
    clock.now += 1840
    assert watch.stall_error() is None, "the trainer itself reports a server that does not start"
    clock.now += 1
    assert watch.stall_error() is not None


def test_only_ranks_are_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    sent_signals: list[tuple[int, int]] = []
    pauses: list[float] = []
    monkeypatch.setattr(subject.os, "kill", lambda pid, number: sent_signals.append((pid, number)))
    monkeypatch.setattr(subject.time, "sleep", pauses.append)
    commands = {11: b"python\0agent", 13: b"python\0-m\0train\0x", 14: b"python\0trainer", 15: b"train"}

    def read_bytes(path: Path) -> bytes:
        try:
            return commands[int(path.parent.name)]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    subject.dump_rank_stacks([11, 12, 13, 14, 15])
    assert sent_signals == [(13, signal.SIGUSR1), (15, signal.SIGUSR1)] and pauses == [1.0]
