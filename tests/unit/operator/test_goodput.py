"""Goodput: into which parts the time of each attempt is split, the time of lost steps, and the sums over all attempts."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from finetune_api.names import Reason
from finetune_api.pod import TerminationMessage
from finetune_api.status import Attempt, AttemptTime, FineTuneJobStatus, Goodput, TimeUse
from finetune_operator.decide import decide
from finetune_operator.facts import Facts
from finetune_operator.goodput import AttemptTimes, PodTimes, build_goodput, split_attempt_time, split_lost_steps
from finetune_operator.metrics import Metrics
from finetune_operator.plan import ActionResult
from finetune_operator.report import KEPT_ATTEMPT_COUNT, compute_status
from finetune_operator.views import TerminatedState
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.operator.samples import T0, at, facts, iso_time, job, pod, report, spec, status

FIRST_POD = PodTimes(at(20), at(23), at(30), at(130), {"starting": 2.0, "loading": 8.0, "steps": 80.0}, last_part="other")

SECOND_POD = replace(FIRST_POD, created_at=at(150), scheduled_at=at(151), started_at=at(155), ended_at=at(200), reported={"steps": 44.0})


def make_attempt_times(**fields: Any) -> AttemptTimes:
    return replace(AttemptTimes(begins_at=T0, ends_at=at(140), job_created_at=at(15), pods=[FIRST_POD]), **fields)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({}, {"waiting": 15, "scheduling": 8, "podStart": 7, "starting": 2, "loading": 8, "steps": 80, "other": 20}),
        ({"follows_suspension": True}, {"suspended": 15, "scheduling": 8, "podStart": 7, "starting": 2, "loading": 8, "steps": 80, "other": 20}),
        ({"has_queue": True}, {"waiting": 15, "queued": 5, "scheduling": 3, "podStart": 7, "starting": 2, "loading": 8, "steps": 80, "other": 20}),
        ({"prepared": (at(1), at(11))},
         {"waiting": 5, "preparation": 10, "scheduling": 8, "podStart": 7, "starting": 2, "loading": 8, "steps": 80, "other": 20}),
        ({"pods": []}, {"waiting": 15, "scheduling": 125}),
        ({"pods": [replace(FIRST_POD, started_at=None, ended_at=None)]}, {"waiting": 15, "scheduling": 8, "podStart": 117}),
        ({"pods": [replace(FIRST_POD, scheduled_at=None, started_at=None, ended_at=None)]}, {"waiting": 15, "scheduling": 125}),
        ({"pods": [replace(FIRST_POD, reported=None, last_part="starting")]},
         {"waiting": 15, "scheduling": 8, "podStart": 7, "starting": 100, "other": 10}),
        ({"pods": [replace(FIRST_POD, last_part="steps")]},
         {"waiting": 15, "scheduling": 8, "podStart": 7, "starting": 2, "loading": 8, "steps": 90, "other": 10}),
        ({"pods": [replace(FIRST_POD, reported={"starting": 2.0, "steps": 98.7})]},
         {"waiting": 15, "scheduling": 8, "podStart": 7, "starting": 2, "steps": 98, "other": 10}),
        ({"has_queue": True, "ends_at": at(200), "pods": [FIRST_POD, SECOND_POD]},
         {"waiting": 15, "queued": 25, "scheduling": 4, "podStart": 11, "starting": 2, "loading": 8, "steps": 124, "other": 11}),
        ({"ends_at": T0 - timedelta(seconds=5)}, {}),
    ],
    ids=[
        "usual", "suspended", "queue", "prepared", "no pod", "no container", "no node", "no report", "killed", "clock skew", "evicted by a queue",
        "clock set back",
    ],
)  # fmt: skip
def test_time_of_an_attempt_is_split_into_parts(fields: dict[str, Any], parts: dict[str, float]) -> None:
    seconds_by_part = split_attempt_time(make_attempt_times(**fields))
    assert {part: round(seconds, 6) for part, seconds in seconds_by_part.items()} == parts


ANY_SECONDS = st.floats(-1000, 100_000, allow_nan=False)
ANY_TIMES = st.none() | ANY_SECONDS.map(at)
ANY_PODS = st.builds(
    PodTimes, created_at=ANY_SECONDS.map(at), scheduled_at=ANY_TIMES, started_at=ANY_TIMES, ended_at=ANY_TIMES, last_part=st.sampled_from(["steps", "other"]),
    reported=st.none() | st.dictionaries(st.sampled_from([*TimeUse.model_fields]), st.floats(0, 1e15)),
)  # fmt: skip


@given(st.builds(
    AttemptTimes, begins_at=ANY_SECONDS.map(at), ends_at=ANY_SECONDS.map(at), prepared=st.none() | st.tuples(ANY_SECONDS.map(at), ANY_SECONDS.map(at)),
    job_created_at=ANY_TIMES, has_queue=st.booleans(), follows_suspension=st.booleans(), pods=st.lists(ANY_PODS, max_size=4),
))  # fmt: skip
def test_the_parts_of_any_attempt_are_positive_and_sum_to_its_time(times: AttemptTimes) -> None:
    parts = split_attempt_time(times)
    assert min(parts.values(), default=0.0) >= 0
    assert sum(parts.values()) == pytest.approx(max(0.0, (times.ends_at - times.begins_at).total_seconds()), abs=1e-3)


def make_attempt_time(number: int, **parts: float) -> AttemptTime:
    return AttemptTime(number=number, wall_seconds=sum(parts.values()), parts=parts)


def test_steps_that_a_later_attempt_repeats_are_lost() -> None:
    records = [Attempt(number=1, last_step=100), Attempt(number=2, resumed_from_step=75, last_step=175), Attempt(number=3, resumed_from_step=50, last_step=60)]
    split_times = split_lost_steps([make_attempt_time(1, steps=200, loading=9), make_attempt_time(2, steps=100), make_attempt_time(3, steps=5)], records)
    assert [attempt_time.parts for attempt_time in split_times] == [{"steps": 100, "lostSteps": 100, "loading": 9}, {"lostSteps": 100}, {"steps": 5}]
    assert split_lost_steps(split_times, records) == split_times, "a second call must not split the time again"
    other_records = [*records[:2], Attempt(number=3, resumed_from_step=150, last_step=160)]
    assert [time.parts.get("lostSteps", 0) for time in split_lost_steps(split_times, other_records)] == [50, 25, 0], "the first repetition counts"
    records_without_start = [Attempt(number=1, last_step=5), Attempt(number=2)]
    assert split_lost_steps([make_attempt_time(1, steps=10), make_attempt_time(2)], records_without_start)[0].parts == {"steps": 10}


@given(
    st.lists(st.tuples(st.none() | st.integers(0, 50), st.none() | st.integers(0, 100), st.floats(0, 1000)), min_size=1, max_size=8),
)
def test_lost_steps_do_not_change_the_sum(history: list[tuple[int | None, int | None, float]]) -> None:
    records = [Attempt(number=number, resumed_from_step=start, last_step=last) for number, (start, last, _) in enumerate(history)]
    attempt_times = [make_attempt_time(number, steps=round(seconds, 3), loading=1) for number, (_, _, seconds) in enumerate(history)]
    for attempt_time in split_lost_steps(attempt_times, records):
        assert min(attempt_time.parts.values()) >= 0 and sum(attempt_time.parts.values()) == pytest.approx(attempt_time.wall_seconds, abs=1e-6)


# The status


def compute_status_of(job_facts: Facts) -> FineTuneJobStatus:
    return compute_status(job_facts, decide(job_facts), ActionResult())


def make_ended_pod(attempt: int, created_seconds: float, ended_seconds: float, message: TerminationMessage | None, code: int = 137) -> Any:
    message_text = message.to_json() if message else ""
    return pod(attempt, uid=f"pod-{attempt}-0", created_at=at(created_seconds), scheduled_at=at(created_seconds + 2), phase="Failed", is_ready=False,
               terminated=TerminatedState(code, "Error", message_text, at(ended_seconds), at(created_seconds + 10)))  # fmt: skip


def get_goodput(new_status: FineTuneJobStatus) -> Goodput:
    assert new_status.goodput is not None
    return new_status.goodput


def test_goodput_of_a_killed_attempt_and_of_the_next_attempt() -> None:
    first_report = report(progress={"step": 40}, timeUse={"starting": 3, "firstStep": 7, "steps": 80})
    running_facts = facts(jobs=[job(created_at=at(4))], pods=[pod(created_at=at(5), scheduled_at=at(6), running_since=at(10))], now=at(103),
                    last_report=first_report, reported_at=at(101))  # fmt: skip
    first_status = compute_status_of(running_facts)
    assert get_goodput(first_status).parts.seconds() == {"waiting": 4, "scheduling": 2, "podStart": 4, "starting": 3, "firstStep": 7, "steps": 80, "other": 1}
    assert (get_goodput(first_status).wall_seconds, get_goodput(first_status).percent) == (101, 91.6)

    failed_facts = facts(status=first_status, jobs=[job(created_at=at(4), failed_at=at(112))], pods=[make_ended_pod(1, 5, 110, None)], now=at(112),
                   last_report=first_report, reported_at=at(101))  # fmt: skip
    ended_status = compute_status_of(failed_facts)
    assert get_goodput(ended_status).parts.seconds() == {"waiting": 4, "scheduling": 3, "podStart": 8, "starting": 3, "firstStep": 7, "steps": 85, "other": 2}

    second_report = report(attempt=2, progress={"step": 31}, resumedFromStep=30, timeUse={"starting": 3, "steps": 12.5}).model_copy(update={"attempt": 2})
    second_pod = pod(2, uid="pod-1-0", created_at=at(122), scheduled_at=at(122), running_since=at(124))
    second_job = job(2, created_at=at(122))
    resumed_facts = facts(status=ended_status, jobs=[second_job], pods=[second_pod], now=at(140), last_report=second_report, reported_at=at(139.5))
    second_status = compute_status_of(resumed_facts)
    assert get_goodput(second_status).parts.seconds() == {
        "waiting": 14, "scheduling": 3, "podStart": 10, "starting": 6, "firstStep": 7, "steps": 76.25, "lostSteps": 21.25, "other": 2,
    }  # fmt: skip
    assert get_goodput(second_status).wall_seconds == 139.5
    assert [attempt_time.number for attempt_time in get_goodput(second_status).attempts] == [1, 2]

    metrics = Metrics()
    metrics.record_attempt_time(first_status.goodput, ended_status.goodput, 1)
    metrics.record_attempt_time(ended_status.goodput, second_status.goodput, None)
    name, expected = "finetune_operator_attempt_seconds_total", {"steps": 85, "lostSteps": 21.25, "podStart": 8}
    assert {part: metrics.registry.get_sample_value(name, {"part": part}) for part in expected} == expected


def test_time_of_a_suspension_belongs_to_the_next_attempt() -> None:
    old_goodput = Goodput(wall_seconds=100, attempts=[make_attempt_time(1, steps=100)])
    records = [{"number": 1, "startTime": iso_time(0), "endTime": iso_time(100), "reason": Reason.SUSPENDED}, {"number": 2, "startTime": iso_time(400)}]
    old_status = status(attempt=2, attempts=records).model_copy(update={"goodput": old_goodput})
    new_pod = pod(2, uid="pod-1-0", created_at=at(400), scheduled_at=at(400), running_since=at(400))
    job_facts = facts(status=old_status, jobs=[job(2, created_at=at(400))], pods=[new_pod], now=at(410), last_report=report(timeUse={"steps": 10}))
    assert get_goodput(compute_status_of(job_facts)).parts.seconds() == {"suspended": 300, "steps": 110}


def test_without_a_new_report_the_goodput_does_not_change() -> None:
    old_goodput = Goodput(wall_seconds=100, attempts=[make_attempt_time(1, steps=100)])
    old_status = status(attempt=1, attempts=[{"number": 1, "startTime": iso_time(0)}]).model_copy(update={"goodput": old_goodput})
    assert compute_status_of(facts(status=old_status, jobs=[job()], pods=[pod()], now=at(500))).goodput == old_goodput
    queued_facts = facts(spec=spec(placement={"queueName": "q"}), jobs=[job(is_suspended=True, queue="q")], now=at(500))
    assert compute_status_of(queued_facts).goodput is None


def test_known_parts_are_kept_if_pods_were_removed_while_the_operator_was_stopped() -> None:
    old_goodput = Goodput(wall_seconds=100, attempts=[make_attempt_time(1, steps=90, loading=10)])
    old_status = status(attempt=1, attempts=[{"number": 1, "startTime": iso_time(0)}]).model_copy(update={"goodput": old_goodput})
    ended_status = compute_status_of(facts(status=old_status, jobs=[job(failed_at=at(130))], now=at(200)))
    assert get_goodput(ended_status).parts.seconds() == {"steps": 90, "loading": 10, "other": 30}


def test_sum_includes_attempts_that_are_no_longer_listed() -> None:
    goodput = build_goodput([make_attempt_time(3, steps=5)], {"steps": 7.5, "waiting": 2})
    assert (goodput.wall_seconds, goodput.parts.seconds(), goodput.percent) == (14.5, {"waiting": 2, "steps": 12.5}, 100.0)
    assert goodput.earlier == {"steps": 7.5, "waiting": 2}
    begin: datetime = at(0)
    old_goodput = Goodput(wall_seconds=100, attempts=[make_attempt_time(number, steps=10) for number in range(1, KEPT_ATTEMPT_COUNT + 1)])
    old_status = status(attempt=11, attempts=[{"number": 11, "startTime": iso_time(100)}]).model_copy(update={"goodput": old_goodput})
    job_facts = facts(status=old_status, jobs=[job(11, created_at=at(100))], now=at(110), created_at=begin, last_report=report(timeUse={"steps": 10}),
                     pods=[pod(11, uid="pod-1-0", created_at=at(100), scheduled_at=at(100), running_since=at(100))])  # fmt: skip
    new_goodput = get_goodput(compute_status_of(job_facts))
    assert (new_goodput.wall_seconds, new_goodput.earlier, [time.number for time in new_goodput.attempts]) == (110, {"steps": 10}, list(range(2, 12)))
