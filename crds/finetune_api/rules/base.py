"""Registers rules and runs them.

A rule has a code, and a function that yields the problems of a spec. Rules also refuse options that have no effect but that the user set. Rules therefore need
a spec without filled-in defaults: either the user's spec or the result of `remove_defaults`.
A rule that CEL can express is registered together with its CEL expression, so that the API server checks it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_api.errors import ConfigError
from finetune_api.spec import FineTuneJobSpec


class ExecutionTarget(StrEnum):
    """Where a job runs. Some options are possible only in a cluster, others only in a local run."""

    CLUSTER = "cluster"
    """The job runs in a cluster, as a FineTuneJob."""
    LOCAL = "local"
    """The job runs on the user's machine, with `finetune run --local`."""


@dataclass(frozen=True)
class Problem:
    """One problem of a spec."""

    path: str
    """Path of the wrong field, without the leading `spec.`"""
    code: str
    """Code of the rule that found the problem."""
    message: str
    hint: str
    """What the user should write instead."""

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.message}; {self.hint}"


Findings = Iterator[tuple[str, str, str]]
"""What a rule yields: (path, message, hint) for each problem."""


@dataclass(frozen=True)
class Rule:
    """A registered rule."""

    code: str
    find_problems: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]
    cel: str = ""
    """The CEL expression that the API server evaluates; empty if CEL cannot express the rule."""
    message: str = ""
    """Error message of the API server if the CEL expression is false."""


RULES: list[Rule] = []
"""All registered rules, in the order in which they run."""


def rule(
    code: str, *, cel: str = "", message: str = ""
) -> Callable[[Callable[[FineTuneJobSpec, ExecutionTarget], Findings]], Callable[..., Findings]]:
    """Return a decorator that registers a function as a rule. `message`: the API server's error message if `cel` is false."""

    def register(find_problems: Callable[[FineTuneJobSpec, ExecutionTarget], Findings]) -> Callable[..., Findings]:
        RULES.append(Rule(code, find_problems, cel, message))
        return find_problems

    return register


def check_spec(spec: FineTuneJobSpec, *, target: ExecutionTarget = ExecutionTarget.CLUSTER) -> list[Problem]:
    """Return all problems of a spec, in the order of `RULES`."""
    return [Problem(path, registered_rule.code, message, hint) for registered_rule in RULES for path, message, hint in registered_rule.find_problems(spec, target)]


def new_problems(old_spec: FineTuneJobSpec, new_spec: FineTuneJobSpec) -> list[Problem]:
    """Return the problems of `new_spec` that `old_spec` does not have. A change of a spec is refused only because of new problems."""
    known_problems = {(problem.code, problem.path) for problem in check_spec(old_spec)}
    return [problem for problem in check_spec(new_spec) if (problem.code, problem.path) not in known_problems]


def remove_defaults(spec: FineTuneJobSpec, filled_paths: Iterable[str]) -> FineTuneJobSpec:
    """Return a copy of a resolved spec without the defaults at `filled_paths`. Rules need a spec without filled-in defaults."""
    spec_values = spec.to_wire()
    for path in filled_paths:
        *group_names, name = path.split(".")
        group_value: Any = spec_values
        for group_name in group_names:
            group_value = group_value.get(group_name, {}) if isinstance(group_value, dict) else {}
        group_value.pop(name, None)
    return FineTuneJobSpec.model_validate({key: _remove_empty_groups(group) for key, group in spec_values.items()})


def _remove_empty_groups(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    cleaned_values = {key: _remove_empty_groups(nested_value) for key, nested_value in value.items()}
    return {key: nested_value for key, nested_value in cleaned_values.items() if nested_value != {}}


def raise_first_finding(code: str, findings: Findings) -> None:
    """Raise the first finding as a ConfigError with this code. Return if there is no finding."""
    for _, message, hint in findings:
        raise ConfigError(code, message, hint=hint)


def enforce_rules(spec: FineTuneJobSpec, *codes: str) -> None:
    """Run the rules with these codes. Raise the first problem as a ConfigError with the rule's code."""
    for registered_rule in RULES:
        if registered_rule.code in codes:
            for path, message, hint in registered_rule.find_problems(spec, ExecutionTarget.CLUSTER):
                raise ConfigError(registered_rule.code, f"{path}: {message}", hint=hint)
