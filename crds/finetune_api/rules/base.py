"""The type of a rule, and functions that run rules.

A rule is a function with a code that yields the problems of a spec. Rules need a spec without filled-in defaults: either the user's spec
or the result of `without_defaults`. Rules also refuse options without effect. If CEL can express a rule, the registration contains the
CEL expression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.spec import FineTuneJobSpec


class ExecutionTarget(StrEnum):
    """Place where the job runs. Some options are only possible in local runs."""

    CLUSTER = "cluster"
    """In a cluster, as a FineTuneJob."""
    LOCAL = "local"
    """On the user's machine, with `finetune run --local`."""


@dataclass(frozen=True)
class Problem:
    """One problem of a spec: the field's path, the rule's code, the error, and a hint that tells the user what to write."""

    path: str
    code: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.message}; {self.hint}"


Findings = Iterator[tuple[str, str, str]]
"""Yields (path, message, hint) for each problem."""


@dataclass(frozen=True)
class Rule:
    """A registered rule. `cel` is empty if CEL cannot express the rule."""

    code: str
    find_problems: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]
    cel: str = ""
    message: str = ""


RULES: list[Rule] = []


def rule(
    code: str, *, cel: str = "", message: str = ""
) -> Callable[[Callable[[FineTuneJobSpec, ExecutionTarget], Findings]], Callable[..., Findings]]:
    """Register a rule. `message` is the API server's error message if `cel` is false."""

    def register(find: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]) -> Callable[..., Findings]:
        RULES.append(Rule(code, find, cel, message))
        return find

    return register


def check(spec: FineTuneJobSpec, *, target: ExecutionTarget = ExecutionTarget.CLUSTER) -> list[Problem]:
    """Return all problems of a spec, in the order of `RULES`."""
    return [Problem(path, entry.code, message, hint) for entry in RULES for path, message, hint in entry.find_problems(spec, target)]


def new_problems(old_spec: FineTuneJobSpec, new_spec: FineTuneJobSpec) -> list[Problem]:
    """Return the problems of `after` that `before` does not have. A change of a spec is refused only because of new problems."""
    known_problems = {(problem.code, problem.path) for problem in check(old_spec)}
    return [problem for problem in check(new_spec) if (problem.code, problem.path) not in known_problems]


def without_defaults(spec: FineTuneJobSpec, filled_paths: Iterable[str]) -> FineTuneJobSpec:
    """Return a copy of a resolved spec without the values at the paths `filled`. Rules need a spec without filled-in defaults."""
    value = spec.to_wire()
    for path in filled_paths:
        *groups, name = path.split(".")
        group_value: Any = value
        for group in groups:
            group_value = group_value.get(group, {}) if isinstance(group_value, dict) else {}
        group_value.pop(name, None)
    return FineTuneJobSpec.model_validate({key: _without_empty(group) for key, group in value.items()})


def _without_empty(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    cleaned = {key: _without_empty(inner) for key, inner in value.items()}
    return {key: inner for key, inner in cleaned.items() if inner != {}}


def raise_first_finding(code: str, findings: Findings) -> None:
    """Raise the first finding as ConfigError with `code`. Without findings, do nothing."""
    for _, message, hint in findings:
        raise ConfigError(code, message, hint=hint)


def enforce_rules(spec: FineTuneJobSpec, *codes: str) -> None:
    """Check the rules with these codes, and raise the first problem as ConfigError with the rule's code."""
    for entry in RULES:
        if entry.code in codes:
            for path, message, hint in entry.find_problems(spec, ExecutionTarget.CLUSTER):
                raise ConfigError(entry.code, f"{path}: {message}", hint=hint)
