"""The goals of `finetune wait --for`: a condition, the existence of a job, or a value at a JSONPath."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from finetune_api.names import Condition, Phase
from finetune_api.status import FineTuneJobStatus

from finetune_cli.jsonpath import EXAMPLE, JsonPath, parse_json_path, to_kubectl_text
from finetune_cli.output import CommandError
from finetune_cli.status_text import has_succeeded, parse_status

RUNNING = "running"
GOAL_EXAMPLES = f"condition=Finished, condition=Suspended=False, jsonpath='{EXAMPLE}'=Running, create, delete"
OPTIONAL_CONDITIONS = (Condition.SUSPENDED, Condition.RECONCILING, Condition.STALLED)
"""Conditions that a job need not reach to succeed. Every successful job reaches all other conditions."""
_DURATION_PATTERN = re.compile(r"^(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?$")
WEEK_SECONDS = 7 * 24 * 3600


class InvalidGoal(CommandError):
    """The value of `--for` or `--timeout` cannot be used."""


class Existence(StrEnum):
    """Goals about the existence of the job."""

    CREATE = "create"
    """The job exists."""
    DELETE = "delete"
    """The job does not exist."""


@dataclass(frozen=True)
class ConditionGoal:
    """The goal that the job has a condition with a certain status."""

    condition: Condition
    status: str = "True"
    ends_with_job: ClassVar[bool] = True
    """Whether a job that has ended can no longer reach the goal."""

    def is_reached(self, job: dict[str, Any]) -> bool:
        """Whether the job has the condition with this status."""
        condition = parse_status(job).condition(self.condition)
        return condition is not None and condition.status == self.status

    def accepts_failed_job(self) -> bool:
        """Return whether the wait succeeds if the job has failed, but has reached the goal."""
        return (self.condition, self.status) in ((Condition.SUCCEEDED, "False"), (Condition.STALLED, "True"))

    def is_reached_without_observation(self, status: FineTuneJobStatus) -> bool:
        """Return whether a job that has ended counts as having reached the goal, even if this program never saw a status that reached it."""
        return self.status == "True" and self.condition not in OPTIONAL_CONDITIONS and has_succeeded(status)


@dataclass(frozen=True)
class RunningGoal:
    """The goal that the model is being trained, evaluated or uploaded. A job that has succeeded has reached this goal earlier."""

    ends_with_job: ClassVar[bool] = True

    def is_reached(self, job: dict[str, Any]) -> bool:
        """Whether a pod trains, evaluates or uploads."""
        return parse_status(job).phase in (Phase.RUNNING, Phase.EVALUATING, Phase.UPLOADING)

    def accepts_failed_job(self) -> bool:
        """Return False: the wait for a failed job never succeeds."""
        return False

    def is_reached_without_observation(self, status: FineTuneJobStatus) -> bool:
        """Whether the job has succeeded. A job that has succeeded was running before, so it has reached the goal."""
        return has_succeeded(status)


@dataclass(frozen=True)
class JsonPathGoal:
    """The goal that the job has a certain value at a JSONPath. If `value` is None, any value at this path reaches the goal."""

    path: JsonPath
    value: str | None = None

    def is_reached(self, job: dict[str, Any]) -> bool:
        """Whether the path has the value. Raises InvalidGoal if the path selects several values, a list or an object."""
        found_values = self.path.find(job)
        if self.value is None or not found_values:
            return bool(found_values)
        if len(found_values) > 1 or isinstance(found_values[0], dict | list):
            content_text = f"{len(found_values)} values" if len(found_values) > 1 else "an object or a list"
            raise InvalidGoal(f"{self.path.text} has {content_text}, which cannot equal {self.value!r}; write the path of one value, for example {EXAMPLE}")
        return to_kubectl_text(found_values[0]) == self.value

    @property
    def ends_with_job(self) -> bool:
        """Whether the path is in the status of the job. After the end of the job, the status does not change any more."""
        return self.path.steps[0] == ".status"

    def accepts_failed_job(self) -> bool:
        """Return True, because the user may have chosen a value that only a failed job has."""
        return True

    def is_reached_without_observation(self, status: FineTuneJobStatus) -> bool:
        """Return False, because the goal is reached only when this program sees the value."""
        return False


Goal = ConditionGoal | RunningGoal | JsonPathGoal | Existence


def parse_goal(text: str) -> Goal:
    """Parse the value of `--for`: the syntax of `kubectl wait`, `running`, or the name of a condition. Raises InvalidGoal, InvalidJsonPath."""
    kind, equals_sign, argument = text.partition("=")
    match kind.lower():
        case "delete" | "create" if not equals_sign:
            return Existence(kind.lower())
        case "jsonpath" if argument:
            return _parse_json_path_goal(argument)
        case "condition" if argument:
            name, _, status = argument.partition("=")
            return ConditionGoal(_parse_condition(name, text), _parse_status(status, text))
        case "running" if not equals_sign:
            return RunningGoal()
    if equals_sign:
        raise InvalidGoal(f"--for {text}: write one of {GOAL_EXAMPLES}")
    return ConditionGoal(_parse_condition(text, text))


def _parse_condition(name: str, goal_text: str) -> Condition:
    condition_type = {condition.value.lower(): condition for condition in Condition}.get(name.lower())
    if condition_type is None:
        raise InvalidGoal(f"--for {goal_text}: unknown condition; write one of {RUNNING}, {', '.join(Condition)}; other forms: {GOAL_EXAMPLES}")
    return condition_type


def _parse_status(status: str, goal_text: str) -> str:
    condition_status = next((allowed_status for allowed_status in ("True", "False", "Unknown") if allowed_status.lower() == (status or "True").lower()), None)
    if condition_status is None:
        raise InvalidGoal(f"--for {goal_text}: {status} is not the status of a condition; write True, False or Unknown")
    return condition_status


def _parse_json_path_goal(text: str) -> JsonPathGoal:
    goal_text = text.strip("'\"") if text.endswith(("'", '"')) else text
    if goal_text.startswith("{") or goal_text.startswith(("'{", '"{')):
        path, brace, rest = goal_text.rpartition("}")
        path, rest = path + brace, rest.lstrip("'\"")
    else:
        separator_match = re.search(r"=(?![^\[]*\])", goal_text)
        path, rest = (goal_text[: separator_match.start()], goal_text[separator_match.start() :]) if separator_match else (goal_text, "")
    if rest and not rest.startswith("="):
        raise InvalidGoal(f"--for jsonpath={text}: write `=` and a value after the path, for example jsonpath='{EXAMPLE}'=Running")
    return JsonPathGoal(parse_json_path(path), rest[1:].strip("'\"") if rest else None)


def parse_timeout(text: str | None) -> float | None:
    """Convert a time limit such as `90`, `30s`, `5m` or `1h30m` to seconds. As in kubectl, a negative time means one week. Raises InvalidGoal."""
    if text is None:
        return None
    if text.startswith("-") and text[1:]:
        parse_timeout(text[1:])
        return WEEK_SECONDS
    match = _DURATION_PATTERN.match(text) if text else None
    if match is None:
        raise InvalidGoal(f"--timeout {text}: this is not a duration; write for example 90, 30s, 5m or 1h30m")
    hours, minutes, seconds = (float(amount or 0) for amount in match.groups())
    return hours * 3600 + minutes * 60 + seconds
