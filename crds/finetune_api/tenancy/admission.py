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
IS_UPDATE_CEL = "request.operation == 'UPDATE'"


def build_admission_rules_yaml() -> str:
    """Return the YAML file of the chart with the variables and validations that are the same for every installation."""
    import yaml

    return HEADER + yaml.safe_dump({"variables": _make_variables(), "validations": list(_iterate_validations())}, sort_keys=False, width=1000)


def build_cel_for_each(path: str, build_condition: Callable[[str], str]) -> str:
    """Return CEL that is true if `build_condition` is true for each value at `path`. In `path`, the name of a list ends with `[]`."""
    return _build_cel_for_each_below("object.spec", path.split("."), build_condition, 0)


def _build_cel_for_each_below(parent_cel: str, field_names: list[str], build_condition: Callable[[str], str], depth: int) -> str:
    name, *names_below = field_names
    value_cel = f"{parent_cel}.{name.removesuffix('[]')}"
    target_cel = f"item{depth}" if name.endswith("[]") else value_cel
    condition_cel = _build_cel_for_each_below(target_cel, names_below, build_condition, depth + 1) if names_below else build_condition(target_cel)
    condition_if_present_cel = f"{value_cel}.all({target_cel}, {condition_cel})" if name.endswith("[]") else f"({condition_cel})"
    return f"!has({value_cel}) || {condition_if_present_cel}"


def _build_cel_with_default(path: str, default: str) -> str:
    """Return CEL for the value at a path without lists. The CEL returns `default` if the field is missing."""
    field_names = path.split(".")
    prefix_cels = ["object.spec." + ".".join(field_names[: i + 1]) for i in range(len(field_names))]
    return f"{' && '.join(f'has({prefix_cel})' for prefix_cel in prefix_cels)} ? {prefix_cels[-1]} : {default}"


def _make_variables() -> list[dict[str, str]]:
    default_pools_cel = "variables.pools.filter(p, p.default == 'true' && variables.gpuResource in ['', p.resource])"
    pools_of_resource_cel = "variables.pools.filter(p, p.resource == variables.gpuResource)"
    chosen_pool_cel = f"(variables.gpusPerNode == 0 ? '' : (({default_pools_cel} + {pools_of_resource_cel}).map(p, p.name) + [''])[0])"
    storage_uri_cel = "object.spec.storage.uri"
    expressions = {
        "nodes": _build_cel_with_default("resources.nodes", "1"),
        "gpusPerNode": _build_cel_with_default("resources.gpusPerNode", "1"),
        "generationBackend": _build_cel_with_default("trainer.grpo.generation.backend", "''"),
        "generationGpus": f"variables.generationBackend != 'vllm' ? 0 : ({_build_cel_with_default('trainer.grpo.generation.gpus', '1')})",
        "gpuResource": _build_cel_with_default("resources.gpuResource", "''"),
        "pool": _build_cel_with_default("resources.nodePool", chosen_pool_cel),
        "storageRoot": f"has(object.spec.storage) && has({storage_uri_cel}) ? {table.build_cel_without_end_slash(storage_uri_cel)} : variables.storage",
        "deadline": _build_cel_with_default("policy.activeDeadlineSeconds", "0"),
        "oldDeadline": f"{IS_UPDATE_CEL} ? ({_build_cel_with_default('policy.activeDeadlineSeconds', '0').replace('object.', 'oldObject.')}) : 0",
    }
    return [{"name": name, "expression": expression} for name, expression in expressions.items()]


def _iterate_validations() -> Iterator[dict[str, str]]:
    """Yield the validations in the order in which `check.check_policy` reports problems."""
    yield _make_validation("nodePools", "resources.nodePool", table.build_cel_allowed("nodePools", "variables.pool"))
    for check in table.PATTERN_CHECKS:
        yield _make_validation(check.rule, check.path, build_cel_for_each(check.path, lambda value_cel, check=check: check.build_cel(check.rule, value_cel)))  # type: ignore[misc]
    yield _make_validation("destinations", "output.dir", build_cel_for_each("output.dir", _build_cel_for_output_folder))
    for rule, path in table.FORBIDDEN_IF_PRESENT:
        yield _make_validation(rule, path, f"{_build_cel_for_true_rule(rule)} || {build_cel_for_each(path, lambda _: 'false')}")
    for rule, path in table.FORBIDDEN_IF_TRUE:
        yield _make_validation(rule, path, f"{_build_cel_for_true_rule(rule)} || {build_cel_for_each(path, lambda value_cel: f'!{value_cel}')}")
    yield _make_validation("maxNodes", "resources.nodes", _build_cel_for_limit("maxNodes", "variables.nodes"))
    gpu_count_cel = "variables.nodes * (variables.gpusPerNode + variables.generationGpus)"
    yield _make_validation("maxGpus", "resources.gpusPerNode", _build_cel_for_limit("maxGpus", gpu_count_cel))
    is_within_limit_cel = _build_cel_for_limit("maxDurationSeconds", "variables.deadline")
    is_not_extended_cel = "variables.oldDeadline > 0 && variables.deadline <= variables.oldDeadline"
    yield _make_validation("maxDurationSeconds", "policy.activeDeadlineSeconds", f"{is_within_limit_cel} || ({is_not_extended_cel})", checks_changes=True)


def _build_cel_for_output_folder(value_cel: str) -> str:
    address_cel = f"(variables.storageRoot + '/' + {table.build_cel_without_end_slash(value_cel)})"
    return f"variables.storageRoot == '' || ({table.build_cel_for_address('destinations', address_cel)})"


def _build_cel_for_true_rule(rule: str) -> str:
    return f"variables.rules.{rule} == ['true']"


def _build_cel_for_limit(rule: str, value_cel: str) -> str:
    return f"variables.rules.{rule}.all(limit, {value_cel} <= int(limit))"


def _make_validation(rule: str, path: str, expression: str, *, checks_changes: bool = False) -> dict[str, Any]:
    return {
        "expression": expression if checks_changes else f"{IS_UPDATE_CEL} || {expression}",
        "message": f"ForbiddenByPolicy: spec.{path}: the platform's rule policy.{rule} does not allow this value in this namespace",
        "reason": "Forbidden",
    }
