"""Generate the CustomResourceDefinition from the models: a structural schema with descriptions, bounds, enumerations and CEL rules.

The JSON schema that pydantic generates is not structural (`$ref`, `anyOf` for optional fields, `const`). This module therefore
generates its own schema. `python -m finetune_api.schema` prints the CRD.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from finetune_api import names
from finetune_api.base import DEFAULT_KEY, DEFAULT_TEXT_KEY, EXAMPLE_KEY, Group, read_member_docs
from finetune_api.rules import RULES
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

Schema = dict[str, Any]

MUTABLE_FIELDS = ("suspend", "cancel", "policy", "placement")
"""Fields of the spec that can change after the job is created. `policy` and `placement` can change, but some of their fields are immutable."""
MUTABLE_POLICY_FIELDS = ("activeDeadlineSeconds", "ttlSecondsAfterFinished", "maxCost")
"""Fields of `spec.policy` that can change after the job is created."""
LIST_MAP_KEYS = {
    ("status", "conditions"): ["type"],
    ("status", "attempts"): ["number"],
    ("spec", "placement", "env"): ["name"],
    ("spec", "placement", "volumes"): ["name"],
    ("spec", "placement", "volumeMounts"): ["mountPath"],
}
"""The lists with `x-kubernetes-list-type: map`: path of the list, and the names of the fields that identify an item."""

PRINTER_COLUMNS: tuple[tuple[str, str, str, int, str], ...] = (
    ("Status", "string", ".status.phase", 0, "Phase of the job."),
    ("Progress", "string", ".status.progress.display", 0, "Completed optimizer steps."),
    ("Loss", "number", ".status.metrics.trainLoss", 0, "Latest training loss."),
    ("ETA", "string", ".status.progress.eta", 0, "Estimated time to the end of training."),
    ("Workers", "string", ".status.workers.display", 0, "Number of ready pods / number of all pods."),
    ("Restarts", "integer", ".status.restarts", 0, "Number of attempts after the first one."),
    ("Reason", "string", ".status.reason", 0, "Reason why the job waits or failed, in one word."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Time since the job was created."),
    ("Model", "string", ".status.resolved.modelName", 1, "Short name of the base model."),
    ("Checkpoint", "integer", ".status.latestCheckpointStep", 1, "Optimizer step of the newest committed checkpoint."),
    ("Result", "string", ".status.evaluation.headline", 1, "Most important metric of the evaluation after training."),
    ("Duration", "string", ".status.duration", 1, "Time from the start to the end of the job."),
)  # fmt: skip
"""Printer columns of `kubectl get`: name, type, JSON path, priority (1: only with `-o wide`), description."""
SELECTABLE_PATHS = (".status.phase", ".spec.model.source", ".spec.placement.queueName")
"""Paths that `kubectl get --field-selector` supports."""


def describe_field(field_info: FieldInfo) -> str:
    """Return the description of a field in the CRD: its meaning, values, default and example."""
    description = (field_info.description or "").strip()
    schema_extra = field_info.json_schema_extra if isinstance(field_info.json_schema_extra, dict) else {}
    description += explain_values(field_info.annotation)
    if DEFAULT_KEY in schema_extra:
        description += f" Default: {_to_text(schema_extra[DEFAULT_KEY])}."
    elif DEFAULT_TEXT_KEY in schema_extra:
        description += f" Default: {schema_extra[DEFAULT_TEXT_KEY]}."
    if EXAMPLE_KEY in schema_extra:
        description += f" Example: `{_to_text(schema_extra[EXAMPLE_KEY])}`."
    return description


def explain_values(annotation: Any) -> str:
    """Return the explanations of all values of an enumeration, or an empty string for any other type."""
    enum_class = _find_enum(annotation)
    if enum_class is None:
        return ""
    docs_by_member = read_member_docs(enum_class)
    return " Values: " + " ".join(f"`{member.value}`: {docs_by_member[member.name]}" for member in enum_class)


def _find_enum(annotation: Any) -> type[Enum] | None:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return annotation
    return next((enum_class for argument in get_args(annotation) if (enum_class := _find_enum(argument))), None)


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def make_model_schema(model: type[BaseModel], path: tuple[str, ...]) -> Schema:
    """Return the structural schema of a pydantic model. `path`: names of the fields that lead to the model."""
    properties: Schema = {}
    required_names: list[str] = []
    for name, field_info in model.model_fields.items():
        wire_name = field_info.alias or name
        schema = make_type_schema(field_info.annotation, list(field_info.metadata), (*path, wire_name))
        schema = {"description": describe_field(field_info), **schema}
        if field_info.is_required():
            required_names.append(wire_name)
        elif isinstance(field_info.default, bool) and path == ("spec",):
            schema["default"] = field_info.default
        properties[wire_name] = schema
    model_schema: Schema = {"type": "object", "properties": properties}
    if required_names:
        model_schema["required"] = required_names
    cel_rules = [{"rule": expression, "message": message} for expression, message in _iterate_cel_rules(model, path)]
    if cel_rules:
        model_schema["x-kubernetes-validations"] = cel_rules
    return model_schema


def _iterate_cel_rules(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if issubclass(model, Group):
        yield from ((rule.expression, rule.message) for rule in model.cel)
    if path == ("spec",):
        yield from ((rule.cel, rule.message) for rule in RULES if rule.cel)


def make_type_schema(annotation: Any, metadata: list[Any], path: tuple[str, ...]) -> Schema:
    """Return the structural schema of a type annotation. `metadata`: constraints of the enclosing annotations. `path`: the field, for error messages."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner_annotation, *inner_metadata = get_args(annotation)
        return make_type_schema(inner_annotation, [*metadata, *inner_metadata], path)
    if origin in (Union, types.UnionType):
        member_types = [member_type for member_type in get_args(annotation) if member_type is not type(None)]
        if len(member_types) == 1:
            return make_type_schema(member_types[0], metadata, path)
        if set(member_types) == {str, int}:
            return {"anyOf": [{"type": "integer"}, {"type": "string"}], **_make_quantity_schema(metadata)}
        raise TypeError(f"{'.'.join(path)}: a structural schema has no union types: {annotation}")
    if origin is Literal:
        return {"type": "string", "enum": list(get_args(annotation))}
    if origin is list:
        (item_annotation,) = get_args(annotation)
        schema: Schema = {"type": "array", "items": make_type_schema(item_annotation, [], (*path, "*")), **_make_length_bounds(metadata, "Items")}
        map_keys = LIST_MAP_KEYS.get(path)
        return schema | (
            {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": map_keys}
            if map_keys
            else {"x-kubernetes-list-type": "atomic"}
        )
    if origin is dict:
        _, value_annotation = get_args(annotation)
        if value_annotation is Any:
            return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        return {
            "type": "object",
            "additionalProperties": make_type_schema(value_annotation, [], (*path, "*")),
            **_make_length_bounds(metadata, "Properties"),
        }
    return _make_scalar_schema(annotation, metadata, path)


def _make_scalar_schema(annotation: type, metadata: list[Any], path: tuple[str, ...]) -> Schema:
    if issubclass(annotation, BaseModel):
        return make_model_schema(annotation, path)
    if issubclass(annotation, Enum):
        return {"type": "string", "enum": [member.value for member in annotation]}
    if issubclass(annotation, datetime):
        return {"type": "string", "format": "date-time"}
    if issubclass(annotation, bool):
        return {"type": "boolean"}
    if issubclass(annotation, int):
        return {"type": "integer", "format": "int64", **_make_number_bounds(metadata)}
    if issubclass(annotation, float):
        return {"type": "number", **_make_number_bounds(metadata)}
    if issubclass(annotation, str):
        return {"type": "string", **_make_length_bounds(metadata, "Length"), **_make_pattern_schema(metadata)}
    raise TypeError(f"{'.'.join(path)}: no structural schema for {annotation}")


def iterate_constraints(metadata: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of every constraint in the metadata of an annotation, such as (`ge`, 1)."""
    for metadata_item in metadata:
        constraint_sources = [*metadata_item.metadata, metadata_item] if isinstance(metadata_item, FieldInfo) else [metadata_item]
        for source in constraint_sources:
            for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern"):
                value = getattr(source, name, None)
                if value is not None:
                    yield name, value
            schema_extra = getattr(source, "json_schema_extra", None)
            if isinstance(schema_extra, dict) and "enum" in schema_extra:
                yield "enum", schema_extra["enum"]


def _make_number_bounds(metadata: list[Any]) -> Schema:
    """Return the part of a number's schema that contains its bounds.

    A fractional bound becomes a CEL rule, because the API server truncates a bound before it compares an integer with this bound. With
    `maximum: 0.5, exclusiveMaximum: true`, the API server would refuse the value `0`.
    """
    schema: Schema = {}
    for name, value in iterate_constraints(metadata):
        if name == "enum":
            schema["enum"] = value
        elif isinstance(value, float) and not value.is_integer():
            operator, phrase = CEL_COMPARISONS[name]
            cel_rule = {"rule": f"self {operator} {value}", "message": f"should be {phrase} {value}"}
            schema.setdefault("x-kubernetes-validations", []).append(cel_rule)
        else:
            bound_name = "minimum" if name in ("ge", "gt") else "maximum"
            schema[bound_name] = value
            if name in ("gt", "lt"):
                schema[f"exclusive{bound_name.capitalize()}"] = True
    return schema


def _make_quantity_schema(metadata: list[Any]) -> Schema:
    """Return the schema of a quantity. The `pattern` in the schema applies to strings, and the `minimum` to integers."""
    schema_extras = [item.json_schema_extra for item in metadata if isinstance(item, FieldInfo)]
    return next((schema_extra for schema_extra in schema_extras if isinstance(schema_extra, dict)), {"x-kubernetes-int-or-string": True})


CEL_COMPARISONS = {
    "ge": (">=", "greater than or equal to"), "gt": (">", "greater than"), "le": ("<=", "less than or equal to"), "lt": ("<", "less than"),
}  # fmt: skip


def _make_length_bounds(metadata: list[Any], length_suffix: str) -> Schema:
    """Return the bounds of a length, such as `maxItems`. `length_suffix`: `Items`, `Properties` or `Length`."""
    constraint_values = dict(iterate_constraints(metadata))
    return {f"{bound_name}{length_suffix}": constraint_values[f"{bound_name}_length"] for bound_name in ("min", "max") if f"{bound_name}_length" in constraint_values}


def _make_pattern_schema(metadata: list[Any]) -> Schema:
    constraint_values = dict(iterate_constraints(metadata))
    return {"pattern": constraint_values["pattern"]} if "pattern" in constraint_values else {}


def add_immutability_rules(spec_schema: Schema) -> None:
    """Add CEL rules that make fields of an existing job immutable. The rules also forbid removing a group with immutable fields."""
    policy_schema, placement_schema = spec_schema["properties"]["policy"], spec_schema["properties"]["placement"]
    policy_schema["default"], placement_schema["default"] = {}, {}
    _forbid_change(spec_schema, "spec", [wire_name for wire_name in spec_schema["properties"] if wire_name not in MUTABLE_FIELDS])
    _forbid_change(policy_schema, "spec.policy", [wire_name for wire_name in policy_schema["properties"] if wire_name not in MUTABLE_POLICY_FIELDS])
    _forbid_change(placement_schema, "spec.placement", [wire_name for wire_name in placement_schema["properties"] if wire_name != "queueName"])
    _add_cel_rule(
        spec_schema, "self.placement == oldSelf.placement || oldSelf.suspend || (has(self.placement.queueName) ? self.placement.queueName : '') == (has(oldSelf.placement.queueName) ? oldSelf.placement.queueName : '')",
        message="spec.placement.queueName can only change while the job is suspended: set spec.suspend to true first", fieldPath=".placement.queueName",
    )  # fmt: skip
    _add_cel_rule(
        spec_schema,
        "!oldSelf.cancel || self.cancel",
        message="spec.cancel cannot change from true to false: create a new FineTuneJob",
        fieldPath=".cancel",
    )


def _forbid_change(schema: Schema, path: str, wire_names: list[str]) -> None:
    """Forbid changing, adding or removing the fields `wire_names` of a group. `path`: path of the group, for error messages.

    The API server runs CEL rules at every status write, so the rules must be cheap. Each field has a rule that compares the old
    and the new value. This rule does not run if the field is absent. Therefore the group has one more rule, which compares only which fields are present.
    """
    immutable_message = "cannot change after creation: create a new FineTuneJob"
    for wire_name in wire_names:
        _add_cel_rule(schema["properties"][wire_name], "self == oldSelf", message=f"{path}.{wire_name} {immutable_message}")
    presence_condition_by_field = {wire_name: f"has(self.{wire_name}) == has(oldSelf.{wire_name})" for wire_name in wire_names}
    changed_field_cases = "".join(f"!({presence_condition}) ? '{path}.{wire_name}' : " for wire_name, presence_condition in presence_condition_by_field.items())
    _add_cel_rule(
        schema, " && ".join(presence_condition_by_field.values()), message=f"a field of {path} {immutable_message}",
        messageExpression=f"({changed_field_cases}'{path}') + ' {immutable_message}'",
    )  # fmt: skip


def _add_cel_rule(schema: Schema, rule: str, **message_fields: str) -> None:
    schema.setdefault("x-kubernetes-validations", []).append({"rule": rule, "reason": "FieldValueForbidden", **message_fields})


def build_crd() -> Schema:
    """Return the CustomResourceDefinition of FineTuneJob."""
    spec_schema = make_model_schema(FineTuneJobSpec, ("spec",))
    add_immutability_rules(spec_schema)
    status_schema = make_model_schema(FineTuneJobStatus, ("status",))
    status_schema["properties"]["observedGeneration"]["default"] = -1
    status_schema["default"] = {"observedGeneration": -1}
    # Only the operator writes the status, and it always writes the whole status. Because the map is atomic, the API server does not record
    # the owner of each field. These records would be as long as the status itself, and writing them would take a quarter of the time of each write.
    status_schema["x-kubernetes-map-type"] = "atomic"
    root_schema = {
        "type": "object",
        "description": "A job that fine-tunes a language model and stores the result in object storage.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"},
            "spec": {"description": "The job that the user requests.", **spec_schema}, "status": {"description": "The state of the job that the operator observed.", **status_schema},
        },
        "x-kubernetes-validations": [
            {
                "rule": f"self.metadata.name.matches('{names.NAME_PATTERN}')",
                "message": "metadata.name must start with a letter and contain only a-z, 0-9 and '-', because Jobs and host names contain this name",
            },
            {
                "rule": f"size(self.metadata.name) <= {names.MAX_NAME_LENGTH}",
                "message": f"metadata.name must be at most {names.MAX_NAME_LENGTH} characters, because Jobs and host names contain this name",
            },
        ],
    }  # fmt: skip
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP, "scope": "Namespaced",
            "names": {
                "kind": names.KIND, "listKind": f"{names.KIND}List", "plural": names.PLURAL, "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME], "categories": [names.RESOURCE_CATEGORY],
            },
            "versions": [{
                "name": names.VERSION, "served": True, "storage": True, "subresources": {"status": {}},
                "additionalPrinterColumns": [_make_printer_column(*column) for column in PRINTER_COLUMNS],
                "selectableFields": [{"jsonPath": path} for path in SELECTABLE_PATHS],
                "schema": {"openAPIV3Schema": root_schema},
            }],
        },
    }  # fmt: skip


def _make_printer_column(name: str, column_type: str, path: str, priority: int, description: str) -> Schema:
    column = {"name": name, "type": column_type, "jsonPath": path, "description": description}
    return column | ({"priority": priority} if priority else {})


GENERATED_HEADER = "# Generated from crds/finetune_api by `make generate`; `make verify` fails if this file is out of date.\n"


def build_crd_yaml() -> str:
    """Return the CRD as YAML that means the same in YAML 1.1 and 1.2. kubectl and Helm read YAML 1.1, in which an unquoted `no` is false."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml, stream = YAML(), StringIO()
    yaml.width = 160
    yaml.representer.ignore_aliases = lambda *_: True
    yaml.dump(_quote_ambiguous_words(build_crd()), stream)
    return GENERATED_HEADER + stream.getvalue()


AMBIGUOUS_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~"})


def _quote_ambiguous_words(value: Any) -> Any:
    """Return a copy of `value` in which every string that YAML 1.1 would read as a boolean or as null is quoted."""
    from ruamel.yaml.scalarstring import SingleQuotedScalarString

    if isinstance(value, dict):
        return {key: _quote_ambiguous_words(nested_value) for key, nested_value in value.items()}
    if isinstance(value, list):
        return [_quote_ambiguous_words(item) for item in value]
    return SingleQuotedScalarString(value) if isinstance(value, str) and value.lower() in AMBIGUOUS_WORDS else value


def main() -> None:
    """Print the CRD as YAML."""
    import sys

    sys.stdout.write(build_crd_yaml())


if __name__ == "__main__":
    main()
