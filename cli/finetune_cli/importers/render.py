"""The YAML that an import prints: the FineTuneJob, and the Secret and ConfigMaps to which the job refers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.names import API_VERSION, KIND
from finetune_api.spec import FineTuneJobSpec

from finetune_cli.importers.run_import import ImportResult
from finetune_cli.provenance import AssignedValue
from finetune_cli.yaml_writer import to_yaml_stream


def render_manifest(import_result: ImportResult, *, with_origins: bool) -> str:
    """Return all objects as YAML. With `annotate`, a comment after each value names its origin."""
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


def _sort_fields(values: dict[str, Any], model: Any) -> dict[str, Any]:
    """Sort fields as in the API reference."""
    result: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        wire = field.alias or name
        if wire in values:
            inner = next(
                (
                    a
                    for a in (field.annotation, *getattr(field.annotation, "__args__", ()))
                    if hasattr(a, "model_fields")
                ),
                None,
            )
            value = values[wire]
            result[wire] = _sort_fields(value, inner) if inner is not None and isinstance(value, dict) else value
    return result


def _to_commented_map(values: dict[str, Any], prefix: str, assigned_values: dict[str, AssignedValue]) -> Any:
    from ruamel.yaml.comments import CommentedMap

    result = CommentedMap()
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else key
        result[key] = _to_commented_map(value, path, assigned_values) if isinstance(value, dict) else _to_flow_list(value)
        if path in assigned_values:
            comment = describe_origin(assigned_values[path])
            result.yaml_add_eol_comment(comment, key)
    return result


def _to_flow_list(value: Any) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    if isinstance(value, list) and all(not isinstance(item, dict | list) for item in value):
        sequence = CommentedSeq(value)
        sequence.fa.set_flow_style()
        return sequence
    return value


def describe_origin(assigned_value: AssignedValue) -> str:
    """Describe the origin of a value: location and key, or the reason for a default."""
    if assigned_value.key and assigned_value.origin.location.endswith(assigned_value.key):
        return assigned_value.origin.location
    return f"{assigned_value.origin.location} {assigned_value.key}".strip()
