"""The operator's configuration file: which files the operator refuses, and with which error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_operator.settings import SettingsError, load_config, parse_config


def make_config_with_pool(**fields: Any) -> dict[str, Any]:
    """Return a configuration with one node pool that has these fields."""
    return {"nodePools": [{"name": "h100", **fields}]}


@pytest.mark.parametrize(
    ("config", "key", "problem"),
    [
        ({"resources": {"memory": "4GB"}}, "resources.memory", "'4GB' is not a quantity"),
        ({"resources": {"cpu": -1}}, "resources.cpu", "-1 is not a quantity"),
        ({"resources": {"cpu": True}}, "resources.cpu", "True is not a quantity"),
        ({"resources": {"sharedMemory": 0.5}}, "resources.sharedMemory", "0.5 is not a quantity"),
        (make_config_with_pool(resources={"cpu": "two"}), "nodePools.0.resources.cpu", "'two' is not a quantity"),
        (make_config_with_pool(gpuMemory="80GB"), "nodePools.0.gpuMemory", "'80GB' is not a quantity"),
        ({"trainer": {"labels": {"team!": "x"}}}, "trainer.labels", "'team!' is not a label key"),
        ({"trainer": {"labels": {"k" * 64: "x"}}}, "trainer.labels", "is not a label key"),
        ({"trainer": {"labels": {"team": "a b"}}}, "trainer.labels", "'a b' is not a value for label team"),
        ({"trainer": {"labels": {"finetune-operator.io/uid": ""}}}, "trainer.labels", "is set by the operator"),
        ({"trainer": {"labels": {"app.kubernetes.io/managed-by": ""}}}, "trainer.labels", "is set by the operator"),
        ({"trainer": {"annotations": {"a b": ""}}}, "trainer.annotations", "'a b' is not an annotation key"),
        (
            {"trainer": {"annotations": {"finetune-operator.io/run.json": ""}}},
            "trainer.annotations",
            "is set by the operator",
        ),
        ({"trainer": {"env": {"1ST": "x"}}}, "trainer.env", "'1ST' is not a name of an environment variable"),
        ({"trainer": {"env": {"FINETUNE_UID": "x"}}}, "trainer.env", "FINETUNE_UID is set by the operator"),
        ({"trainer": {"env": {"DEBUG": 1}}}, "trainer.env.DEBUG", "valid string"),
        ({"trainer": {"serviceAccountName": "Who"}}, "trainer.serviceAccountName", "should match pattern"),
        ({"trainer": {"priorityClassName": "a..b"}}, "trainer.priorityClassName", "should match pattern"),
        ({"trainer": {"imagePullSecrets": ["A"]}}, "trainer.imagePullSecrets.0", "should match pattern"),
        ({"namespaces": ["a.b"]}, "namespaces.0", "should match pattern"),
        (make_config_with_pool(nodeSelector={"gpu": "h 100"}), "nodePools.0.nodeSelector", "'h 100' is not a value for label gpu"),
        (
            make_config_with_pool(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
            "nodePools.0.tolerations.0",
            "does not compare values",
        ),
        (make_config_with_pool(tolerations=[{"effect": "NoSchedule"}]), "nodePools.0.tolerations.0", "needs operator Exists"),
        (
            make_config_with_pool(tolerations=[{"key": "a", "tolerationSeconds": 3}]),
            "nodePools.0.tolerations.0",
            "needs effect NoExecute",
        ),
        (make_config_with_pool(tolerations=[{"key": "a", "value": "b c"}]), "nodePools.0.tolerations.0", "'b c' is not a taint value"),
        ({"policy": {"images": ["a b"]}}, "policy.images.0", "'a b' is not a pattern: write text with `*` and `{namespace}`"),
        ({"policy": {"secrets": ["{storage}"]}}, "policy.secrets.0", "'{storage}' is not a pattern"),
        ({"policy": {"sources": ["{team}/*"]}}, "policy.sources.0", "'{team}/*' is not a pattern: write text with `*`, `{namespace}` and `{storage}`"),
        ({"policy": {"labels": ["!"]}}, "policy.labels.0", "'!' is not a pattern"),
        ({"policy": {"image": ["*"]}}, "policy.image", "Extra inputs are not permitted"),
        ({"policy": {"maxNodes": 0}}, "policy.maxNodes", "greater than or equal to 1"),
        ({"policy": {"namespaces": [{"images": ["*"]}]}}, "policy.namespaces.0.names", "Field required"),
        ({"policy": {"namespaces": [{"names": ["Team"]}]}}, "policy.namespaces.0.names.0", "should match pattern"),
    ],
)
def test_wrong_platform_value_is_reported_in_one_line_with_its_key(
    config: dict[str, Any], key: str, problem: str
) -> None:
    """The operator refuses these values. Helm refuses them too, as tests/unit/delivery/test_chart.py checks."""
    with pytest.raises(SettingsError) as caught:
        parse_config(config, "config.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"config.yaml is not valid: {key}: ")
    assert problem in line


@pytest.mark.parametrize("quantity", [0, 2, "2", "0.5", ".5", "500m", "1.5Gi", "512M", "1e9", "1E+3", "10n"])
def test_kubernetes_quantities_are_accepted(quantity: str | int) -> None:
    assert parse_config({"resources": {"memory": quantity}}, "config.yaml").resources.memory == quantity


def test_file_that_is_not_utf8_is_reported_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(b"log: \xff\xfe")
    with pytest.raises(SettingsError, match=r"config.yaml is not UTF-8: invalid start byte at byte 5"):
        load_config(file)


def test_file_that_is_not_yaml_is_reported_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("log: [\nworkers: 3\n")
    with pytest.raises(SettingsError, match=r"config.yaml is not YAML: .* line 3") as caught:
        load_config(file)
    assert len(str(caught.value).splitlines()) == 1
