"""The generated CRD: descriptions, structure and size, and the committed file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.base import DEFAULT_KEY, DEFAULT_TEXT_KEY
from finetune_api.schema import GENERATED_HEADER, build_crd
from finetune_api.spec import FineTuneJobSpec
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[3]


def iterate_fields(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in schema.get("properties", {}).items():
        yield f"{path}.{name}", value
        yield from iterate_fields(value, f"{path}.{name}")
        yield from iterate_fields(value.get("items", {}), f"{path}.{name}[]")


def get_schema(root_field: str) -> dict[str, Any]:
    return build_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][root_field]


def test_every_spec_field_is_described_with_its_default_or_as_required() -> None:
    undocumented_paths = [
        path
        for path, value in iterate_fields(get_schema("spec"), "spec")
        if not any(word in value["description"] for word in ("Default", "Required"))
    ]
    assert undocumented_paths == []


def test_every_status_field_is_described() -> None:
    assert [
        path for path, value in iterate_fields(get_schema("status"), "status") if len(value.get("description", "")) < 4
    ] == []


def test_the_schema_is_structural() -> None:
    text = json.dumps(build_crd())
    assert "$ref" not in text
    assert "oneOf" not in text
    for path, value in iterate_fields(get_schema("spec"), "spec"):
        assert "type" in value or "x-kubernetes-int-or-string" in value, path


def test_the_schema_sets_defaults_only_for_suspend_cancel_policy_and_placement() -> None:
    defaults = {path: value["default"] for path, value in iterate_fields(get_schema("spec"), "spec") if "default" in value}
    assert defaults == {"spec.suspend": False, "spec.cancel": False, "spec.policy": {}, "spec.placement": {}}


def test_the_committed_crd_is_up_to_date_and_small_enough_for_kubectl_apply() -> None:
    """`kubectl apply` stores the whole object as JSON in an annotation, and the API server allows at most 262,144 bytes for all annotations of an object
    together.
    """
    path = ROOT / "crds" / "finetunejobs.yaml"
    text = path.read_text()
    assert text.startswith(GENERATED_HEADER)
    assert YAML(typ="safe").load(text) == json.loads(json.dumps(build_crd()))
    assert len(json.dumps(build_crd(), separators=(",", ":"))) < 200_000


def test_no_field_has_both_a_constant_default_and_a_default_text() -> None:
    def iterate_model_fields(model: Any) -> Iterator[tuple[str, Any]]:
        for name, info in model.model_fields.items():
            yield f"{model.__name__}.{name}", info
            for nested in [info.annotation, *getattr(info.annotation, "__args__", ())]:
                if hasattr(nested, "model_fields"):
                    yield from iterate_model_fields(nested)

    for path, info in iterate_model_fields(FineTuneJobSpec):
        schema_extra = info.json_schema_extra or {}
        assert not (DEFAULT_KEY in schema_extra and DEFAULT_TEXT_KEY in schema_extra), path


@pytest.mark.parametrize("crd_path", ["crds/finetunejobs.yaml", "helm/finetune-operator/files/finetunejobs.yaml"])
def test_the_crd_file_means_the_same_in_yaml_1_1(crd_path: str) -> None:
    assert yaml.safe_load((ROOT / crd_path).read_text(encoding="utf-8")) == build_crd()


def test_every_spec_field_is_described_with_an_example() -> None:
    assert [path for path, value in iterate_fields(get_schema("spec"), "spec") if "Example: `" not in value["description"]] == []


def test_the_example_of_a_field_differs_from_its_default() -> None:
    """An example that repeats the default does not show how to change the field."""
    allowed_paths = {"spec.method.lora.taskType", "spec.model.modality", "spec.method.lora.loftq.bits", "spec.method.lora.loftq.iterations"}
    paths_with_same_example = []
    for path, value in iterate_fields(get_schema("spec"), "spec"):
        match = re.search(r"Default: (.*?)\. Example: `(.*)`", value["description"])
        if match and match.group(1) == match.group(2):
            paths_with_same_example.append(path)
    assert set(paths_with_same_example) <= allowed_paths | {"spec.suspend"}, sorted(set(paths_with_same_example) - allowed_paths)


@pytest.mark.parametrize("root_field", ["spec", "status"])
def test_every_value_of_an_enumeration_is_explained(root_field: str) -> None:
    unexplained_values = [
        f"{path}: {word}"
        for path, value in iterate_fields(get_schema(root_field), root_field)
        for word in [*value.get("enum", []), *value.get("items", {}).get("enum", [])]
        if isinstance(word, str) and f"`{word}`: " not in value["description"]
    ]
    assert unexplained_values == []


def test_a_fractional_bound_becomes_a_cel_rule() -> None:
    field = get_schema("spec")["properties"]["trainer"]["properties"]["dpo"]["properties"]["labelSmoothing"]
    assert "maximum" not in field
    assert [rule["rule"] for rule in field["x-kubernetes-validations"]] == ["self < 0.5"]
