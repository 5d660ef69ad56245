"""The type of a rule, and functions that run rules.

A rule is a function that yields the problems of a spec, registered under a code. Rules expect the spec as the user wrote it, before
defaults are filled in (`without_defaults` removes them again). An option that would have no effect is a problem. If CEL can express
a rule, the expression is part of its registration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.spec import FineTuneJobSpec


class ExecutionTarget(StrEnum):
    """Where the job runs. Some options are only possible on the user's own machine."""

    CLUSTER = "cluster"
    """As a FineTuneJob."""
    LOCAL = "local"
    """On the user's machine, with `finetune run --local`."""


@dataclass(frozen=True)
class Problem:
    """One problem of a spec: the field's path, what was found and why it cannot work, and what to write instead."""

    path: str
    code: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.message}; {self.hint}"


Findings = Iterator[tuple[str, str, str]]
"""(path, what is wrong, what to write) of each problem."""


@dataclass(frozen=True)
class Rule:
    """A named rule; `cel` is empty if CEL cannot express it."""

    code: str
    find: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]
    cel: str = ""
    message: str = ""


RULES: list[Rule] = []


def rule(
    code: str, *, cel: str = "", message: str = ""
) -> Callable[[Callable[[FineTuneJobSpec, ExecutionTarget], Findings]], Callable[..., Findings]]:
    """Register a rule. `message` is the API server's answer when `cel` is false."""

    def register(find: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]) -> Callable[..., Findings]:
        RULES.append(Rule(code, find, cel, message))
        return find

    return register


def check(spec: FineTuneJobSpec, *, target: ExecutionTarget = ExecutionTarget.CLUSTER) -> list[Problem]:
    """All problems of a spec, in the order of the rules."""
    return [Problem(path, one.code, message, hint) for one in RULES for path, message, hint in one.find(spec, target)]


def new_problems(before: FineTuneJobSpec, after: FineTuneJobSpec) -> list[Problem]:
    """Problems of `after` that `before` does not have. Problems of an accepted spec do not forbid a change of it."""
    known = {(problem.code, problem.path) for problem in check(before)}
    return [problem for problem in check(after) if (problem.code, problem.path) not in known]


def without_defaults(spec: FineTuneJobSpec, filled: Iterable[str]) -> FineTuneJobSpec:
    """A resolved spec without the values at the filled-in paths, in the form that rules expect."""
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


def raise_first_finding(code: str, findings: Findings) -> None:
    """Raise the first finding, if there is one. Errors: ConfigError with that code."""
    for _, message, hint in findings:
        raise ConfigError(code, message, hint=hint)


def enforce_rules(spec: FineTuneJobSpec, *codes: str) -> None:
    """Raise the first problem of the rules with these codes, if there is one. Errors: ConfigError with the rule's code."""
    for one in RULES:
        if one.code in codes:
            for path, message, hint in one.find(spec, ExecutionTarget.CLUSTER):
                raise ConfigError(one.code, f"{path}: {message}", hint=hint)
