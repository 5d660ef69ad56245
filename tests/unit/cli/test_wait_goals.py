"""The goals and time limits of `finetune wait`, and JSONPath expressions."""

from __future__ import annotations

from typing import Any

import pytest
from finetune_api.names import Condition
from finetune_cli.jsonpath import InvalidJsonPath, parse_json_path
from finetune_cli.wait_goals import (
    ConditionGoal,
    Existence,
    InvalidGoal,
    JsonPathGoal,
    RunningGoal,
    parse_goal,
    parse_timeout,
)

JOB: dict[str, Any] = {
    "metadata": {"labels": {"a.b/c": "x"}},
    "spec": {"suspend": True},
    "status": {"phase": "Running", "attempt": 2, "conditions": [{"type": "Accepted", "status": "True"}, {"type": "Finished", "status": "False"}]},
}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{.status.phase}", ["Running"]), (".status.phase", ["Running"]), ("status.phase", ["Running"]), ("'{.status.phase}'", ["Running"]),
        ("$.status.attempt", [2]), ("{.status.conditions[0].type}", ["Accepted"]), ("{.status.conditions[-1].type}", ["Finished"]),
        ("{.status.conditions[*].status}", ["True", "False"]), ("{.status.conditions[9].type}", []), ("{.status.none.phase}", []),
        ('{.status.conditions[?(@.type=="Finished")].status}', ["False"]), ("{.status.conditions[?(@.type=='Accepted')].status}", ["True"]),
        ("{.metadata.labels['a.b/c']}", ["x"]), (r"{.metadata.labels.a\.b/c}", ["x"]),
    ],
)  # fmt: skip
def test_json_paths_find_values(text: str, values: list[Any]) -> None:
    assert parse_json_path(text).find(JOB) == values


@pytest.mark.parametrize("text", ["{..phase}", "{.status[}", "{.a[1:2]}", "{.a[?(@.b>1)]}", "{}", ""])
def test_unknown_json_paths_are_refused(text: str) -> None:
    with pytest.raises(InvalidJsonPath, match="is not understood; write a path such as"):
        parse_json_path(text)


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("Finished", ConditionGoal(Condition.FINISHED)), ("condition=finished", ConditionGoal(Condition.FINISHED)),
        ("condition=Suspended=false", ConditionGoal(Condition.SUSPENDED, "False")), ("delete", Existence.DELETE), ("Create", Existence.CREATE),
        ("running", RunningGoal()),
    ],
)  # fmt: skip
def test_goals_are_parsed(text: str, goal: object) -> None:
    assert parse_goal(text) == goal


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("jsonpath={.status.phase}=Running", "{.status.phase}", "Running"), ("jsonpath='{.status.phase}'=Running", "'{.status.phase}", "Running"),
        ("jsonpath='{.status.phase}'", "{.status.phase}", None), ("jsonpath=.status.phase='Running'", ".status.phase", "Running"),
        ('jsonpath={.status.conditions[?(@.type=="Accepted")].status}=True', '{.status.conditions[?(@.type=="Accepted")].status}', "True"),
        ('jsonpath=.status.conditions[?(@.type=="Accepted")].status=True', '.status.conditions[?(@.type=="Accepted")].status', "True"),
    ],
)  # fmt: skip
def test_json_path_goals_are_parsed(text: str, path: str, value: str | None) -> None:
    goal = parse_goal(text)
    assert isinstance(goal, JsonPathGoal)
    assert (goal.path.text, goal.value, goal.is_reached(JOB)) == (path, value, True)
    assert goal.ends_with_job


def test_values_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InvalidGoal, match="has 2 values, which cannot equal 'True'"):
        parse_goal("jsonpath={.status.conditions[*].status}=True").is_reached(JOB)  # type: ignore[union-attr]
    with pytest.raises(InvalidGoal, match="has an object or a list, which cannot equal 'x'"):
        parse_goal("jsonpath={.status}=x").is_reached(JOB)  # type: ignore[union-attr]
    goal = parse_goal("jsonpath={.spec.suspend}=true")
    assert isinstance(goal, JsonPathGoal)
    assert (goal.is_reached(JOB), goal.ends_with_job) == (True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("condition=Nonsense", "--for condition=Nonsense: unknown condition; write one of running, Accepted"),
        ("condition=Finished=yes", "--for condition=Finished=yes: yes is not the status of a condition; write True, False or Unknown"),
        ("phase=Running", "--for phase=Running: write one of condition=Finished, "), ("jsonpath=", "--for jsonpath=: write one of"),
        ("jsonpath={.a}x", "write `=` and a value after the path"),
    ],
)  # fmt: skip
def test_wrong_goals_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidGoal) as refused:
        parse_goal(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("30s", 30), ("5m", 300), ("1h30m", 5400), ("0", 0), ("1.5h", 5400), ("-1s", 604800), (None, None)],
)
def test_time_limits_are_parsed(text: str | None, seconds: float | None) -> None:
    assert parse_timeout(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "5 minutes", "1d", "-"])
def test_wrong_time_limits_are_refused(text: str) -> None:
    with pytest.raises(InvalidGoal, match="this is not a duration; write for example 90, 30s, 5m or 1h30m"):
        parse_timeout(text)
