"""The chart's ValidatingAdmissionPolicy contains the values of `policy` as the operator reads them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.tenancy import PolicyRules, table
from finetune_api.tenancy.patterns import build_regex
from finetune_operator.settings import parse_config

from tests.support.policy_rows import CHART_VALUES

VALUES_WITHOUT_NAMESPACES = {"storage": {"uri": "pvc://claim/jobs"}, "policy": {"maxNodes": 1000000, "maxDurationSeconds": 1}}


@pytest.fixture(scope="module")
def helm_template(helm: Path, root: Path) -> Any:
    def run(values: dict[str, Any]) -> list[dict[str, Any]]:
        command = [helm, "template", "rel", root / "helm/finetune-operator", "-f", "-"]
        values_json = json.dumps({"imageRegistry": "registry.example.com", **values})
        completed_process = subprocess.run(command, input=values_json, capture_output=True, text=True, check=True)
        return [item for item in yaml.safe_load_all(completed_process.stdout) if item and item["kind"].startswith("ValidatingAdmissionPolicy")]

    return run


def encode_rules(rules: PolicyRules, storage: str) -> dict[str, list[str]]:
    """Return the rules in the same form as the variable `rules` of the ValidatingAdmissionPolicy, which has a list of texts for each rule."""
    encoded_rules: dict[str, list[str]] = {}
    for rule, value in rules.model_dump(mode="json", by_alias=True).items():
        if isinstance(value, list):
            regexes = {pattern: build_regex(pattern, compares_folders=rule in table.FOLDER_RULES, storage=storage) for pattern in value}
            encoded_rules[rule] = [("-" if pattern.startswith("!") else "+") + regex for pattern, regex in reversed(regexes.items()) if regex]
        else:
            encoded_rules[rule] = [] if value is None else [str(value).lower()]
    return encoded_rules


@pytest.mark.parametrize(("values", "storage"), [(CHART_VALUES, "s3://finetune/jobs"), (VALUES_WITHOUT_NAMESPACES, "")])
def test_values_of_all_rules_reach_the_admission_policy(helm_template: Any, values: dict[str, Any], storage: str) -> None:
    policy, _ = helm_template({**values, "policy": {**values["policy"], "validatingAdmissionPolicy": True}})
    variables = {item["name"]: item["expression"] for item in policy["spec"]["variables"]}
    *namespace_entries, general_entry = json.loads(variables["rules"].partition(".filter(")[0])
    config = parse_config(values, "test")
    assert general_entry == {"namespaces": ["^.*$"], **encode_rules(config.policy.rules_for("other"), storage)}
    for namespace_entry, namespace_rules in zip(namespace_entries, config.policy.namespaces, strict=True):
        rules = PolicyRules(**{**config.policy.rules_for("other").model_dump(), **namespace_rules.model_dump(exclude_none=True, exclude={"names"})})
        assert namespace_entry == {"namespaces": [f"^{name.replace('*', '.*')}$" for name in namespace_rules.names], **encode_rules(rules, storage)}
    assert json.loads(variables["storage"]) == values["storage"]["uri"].rstrip("/")
    pools = [{"name": pool.name, "resource": pool.gpu_resource, "default": str(pool.default).lower()} for pool in config.node_pools]
    assert json.loads(variables["pools"]) == pools


def test_admission_policy_is_off_by_default(helm_template: Any) -> None:
    assert helm_template({}) == []
