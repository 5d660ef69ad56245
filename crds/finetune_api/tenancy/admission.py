"""Writes the rules of `policy` as the CEL expressions of a ValidatingAdmissionPolicy.

The expressions are the same for every installation. The chart adds three variables with the values of the installation:

* `rules`: a list of texts for each rule. Each pattern is a regular expression with `+` (allows) or `-` (refuses) in front; the last pattern of the
  policy comes first. A number or a boolean is one text. If a limit is not set, its list is empty.
* `storage`: the address of the default storage without a slash at the end, or an empty text.
* `pools`: name, GPU resource, and whether it is a default, of each node pool.

The expressions check new jobs only, because a new rule must not affect running jobs. The one exception is `policy.activeDeadlineSeconds`, which
is also checked in existing jobs, because users can change this field in an existing job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from finetune_api.tenancy import table

HEADER = "# Generated from crds/finetune_api/tenancy by `make generate`; do not edit.\n"
IS_UPDATE = "request.operation == 'UPDATE'"


def build_admission_rules_yaml() -> str:
    """Return the YAML file of the chart with the variables and validations that are the same for every installation."""
    import yaml

    return HEADER + yaml.safe_dump({"variables": _make_variables(), "validations": list(_iterate_validations())}, sort_keys=False, width=1000)


def cel_for_each(path: str, condition: Callable[[str], str]) -> str:
    """Return CEL that is true if `condition` is true for each value at `path`. In `path`, the name of a list ends with `[]`."""
    return _cel_for_each_below("object.spec", path.split("."), condition, 0)


def _cel_for_each_below(parent: str, names: list[str], condition: Callable[[str], str], depth: int) -> str:
    name, *rest = names
    value = f"{parent}.{name.removesuffix('[]')}"
    target = f"item{depth}" if name.endswith("[]") else value
    inner = _cel_for_each_below(target, rest, condition, depth + 1) if rest else condition(target)
    present = f"{value}.all({target}, {inner})" if name.endswith("[]") else f"({inner})"
    return f"!has({value}) || {present}"


def _cel_or_default(path: str, default: str) -> str:
    """Return CEL for the value at a path without lists. The CEL returns `default` if the field is missing."""
    names = path.split(".")
    parents = ["object.spec." + ".".join(names[: i + 1]) for i in range(len(names))]
    return f"{' && '.join(f'has({parent})' for parent in parents)} ? {parents[-1]} : {default}"


def _make_variables() -> list[dict[str, str]]:
    default_pools = "variables.pools.filter(p, p.default == 'true' && variables.gpuResource in ['', p.resource])"
    named_pools = "variables.pools.filter(p, p.resource == variables.gpuResource)"
    chosen_pool = f"(variables.gpusPerNode == 0 ? '' : (({default_pools} + {named_pools}).map(p, p.name) + [''])[0])"
    uri = "object.spec.storage.uri"
    expressions = {
        "nodes": _cel_or_default("resources.nodes", "1"),
        "gpusPerNode": _cel_or_default("resources.gpusPerNode", "1"),
        "generationBackend": _cel_or_default("trainer.grpo.generation.backend", "''"),
        "generationGpus": f"variables.generationBackend != 'vllm' ? 0 : ({_cel_or_default('trainer.grpo.generation.gpus', '1')})",
        "gpuResource": _cel_or_default("resources.gpuResource", "''"),
        "pool": _cel_or_default("resources.nodePool", chosen_pool),
        "storageRoot": f"has(object.spec.storage) && has({uri}) ? {table.cel_without_end_slash(uri)} : variables.storage",
        "deadline": _cel_or_default("policy.activeDeadlineSeconds", "0"),
        "oldDeadline": f"{IS_UPDATE} ? ({_cel_or_default('policy.activeDeadlineSeconds', '0').replace('object.', 'oldObject.')}) : 0",
    }
    return [{"name": name, "expression": expression} for name, expression in expressions.items()]


def _iterate_validations() -> Iterator[dict[str, str]]:
    """Yield the validations in the order in which `check.check_policy` reports problems."""
    yield _make_validation("nodePools", "resources.nodePool", table.cel_allowed("nodePools", "variables.pool"))
    for check in table.PATTERN_CHECKS:
        yield _make_validation(check.rule, check.path, cel_for_each(check.path, lambda value, check=check: check.build_cel(check.rule, value)))  # type: ignore[misc]
    yield _make_validation("destinations", "output.dir", cel_for_each("output.dir", _cel_output_folder))
    for rule, path in table.FORBIDDEN_IF_PRESENT:
        yield _make_validation(rule, path, f"{_cel_is_true(rule)} || {cel_for_each(path, lambda _: 'false')}")
    for rule, path in table.FORBIDDEN_IF_TRUE:
        yield _make_validation(rule, path, f"{_cel_is_true(rule)} || {cel_for_each(path, lambda value: f'!{value}')}")
    yield _make_validation("maxNodes", "resources.nodes", _cel_within_limit("maxNodes", "variables.nodes"))
    gpus = "variables.nodes * (variables.gpusPerNode + variables.generationGpus)"
    yield _make_validation("maxGpus", "resources.gpusPerNode", _cel_within_limit("maxGpus", gpus))
    is_within_limit = _cel_within_limit("maxDurationSeconds", "variables.deadline")
    is_not_extended = "variables.oldDeadline > 0 && variables.deadline <= variables.oldDeadline"
    yield _make_validation("maxDurationSeconds", "policy.activeDeadlineSeconds", f"{is_within_limit} || ({is_not_extended})", checks_changes=True)


def _cel_output_folder(value: str) -> str:
    address = f"(variables.storageRoot + '/' + {table.cel_without_end_slash(value)})"
    return f"variables.storageRoot == '' || ({table.cel_address('destinations', address)})"


def _cel_is_true(rule: str) -> str:
    return f"variables.rules.{rule} == ['true']"


def _cel_within_limit(rule: str, value: str) -> str:
    return f"variables.rules.{rule}.all(limit, {value} <= int(limit))"


def _make_validation(rule: str, path: str, expression: str, *, checks_changes: bool = False) -> dict[str, Any]:
    return {
        "expression": expression if checks_changes else f"{IS_UPDATE} || {expression}",
        "message": f"ForbiddenByPolicy: spec.{path}: the platform's rule policy.{rule} does not allow this value in this namespace",
        "reason": "Forbidden",
    }
