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
    wire, checker = spec.to_wire(), _Checker(rules, platform)
    return [
        *checker.check_pool(spec),
        *checker.check_patterns(wire),
        *checker.check_output_folder(spec),
        *checker.check_code(wire),
        *checker.check_limits(spec),
    ]


def find_values_at(value: Any, path: str, path_prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path with list indices, value) for each value at `path`. In `path`, the name of a list ends with `[]`."""
    name, _, rest = path.partition(".")
    inner = value.get(name.removesuffix("[]"))
    if inner is None:
        return
    located = [(f"{path_prefix}{name[:-2]}[{i}]", item) for i, item in enumerate(inner)] if name.endswith("[]") else [(f"{path_prefix}{name}", inner)]
    for item_path, item in located:
        if rest:
            yield from find_values_at(item, rest, f"{item_path}.")
        else:
            yield item_path, item


def find_pool_name(spec: FineTuneJobSpec, pools: Sequence[Pool]) -> str:
    """Return the name of the job's node pool: the pool in the spec, or else the pool that the operator will choose. Empty: the job uses no pool."""
    resources = spec.resources
    if resources.node_pool is not None:
        return resources.node_pool
    if resources.gpus_per_node == 0:
        return ""
    wanted = resources.gpu_resource
    candidates = [pool for pool in pools if pool.is_default and wanted in (None, pool.gpu_resource)]
    candidates += [pool for pool in pools if pool.gpu_resource == wanted]
    return candidates[0].name if candidates else ""


class _Checker:
    """Checks a spec against the rules of the job's namespace."""

    def __init__(self, rules: PolicyRules, platform: Platform):
        self._rules, self._platform = rules, platform

    def _get_patterns(self, rule: str) -> tuple[str, ...]:
        return tuple(self._rules.get_rule(rule))

    def _check_text(self, rule: str, path: str, text: FieldText, *, subject: str = "", example: str = "") -> Iterator[PolicyProblem]:
        patterns, platform = self._get_patterns(rule), self._platform
        if patterns == ALLOW_EVERYTHING:
            return
        if text.compared_text is None or not allows(
            patterns, text.compared_text, compares_folders=rule in table.FOLDER_RULES, storage=platform.s3_root, namespace=platform.namespace
        ):
            message = f"{subject or repr(text.shown_text)} is refused by the platform's rule policy.{rule} for namespace {platform.namespace}"
            hint = self._format_hint(patterns)
            yield PolicyProblem(path, rule, message, f"write for example `{example}`" if example else hint)

    def _format_hint(self, patterns: tuple[str, ...]) -> str:
        """Return a hint that lists the patterns, with the values of `{namespace}` and `{storage}` filled in."""
        if not patterns:
            return "the rule allows no value: remove the field"
        root = self._platform.s3_root
        used_patterns = [pattern for pattern in patterns if root or "{storage}" not in pattern]
        texts = [pattern.replace("{storage}", root).replace("{namespace}", self._platform.namespace) for pattern in used_patterns]
        order = "; the last matching pattern decides, and ! refuses" if any(text.startswith("!") for text in texts) else ""
        return f"write a value that the rule allows: {', '.join(texts)}{order}"

    def check_pool(self, spec: FineTuneJobSpec) -> Iterator[PolicyProblem]:
        """Check the job's node pool: the pool in the spec, or else the pool that the operator will choose."""
        name = find_pool_name(spec, self._platform.pools)
        subject = "a job without a node pool" if not name else f"node pool {name!r}"
        yield from self._check_text("nodePools", "resources.nodePool", FieldText(name, name), subject=subject)

    def check_patterns(self, wire: dict[str, Any]) -> Iterator[PolicyProblem]:
        """Check each field that is compared with the patterns of a rule and does not depend on other fields."""
        for check in table.PATTERN_CHECKS:
            for path, value in find_values_at(wire, check.path):
                for text in check.read_texts(value, self._platform):
                    yield from self._check_text(check.rule, path, text)

    def check_output_folder(self, spec: FineTuneJobSpec) -> Iterator[PolicyProblem]:
        """Check the address `<storage.uri>/<output.dir>`. A job without storage passes, because another check refuses it."""
        uri, folder = spec.storage.uri or self._platform.storage_uri, spec.output.dir
        if uri is None or folder is None:
            return
        address = f"{table.without_end_slash(uri)}/{table.without_end_slash(folder)}"
        is_ambiguous = re.search(table.AMBIGUOUS_ADDRESS, address) is not None
        root, namespace = self._platform.s3_root, self._platform.namespace
        own_folder = f"{namespace}/{table.without_end_slash(folder)}"
        own_address = f"{table.without_end_slash(uri)}/{own_folder}"
        is_own_allowed = not is_ambiguous and allows(self._get_patterns("destinations"), own_address, compares_folders=True, storage=root, namespace=namespace)
        example = f"output.dir: {own_folder}" if is_own_allowed else ""
        text = FieldText(address, None if is_ambiguous else address)
        yield from self._check_text("destinations", "output.dir", text, subject=f"{folder!r} ({address})", example=example)

    def check_code(self, wire: dict[str, Any]) -> Iterator[PolicyProblem]:
        """Check the fields that let a job run code of the user or of a model repository."""
        forbidden_if_present = [(rule, path, True) for rule, path in table.FORBIDDEN_IF_PRESENT]
        forbidden_if_true = [(rule, path, False) for rule, path in table.FORBIDDEN_IF_TRUE]
        for rule, path, refuses_any_value in (*forbidden_if_present, *forbidden_if_true):
            if self._rules.get_rule(rule):
                continue
            for value_path, value in find_values_at(wire, path):
                if refuses_any_value or value is True:
                    message = f"the platform's rule policy.{rule} is false for namespace {self._platform.namespace}"
                    yield PolicyProblem(value_path, rule, message, f"remove {path.rpartition('.')[2]}")

    def check_limits(self, spec: FineTuneJobSpec) -> Iterator[PolicyProblem]:
        """Check the number of nodes, the number of GPUs, and the maximum duration in seconds."""
        rules = self._rules
        nodes = spec.resources.nodes or 1
        gpus = nodes * gpus_per_pod(spec)
        seconds = spec.policy.active_deadline_seconds
        for rule, path, limit, value, text in (
            ("maxNodes", "resources.nodes", rules.max_nodes, nodes, f"{nodes} nodes"),
            ("maxGpus", "resources.gpusPerNode", rules.max_gpus, gpus, f"{gpus} GPUs on all nodes together"),
            ("maxDurationSeconds", "policy.activeDeadlineSeconds", rules.max_duration_seconds, seconds or 0, f"{seconds} s"),
        ):
            if limit is not None and value > limit:
                message = f"{text} are more than the platform's rule policy.{rule} allows for namespace {self._platform.namespace}"
                yield PolicyProblem(path, rule, message, f"lower the value: the limit is {limit}")
