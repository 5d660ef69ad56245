"""Work queue, views and text."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from finetune_operator.text import clean, duration
from finetune_operator.views import read_finetunejob, read_job, read_pod, read_status
from finetune_operator.workqueue import Key, WorkQueue
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.operator.samples import UID, pod

A, B = Key("team", "a"), Key("team", "b")


class Clock:
    """Time that only moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_a_key_is_queued_once(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add(A)
    queue.add(A)
    queue.add(B)
    assert [(await queue.take())[0], (await queue.take())[0]] == [A, B]
    assert len(queue) == 0


async def test_a_key_added_while_worked_on_comes_back_once_and_never_to_two(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add(A)
    await queue.take()
    queue.add(A)
    queue.add(A)
    assert len(queue) == 0
    queue.done(A)
    assert (await queue.take())[0] == A
    queue.done(A)
    assert queue.idle


async def test_new_jobs_come_first_and_starve_nobody(clock: Clock) -> None:
    queue = WorkQueue(clock)
    old = [Key("team", f"old{number}") for number in range(3)]
    new = [Key("team", f"new{number}") for number in range(9)]
    for key in old:
        queue.add(key)
    for key in new:
        queue.hurry(key)
    queue.hurry(old[0])
    assert len(queue) == 12
    taken = [(await queue.take())[0] for _ in range(12)]
    assert taken == [*new[:7], old[0], *new[7:], *old[1:]]
    queue.hurry(new[0])
    queue.done(new[0])
    assert (await queue.take())[0] == new[0]
    queue.drop_waiting()
    for key in [*old, *new]:
        queue.done(key)
    assert queue.idle


async def test_the_earliest_time_wins(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add_after(A, 50)
    queue.add_after(A, 10)
    queue.add_after(A, 30)
    clock.now += 10
    assert (await queue.take())[0] == A
    queue.done(A)
    clock.now += 100
    queue.add(B)
    assert (await queue.take())[0] == B
    assert len(queue) == 0


async def test_failures_wait_longer_each_time_up_to_five_minutes(clock: Clock) -> None:
    queue = WorkQueue(clock)
    pauses = [queue.failed(A) for _ in range(20)]
    assert pauses[:4] == [0.005, 0.01, 0.02, 0.04]
    assert pauses[-1] == 300
    queue.forget(A)
    assert queue.failed(A) == 0.005


async def test_the_oldest_wait_is_known(clock: Clock) -> None:
    queue = WorkQueue(clock)
    assert queue.oldest() == 0
    queue.add(A)
    clock.now += 7
    queue.add(B)
    assert queue.oldest() == 7
    _, waited = await queue.take()
    assert waited == 7
    clock.now += 5
    assert queue.oldest() == 5


async def test_wait_times_can_be_restarted(clock: Clock) -> None:
    queue = WorkQueue(clock)
    queue.add(A)
    clock.now += 500
    queue.restart_wait_times()
    clock.now += 7
    assert queue.oldest() == 7
    assert await queue.take() == (A, 7)


async def test_take_wakes_when_a_time_comes() -> None:
    queue = WorkQueue()
    queue.add_after(A, 0.01)
    assert (await asyncio.wait_for(queue.take(), 5))[0] == A


# Views


META = {
    "namespace": "team", "name": "run-1-0-x", "uid": "u", "resourceVersion": "7", "creationTimestamp": "2026-11-21T12:00:00Z",
    "labels": {
        "app.kubernetes.io/managed-by": "finetune-operator", "finetune-operator.io/name": "run",
        "finetune-operator.io/uid": UID, "finetune-operator.io/attempt": "2",
    },
    "annotations": {"batch.kubernetes.io/job-completion-index": "3"},
    "ownerReferences": [{"kind": "Job", "uid": "job-2", "controller": True}],
}  # fmt: skip


def test_a_pod_is_read() -> None:
    body: dict[str, Any] = {
        "metadata": META | {"deletionTimestamp": "2026-11-21T12:05:00Z"},
        "spec": {"nodeName": "n1"},
        "status": {
            "phase": "Failed", "podIP": "10.0.0.9",
            "conditions": [
                {"type": "Ready", "status": "False"},
                {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "m"},
            ],
            "containerStatuses": [{"imageID": "img@sha256:1", "state": {"terminated": {
                "exitCode": 75, "reason": "Error", "message": "{}", "finishedAt": "2026-11-21T12:04:00Z",
            }}}],
        },
    }  # fmt: skip
    found = read_pod(body)
    assert found is not None
    assert (found.attempt, found.index, found.job_uid, found.node, found.ip) == (2, 3, "job-2", "n1", "10.0.0.9")
    assert (found.disruption, found.is_finished, found.is_ready) == ("PreemptionByScheduler", True, False)
    assert found.terminated is not None
    assert found.terminated.exit_code == 75
    assert found.deletion_timestamp == datetime(2026, 11, 21, 12, 5, tzinfo=UTC)


def test_what_is_not_ours_is_not_read() -> None:
    assert read_pod({"metadata": META | {"labels": {}}}) is None
    assert read_job({"metadata": META | {"labels": {"app.kubernetes.io/managed-by": "finetune-operator"}}}) is None


WORDS = st.text("abT1:-", max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["attempt", "attempts", "phase", "conditions", "progress", "observedGeneration", "checkpoints", "failure", "odd"]
)


@given(st.dictionaries(FIELDS, JSON))
def test_reading_a_corrupt_status_never_raises(raw: dict[str, Any]) -> None:
    read_status(raw)


def test_a_corrupt_field_does_not_take_the_others_with_it() -> None:
    found = read_status({"attempt": 4, "phase": "Odd", "progress": 7, "restarts": 3})
    assert (found.attempt, found.restarts, found.phase, found.progress) == (4, 3, None, None)


def test_a_foreign_condition_does_not_take_ours_with_it() -> None:
    ours = {"type": "Finished", "status": "True"}
    found = read_status({"attempt": 4, "conditions": [ours, {"type": "Theirs", "status": "True"}]})
    assert [c.type for c in found.conditions] == ["Finished"]


def test_a_finetunejob_is_read() -> None:
    meta = {"namespace": "team", "name": "run", "uid": UID, "resourceVersion": "12", "generation": 3}
    found = read_finetunejob({"metadata": meta, "spec": {"suspend": True}})
    assert (found.version, found.generation, found.is_deleting, found.status.observed_generation) == (12, 3, False, -1)


# Text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("AWS_SECRET_ACCESS_KEY=abcdefgh1234 x", "AWS_SECRET_ACCESS_KEY=[redacted] x"),
        ('{"password": "hunter22"}', '{"password": "[redacted]"}'),
        ("key AKIAABCDEFGHIJKLMNOP end", "key [redacted] end"),
        ("token hf_abcdefghijklmnopqrst", "token [redacted]"),
        ("Authorization: Bearer abcdefgh.ijkl", "Authorization: Bearer [redacted]"),
        ("https://user:secret@host/x", "https://[redacted]@host/x"),
        ("maxTokens = 500 and tokenizer: fine", "maxTokens = 500 and tokenizer: fine"),
        ("a\x00b\x1b[31m", "a b [31m"),
    ],
)
def test_secrets_and_control_characters_are_not_shown(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_long_text_is_cut() -> None:
    assert len(clean("x" * 1_000_000)) == 1024


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (59, "59s"), (90, "1m30s"), (720, "12m"), (4320, "1h12m"), (7200, "2h"), (273600, "3d4h"), (-5, "0s")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_pods_compare_by_value() -> None:
    assert pod() == replace(pod())
