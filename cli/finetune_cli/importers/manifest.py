"""The YAML that an import prints: the FineTuneJob, and beside it what it refers to and the files held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune_api.names import API_VERSION, KIND
from finetune_api.spec import FineTuneJobSpec

from finetune_cli.importers.engine import Imported
from finetune_cli.importers.material import Assigned
from finetune_cli.yaml_text import join


def render(imported: Imported, *, annotate: bool) -> str:
    """All documents; with `annotate` every value has a comment that names its origin."""
    return join(documents(imported, annotate=annotate))


def documents(imported: Imported, *, annotate: bool = False) -> Iterator[Any]:
    """A Secret and ConfigMaps, if the files held such, then the FineTuneJob."""
    if imported.secrets:
        yield {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": _metadata(imported, imported.secret_name),
            "type": "Opaque",
            "stringData": dict(imported.secrets),
        }
    for name, data in imported.config_maps.items():
        yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(imported, name), "data": dict(data)}
    metadata = _metadata(imported, imported.name)
    if imported.annotations:
        metadata["annotations"] = dict(imported.annotations)
    spec = _group(_ordered(imported.spec, FineTuneJobSpec), "", imported.assigned if annotate else {})
    yield {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}


def _metadata(imported: Imported, name: str) -> dict[str, Any]:
    return {"name": name, **({"namespace": imported.namespace} if imported.namespace else {})}


def _ordered(values: dict[str, Any], model: Any) -> dict[str, Any]:
    """Fields in the order of the API's own reference."""
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
            result[wire] = _ordered(value, inner) if inner is not None and isinstance(value, dict) else value
    return result


def _group(values: dict[str, Any], prefix: str, assigned: dict[str, Assigned]) -> Any:
    from ruamel.yaml.comments import CommentedMap

    result = CommentedMap()
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else key
        result[key] = _group(value, path, assigned) if isinstance(value, dict) else _scalar(value)
        if path in assigned:
            comment = origin_of(assigned[path])
            result.yaml_add_eol_comment(comment, key)
    return result


def _scalar(value: Any) -> Any:
    from ruamel.yaml.comments import CommentedSeq

    if isinstance(value, list) and all(not isinstance(one, dict | list) for one in value):
        sequence = CommentedSeq(value)
        sequence.fa.set_flow_style()
        return sequence
    return value


def origin_of(assigned: Assigned) -> str:
    """Where a value came from, in words: place and key, or the reason it was filled in."""
    if assigned.key and assigned.origin.place.endswith(assigned.key):
        return assigned.origin.place
    return f"{assigned.origin.place} {assigned.key}".strip()
