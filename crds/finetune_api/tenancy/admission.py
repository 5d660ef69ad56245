"""Writes the rules of `policy` as the CEL expressions of a ValidatingAdmissionPolicy.

The expressions are the same for every installation. The chart adds three variables with the values of the installation: `rules` (for each rule a list
of texts: patterns as `+` or `-` and a regular expression, the last pattern first; other values as one text or none), `storage` (the default
storage without a slash at the end, or an empty text) and `pools` (name, resource and default of each node pool).

Changes of a job are not checked, because a new rule must not affect running jobs. The only exception is a longer
`policy.activeDeadlineSeconds`, because no other field with a rule can change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from finetune_api.tenancy import table

HEADER = "# Generated from crds/finetune_api/tenancy by `make generate`; do not edit.\n"
IS_UPDATE = "request.operation == 'UPDATE'"


def rule_expressions_yaml() -> str:
    """Return the static variables and the validations of the ValidatingAdmissionPolicy, as YAML for the chart."""
    import yaml

    return HEADER + yaml.safe_dump({"variables": _variables(), "validations": list(_validations())}, sort_keys=False, width=1000)


def cel_at(path: str, condition: Callable[[str], str]) -> str:
    """Return CEL that is true if `condition` is true for each value at `path`. `path` has `[]` after the names of lists."""
    return _cel_below("object.spec", path.split("."), condition, 0)


def _cel_below(parent: str, names: list[str], condition: Callable[[str], str], depth: int) -> str:
    name, *rest = names
    value = f"{parent}.{name.removesuffix('[]')}"
    target = f"item{depth}" if name.endswith("[]") else value
    inner = _cel_below(target, rest, condition, depth + 1) if rest else condition(target)
    present = f"{value}.all({target}, {inner})" if name.endswith("[]") else f"({inner})"
    return f"!has({value}) || {present}"


def _either(path: str, default: str) -> str:
    """Return CEL for the value at a path without lists, or `default` if the field is absent."""
    names = path.split(".")
    parents = ["object.spec." + ".".join(names[: i + 1]) for i in range(len(names))]
    return f"{' && '.join(f'has({parent})' for parent in parents)} ? {parents[-1]} : {default}"


def _variables() -> list[dict[str, str]]:
    default_pools = "variables.pools.filter(p, p.default == 'true' && variables.gpuResource in ['', p.resource])"
    named_pools = "variables.pools.filter(p, p.resource == variables.gpuResource)"
    chosen_pool = f"(variables.gpusPerNode == 0 ? '' : (({default_pools} + {named_pools}).map(p, p.name) + [''])[0])"
    uri = "object.spec.storage.uri"
    expressions = {
        "nodes": _either("resources.nodes", "1"),
        "gpusPerNode": _either("resources.gpusPerNode", "1"),
        "generationBackend": _either("trainer.grpo.generation.backend", "''"),
        "generationGpus": f"variables.generationBackend != 'vllm' ? 0 : ({_either('trainer.grpo.generation.gpus', '1')})",
        "gpuResource": _either("resources.gpuResource", "''"),
        "pool": _either("resources.nodePool", chosen_pool),
        "storageRoot": f"has(object.spec.storage) && has({uri}) ? {table.cel_without_end_slash(uri)} : variables.storage",
        "deadline": _either("policy.activeDeadlineSeconds", "0"),
        "oldDeadline": f"{IS_UPDATE} ? ({_either('policy.activeDeadlineSeconds', '0').replace('object.', 'oldObject.')}) : 0",
    }
    return [{"name": name, "expression": expression} for name, expression in expressions.items()]


def _validations() -> Iterator[dict[str, str]]:
    """Yield the validations in the order in which `check.check_policy` reports problems."""
    yield _validation("nodePools", "resources.nodePool", table.cel_allowed("nodePools", "variables.pool"))
    for check in table.PATTERN_CHECKS:
        yield _validation(check.rule, check.path, cel_at(check.path, lambda value, check=check: check.cel(check.rule, value)))  # type: ignore[misc]
    yield _validation("destinations", "output.dir", cel_at("output.dir", _cel_output_folder))
    for rule, path in table.FORBIDDEN_IF_PRESENT:
        yield _validation(rule, path, f"{_is_true(rule)} || {cel_at(path, lambda _: 'false')}")
    for rule, path in table.FORBIDDEN_IF_TRUE:
        yield _validation(rule, path, f"{_is_true(rule)} || {cel_at(path, lambda value: f'!{value}')}")
    yield _validation("maxNodes", "resources.nodes", _within("maxNodes", "variables.nodes"))
    yield _validation("maxGpus", "resources.gpusPerNode", _within("maxGpus", "variables.nodes * (variables.gpusPerNode + variables.generationGpus)"))
    within_limit = _within("maxDurationSeconds", "variables.deadline")
    is_not_extended = "variables.oldDeadline > 0 && variables.deadline <= variables.oldDeadline"
    yield _validation("maxDurationSeconds", "policy.activeDeadlineSeconds", f"{within_limit} || ({is_not_extended})", checks_changes=True)


def _cel_output_folder(value: str) -> str:
    address = f"(variables.storageRoot + '/' + {table.cel_without_end_slash(value)})"
    return f"variables.storageRoot == '' || ({table.cel_address('destinations', address)})"


def _is_true(rule: str) -> str:
    return f"variables.rules.{rule} == ['true']"


def _within(rule: str, value: str) -> str:
    return f"variables.rules.{rule}.all(limit, {value} <= int(limit))"


def _validation(rule: str, path: str, expression: str, *, checks_changes: bool = False) -> dict[str, Any]:
    return {
        "expression": expression if checks_changes else f"{IS_UPDATE} || {expression}",
        "message": f"ForbiddenByPolicy: spec.{path}: the platform's rule policy.{rule} does not allow this value in this namespace",
        "reason": "Forbidden",
    }
