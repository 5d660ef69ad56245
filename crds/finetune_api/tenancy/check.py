"""Applies the rules of the platform's policy to a spec. `admission` writes the same rules for the API server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_api.rules import gpus_per_pod
from finetune_api.spec import FineTuneJobSpec
from finetune_api.tenancy import table
from finetune_api.tenancy.patterns import ALLOW_EVERYTHING, allows
from finetune_api.tenancy.settings import PolicyRules
from finetune_api.tenancy.table import FieldText, Platform, Pool

__all__ = ["Platform", "PolicyProblem", "Pool", "check_policy"]


@dataclass(frozen=True)
class PolicyProblem:
    """A value of a spec that the platform's policy refuses."""

    path: str
    """Path of the field, without the leading `spec.`"""
    rule: str
    """Name of the rule in the chart's `policy`, such as `maxGpus`."""
    message: str
    hint: str

    def __str__(self) -> str:
        return f"spec.{self.path}: {self.message}; {self.hint}"


def check_policy(spec: FineTuneJobSpec, rules: PolicyRules, platform: Platform) -> list[PolicyProblem]:
    """Return a problem for each value that the rules refuse. `spec`: the user's spec, without filled-in defaults."""
    wire_values, checker = spec.to_wire(), _Checker(rules, platform)
    return [
        *checker.check_pool(spec),
        *checker.check_patterns(wire_values),
        *checker.check_output_folder(spec),
        *checker.check_code(wire_values),
        *checker.check_limits(spec),
    ]


def find_values_at(group_values: Any, path: str, path_prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path with list indices, value) for each value at `path`. In `path`, the name of a list ends with `[]`."""
    name, _, path_below = path.partition(".")
    nested_value = group_values.get(name.removesuffix("[]"))
    if nested_value is None:
        return
    if name.endswith("[]"):
        paths_and_values = [(f"{path_prefix}{name[:-2]}[{i}]", item) for i, item in enumerate(nested_value)]
    else:
        paths_and_values = [(f"{path_prefix}{name}", nested_value)]
    for value_path, value in paths_and_values:
        if path_below:
            yield from find_values_at(value, path_below, f"{value_path}.")
        else:
            yield value_path, value


def find_pool_name(spec: FineTuneJobSpec, pools: Sequence[Pool]) -> str:
    """Return the name of the job's node pool: the pool in the spec, or else the pool that the operator will choose. Empty: the job uses no pool."""
    resources = spec.resources
    if resources.node_pool is not None:
        return resources.node_pool
    if resources.gpus_per_node == 0:
        return ""
    requested_gpu_resource = resources.gpu_resource
    candidate_pools = [pool for pool in pools if pool.is_default and requested_gpu_resource in (None, pool.gpu_resource)]
    candidate_pools += [pool for pool in pools if pool.gpu_resource == requested_gpu_resource]
    return candidate_pools[0].name if candidate_pools else ""


class _Checker:
    """Checks a spec against the rules of the job's namespace."""

    def __init__(self, rules: PolicyRules, platform: Platform):
        self._rules, self._platform = rules, platform

    def _get_patterns(self, rule: str) -> tuple[str, ...]:
        return tuple(self._rules.get_rule(rule))

    def _check_text(self, rule: str, path: str, field_text: FieldText, *, subject: str = "", example: str = "") -> Iterator[PolicyProblem]:
        patterns, platform = self._get_patterns(rule), self._platform
        if patterns == ALLOW_EVERYTHING:
            return
        if field_text.compared_text is None or not allows(
            patterns, field_text.compared_text, compares_folders=rule in table.FOLDER_RULES, storage=platform.s3_root, namespace=platform.namespace
        ):
            message = f"{subject or repr(field_text.shown_text)} is refused by the platform's rule policy.{rule} for namespace {platform.namespace}"
            hint = self._format_hint(patterns)
            yield PolicyProblem(path, rule, message, f"write for example `{example}`" if example else hint)

    def _format_hint(self, patterns: tuple[str, ...]) -> str:
        """Return a hint that lists the patterns, with the values of `{namespace}` and `{storage}` filled in."""
        if not patterns:
            return "the rule allows no value: remove the field"
        storage_root = self._platform.s3_root
        usable_patterns = [pattern for pattern in patterns if storage_root or "{storage}" not in pattern]
        pattern_texts = [pattern.replace("{storage}", storage_root).replace("{namespace}", self._platform.namespace) for pattern in usable_patterns]
        order_explanation = "; the last matching pattern decides, and ! refuses" if any(text.startswith("!") for text in pattern_texts) else ""
        return f"write a value that the rule allows: {', '.join(pattern_texts)}{order_explanation}"

    def check_pool(self, spec: FineTuneJobSpec) -> Iterator[PolicyProblem]:
        """Check the job's node pool: the pool in the spec, or else the pool that the operator will choose."""
        pool_name = find_pool_name(spec, self._platform.pools)
        subject = "a job without a node pool" if not pool_name else f"node pool {pool_name!r}"
        yield from self._check_text("nodePools", "resources.nodePool", FieldText(pool_name, pool_name), subject=subject)

    def check_patterns(self, wire_values: dict[str, Any]) -> Iterator[PolicyProblem]:
        """Check each field that is compared with the patterns of a rule and does not depend on other fields."""
        for check in table.PATTERN_CHECKS:
            for path, value in find_values_at(wire_values, check.path):
                for field_text in check.read_texts(value, self._platform):
                    yield from self._check_text(check.rule, path, field_text)

    def check_output_folder(self, spec: FineTuneJobSpec) -> Iterator[PolicyProblem]:
        """Check the address `<storage.uri>/<output.dir>`. A job without storage passes, because another check refuses it."""
        uri, folder = spec.storage.uri or self._platform.storage_uri, spec.output.dir
        if uri is None or folder is None:
            return
        address = f"{table.remove_end_slash(uri)}/{table.remove_end_slash(folder)}"
        is_ambiguous = re.search(table.AMBIGUOUS_ADDRESS, address) is not None
        storage_root, namespace = self._platform.s3_root, self._platform.namespace
        folder_in_namespace = f"{namespace}/{table.remove_end_slash(folder)}"
        address_in_namespace = f"{table.remove_end_slash(uri)}/{folder_in_namespace}"
        is_folder_in_namespace_allowed = not is_ambiguous and allows(
            self._get_patterns("destinations"), address_in_namespace, compares_folders=True, storage=storage_root, namespace=namespace
        )
        example = f"output.dir: {folder_in_namespace}" if is_folder_in_namespace_allowed else ""
        address_text = FieldText(address, None if is_ambiguous else address)
        yield from self._check_text("destinations", "output.dir", address_text, subject=f"{folder!r} ({address})", example=example)

    def check_code(self, wire_values: dict[str, Any]) -> Iterator[PolicyProblem]:
        """Check the fields that let a job run code of the user or of a model repository."""
        forbidden_if_present = [(rule, path, True) for rule, path in table.FORBIDDEN_IF_PRESENT]
        forbidden_if_true = [(rule, path, False) for rule, path in table.FORBIDDEN_IF_TRUE]
        for rule, path, refuses_any_value in (*forbidden_if_present, *forbidden_if_true):
            if self._rules.get_rule(rule):
                continue
            for value_path, value in find_values_at(wire_values, path):
                if refuses_any_value or value is True:
                    message = f"the platform's rule policy.{rule} is false for namespace {self._platform.namespace}"
                    yield PolicyProblem(value_path, rule, message, f"remove {path.rpartition('.')[2]}")

    def check_limits(self, spec: FineTuneJobSpec) -> Iterator[PolicyProblem]:
        """Check the number of nodes, the number of GPUs, and the maximum duration in seconds."""
        rules = self._rules
        node_count = spec.resources.nodes or 1
        gpu_count = node_count * gpus_per_pod(spec)
        deadline_seconds = spec.policy.active_deadline_seconds
        for rule, path, limit, value, value_text in (
            ("maxNodes", "resources.nodes", rules.max_nodes, node_count, f"{node_count} nodes"),
            ("maxGpus", "resources.gpusPerNode", rules.max_gpus, gpu_count, f"{gpu_count} GPUs on all nodes together"),
            ("maxDurationSeconds", "policy.activeDeadlineSeconds", rules.max_duration_seconds, deadline_seconds or 0, f"{deadline_seconds} s"),
        ):
            if limit is not None and value > limit:
                message = f"{value_text} are more than the platform's rule policy.{rule} allows for namespace {self._platform.namespace}"
                yield PolicyProblem(path, rule, message, f"lower the value: the limit is {limit}")
