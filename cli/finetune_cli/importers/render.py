"""Renders the YAML that an import prints: the FineTuneJob, and the Secret and ConfigMaps to which the job refers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.names import API_VERSION, KIND
from finetune_api.spec import FineTuneJobSpec

from finetune_cli.importers.run_import import ImportResult
from finetune_cli.provenance import AssignedValue
from finetune_cli.yaml_writer import to_yaml_stream


def render_manifest(import_result: ImportResult, *, with_origins: bool) -> str:
    """Return all objects as YAML. With `with_origins`, a comment after each value of the spec names the origin of the value."""
    return to_yaml_stream(build_documents(import_result, with_origins=with_origins))


def build_documents(import_result: ImportResult, *, with_origins: bool = False) -> Iterator[Any]:
    """Yield the Secret and the ConfigMaps that the job needs, then the FineTuneJob."""
    if import_result.secrets:
        yield {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": _build_metadata(import_result, import_result.secret_name),
            "type": "Opaque",
            "stringData": dict(import_result.secrets),
        }
    for name, data in import_result.config_maps.items():
        yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _build_metadata(import_result, name), "data": dict(data)}
    metadata = _build_metadata(import_result, import_result.name)
    if import_result.annotations:
        metadata["annotations"] = dict(import_result.annotations)
    spec = _to_commented_map(_sort_fields(import_result.spec, FineTuneJobSpec), "", import_result.assigned_values if with_origins else {})
    yield {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


def _build_metadata(import_result: ImportResult, name: str) -> dict[str, Any]:
    return {"name": name, **({"namespace": import_result.namespace} if import_result.namespace else {})}


def _sort_fields(spec_values: dict[str, Any], model: Any) -> dict[str, Any]:
    """Return the values of a spec or group, sorted in the order of the fields of `model`. This is also their order in the API reference."""
    sorted_values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        name_in_api = field.alias or name
        if name_in_api in spec_values:
            field_model = next(
                (
                    annotation
                    for annotation in (field.annotation, *getattr(field.annotation, "__args__", ()))
                    if hasattr(annotation, "model_fields")
                ),
                None,
            )
            value = spec_values[name_in_api]
            sorted_values[name_in_api] = _sort_fields(value, field_model) if field_model is not None and isinstance(value, dict) else value
    return sorted_values


def _to_commented_map(spec_values: dict[str, Any], prefix: str, assigned_values: dict[str, AssignedValue]) -> Any:
    from ruamel.yaml.comments import CommentedMap

    commented_map = CommentedMap()
    for key, value in spec_values.items():
        path = f"{prefix}.{key}" if prefix else key
        commented_map[key] = _to_commented_map(value, path, assigned_values) if isinstance(value, dict) else _to_flow_list(value)
        if path in assigned_values:
            comment = describe_origin(assigned_values[path])
            commented_map.yaml_add_eol_comment(comment, key)
    return commented_map


def _to_flow_list(value: Any) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    if isinstance(value, list) and all(not isinstance(item, dict | list) for item in value):
        sequence = CommentedSeq(value)
        sequence.fa.set_flow_style()
        return sequence
    return value


def describe_origin(assigned_value: AssignedValue) -> str:
    """Return a text about the origin of a value: its location and key or, for a default, its reason."""
    if assigned_value.key and assigned_value.origin.location.endswith(assigned_value.key):
        return assigned_value.origin.location
    return f"{assigned_value.origin.location} {assigned_value.key}".strip()
