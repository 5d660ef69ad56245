"""What a rule is: a function from a spec to the problems it finds, registered under a code; and how rules are asked.

Rules look at what the user wrote, before defaults are filled in (`as_written` takes them out again). An option that would have no
effect is a problem, not a shrug. Where CEL can say the same, the expression stands beside the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.spec import FineTuneJobSpec


class ExecutionTarget(StrEnum):
    """Where the job is to run: some things are only possible on the user's own machine."""

    CLUSTER = "cluster"
    LOCAL = "local"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, what was found and why it cannot be, what to write."""

    path: str
    code: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.message}; {self.hint}"


Findings = Iterator[tuple[str, str, str]]
"""(path, what is wrong, what to write)."""


@dataclass(frozen=True)
class Rule:
    """A named rule; `cel` is empty where only code can say it."""

    code: str
    find: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]
    cel: str = ""
    message: str = ""


RULES: list[Rule] = []


def rule(
    code: str, *, cel: str = "", message: str = ""
) -> Callable[[Callable[[FineTuneJobSpec, ExecutionTarget], Findings]], Callable[..., Findings]]:
    """Register a rule; `message` is what the API server says when `cel` is false."""

    def register(find: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]) -> Callable[..., Findings]:
        RULES.append(Rule(code, find, cel, message))
        return find

    return register


def check(spec: FineTuneJobSpec, *, target: ExecutionTarget = ExecutionTarget.CLUSTER) -> list[Problem]:
    """All problems of a spec, in the order of the rules; empty: it can be run as far as the spec alone tells."""
    return [Problem(path, one.code, message, hint) for one in RULES for path, message, hint in one.find(spec, target)]


def new_problems(before: FineTuneJobSpec, after: FineTuneJobSpec) -> list[Problem]:
    """What `after` breaks and `before` did not: nobody is refused for what he wrote and what was accepted."""
    known = {(problem.code, problem.path) for problem in check(before)}
    return [problem for problem in check(after) if (problem.code, problem.path) not in known]


def without_defaults(spec: FineTuneJobSpec, filled: Iterable[str]) -> FineTuneJobSpec:
    """A resolved spec without what was filled in (wire paths), as rules want to see it."""
    value = spec.to_wire()
    for path in filled:
        *groups, name = path.split(".")
        inner: Any = value
        for group in groups:
            inner = inner.get(group, {}) if isinstance(inner, dict) else {}
        inner.pop(name, None)
    return FineTuneJobSpec.model_validate({key: _without_empty(group) for key, group in value.items()})


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _without_empty(one) for key, one in value.items()}
    return {key: one for key, one in inner.items() if one != {}}


def raise_first_finding(code: str, found: Findings) -> None:
    """End with the first problem found. Errors: ConfigError with that code."""
    for _, message, hint in found:
        raise ConfigError(code, message, hint=hint)


def enforce_rules(spec: FineTuneJobSpec, *codes: str) -> None:
    """End with the first problem of the named rules. Errors: ConfigError with the rule's code."""
    for one in RULES:
        if one.code in codes:
            for path, message, hint in one.find(spec, ExecutionTarget.CLUSTER):
                raise ConfigError(one.code, f"{path}: {message}", hint=hint)


def problem_paths(problems: Iterable[Problem]) -> list[str]:
    """Field paths of some problems, in order."""
    return [problem.path for problem in problems]
