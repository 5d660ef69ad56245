"""Base classes of the pydantic models: camelCase names in JSON, and fields that contain their own documentation.

`spec_field` and `status_field` declare a field with its description, default and example. The CRD's descriptions, the reference pages
and the defaults are generated from these declarations.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from enum import Enum, StrEnum
from functools import cache
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.alias_generators import to_camel


class WireModel(BaseModel):
    """A frozen pydantic model with camelCase names in JSON. Unknown fields are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def to_wire(self) -> dict[str, Any]:
        """Return a dict for JSON with camelCase keys. Fields that are None are omitted."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class LenientModel(WireModel):
    """A model for data that another release may have written. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class ReportModel(LenientModel):
    """A model for statuses and reports that another release may have written. Every value that this release can read is kept.

    Unknown fields are ignored, a field with an unreadable value counts as absent, and an unreadable list item is omitted. Errors:
    ValidationError if a required field is absent or unreadable.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _drop_unreadable_values(cls, raw_values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(raw_values)
        except ValidationError as error:
            if not isinstance(raw_values, dict):
                raise
            return handler(_remove_values(raw_values, [detail["loc"] for detail in error.errors()]))


def _remove_values(raw_values: dict[str, Any], locations: list[tuple[int | str, ...]]) -> dict[str, Any]:
    """Return a copy of `raw_values` without the fields at `locations`.

    If a location is inside a list, only the list item that contains the location is removed.
    """
    unreadable_items: dict[str, set[int]] = {}
    remaining_values = dict(raw_values)
    for field, *inner in locations:
        if inner and isinstance(inner[0], int) and isinstance(raw_values.get(str(field)), list):
            unreadable_items.setdefault(str(field), set()).add(inner[0])
        else:
            remaining_values.pop(str(field), None)
    for field, indices in unreadable_items.items():
        remaining_values[field] = [item for i, item in enumerate(raw_values[field]) if i not in indices]
    return remaining_values


DEFAULT_KEY = "x-default"
DEFAULT_TEXT_KEY = "x-default-text"
EXAMPLE_KEY = "x-example"
SINCE_KEY = "x-since"


def spec_field(
    description: str, *, default: Any = None, default_text: str = "", example: Any = None, since: str = "", **constraints: Any
) -> Any:
    """Declare an optional field of the spec. If the user does not set it, the field is None until `defaults.resolve_defaults` fills in its default.

    `default`: a constant default. `default_text`: the description of a default that depends on other fields. `since`: the release
    that added the field; empty for a field of the first release. The default of a field that was added later must keep the behaviour of
    earlier releases.
    """
    given_metadata = {DEFAULT_KEY: default, DEFAULT_TEXT_KEY: default_text or None, EXAMPLE_KEY: example, SINCE_KEY: since or None}
    schema_extra = {key: value for key, value in given_metadata.items() if value is not None}
    return Field(default=None, description=description, json_schema_extra=schema_extra or None, **constraints)


IMMEDIATE_WRITE_KEY = "x-immediate-write"


class ImmediateWrite(StrEnum):
    """Which changes of a status field the operator writes at once. All other changes wait for the next periodic status write."""

    WHEN_VALUE_CHANGES = "value"
    """Every change of the value is written at once."""
    WHEN_PRESENCE_CHANGES = "presence"
    """The field is written at once when it appears or disappears. A change from one value to another waits for the next periodic status write."""


def status_field(
    description: str,
    *,
    default: Any = None,
    default_factory: Any = None,
    example: Any = None,
    immediate: ImmediateWrite | None = None,
) -> Any:
    """Declare a field of the status. `default=...` (Python's Ellipsis) makes the field required. `immediate`: which changes are written at once."""
    schema_extra = {key: value for key, value in ((EXAMPLE_KEY, example), (IMMEDIATE_WRITE_KEY, immediate)) if value is not None}
    if default_factory is not None:
        return Field(default_factory=default_factory, description=description, json_schema_extra=schema_extra or None)
    return Field(default=default, description=description, json_schema_extra=schema_extra or None)


class CelRule(NamedTuple):
    """A CEL rule of the CRD that compares fields of one group of the spec."""

    expression: str
    message: str
    """Error message that the API server returns if the expression is false."""
    code: str
    """Code of the equivalent Python rule in `finetune_api.rules`."""


class Group(WireModel):
    """A group of options in the spec, such as `spec.training`. `cel`: the CEL rules that compare fields of this group."""

    cel: ClassVar[tuple[CelRule, ...]] = ()


def find_nested_group(annotation: Any) -> type[Group] | None:
    """Return the group class in a field's type annotation (`SomeGroup` or `SomeGroup | None`), or None if the annotation contains no group."""
    candidate_types = [annotation, *getattr(annotation, "__args__", ())]
    return next((candidate for candidate in candidate_types if isinstance(candidate, type) and issubclass(candidate, Group) and candidate.model_fields), None)


def iterate_nested_groups(model: type[Group]) -> Iterator[type[Group]]:
    """Yield `model` and every group class nested in it, also inside lists. A class that several fields use is yielded several times."""
    yield model
    for info in model.model_fields.values():
        for group in _iterate_groups_in(info.annotation):
            yield from iterate_nested_groups(group)


def _iterate_groups_in(annotation: Any) -> Iterator[type[Group]]:
    if isinstance(annotation, type) and issubclass(annotation, Group):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _iterate_groups_in(argument)


def read_member_docs(enum_class: type[Enum]) -> dict[str, str]:
    """Return the docstring below each member of an enumeration, by member name."""
    class_node = ast.parse(inspect.getsource(enum_class)).body[0]
    assert isinstance(class_node, ast.ClassDef)
    docs_by_member: dict[str, str] = {}
    for node, next_node in zip(class_node.body, class_node.body[1:], strict=False):
        if isinstance(node, ast.Assign) and isinstance(next_node, ast.Expr) and isinstance(next_node.value, ast.Constant):
            target = node.targets[0]
            assert isinstance(target, ast.Name)
            docs_by_member[target.id] = inspect.cleandoc(str(next_node.value.value))
    return docs_by_member


@cache
def map_fields_to_release(model: type[BaseModel], path_prefix: str = "") -> dict[str, str]:
    """Return the release that added each field, by spec path. Fields of the first release are omitted."""
    release_by_path: dict[str, str] = {}
    for name, info in model.model_fields.items():
        path = f"{path_prefix}{info.alias or name}"
        if isinstance(info.json_schema_extra, dict) and SINCE_KEY in info.json_schema_extra:
            release_by_path[path] = str(info.json_schema_extra[SINCE_KEY])
        group = find_nested_group(info.annotation)
        if group is not None:
            release_by_path |= map_fields_to_release(group, f"{path}.")
    return release_by_path


def make_version_sort_key(release: str) -> tuple[int, ...]:
    """Return a sort key that orders releases by age: `0.10.0` is newer than `0.9.1`. Parts of a version that are not numbers count as 0."""
    return tuple(int(part) if part.isdecimal() else 0 for part in release.split("-")[0].split("."))


def get_value_at_path(nested_values: Any, path: str) -> Any:
    """Return the value at a dotted path in nested dicts, or None if the path does not exist."""
    value = nested_values
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def remove_value_at_path(nested_values: dict[str, Any], path: str) -> None:
    """Remove the value at a dotted path from nested dicts, if the path exists."""
    *group_names, name = path.split(".")
    group_value: Any = nested_values
    for group_name in group_names:
        group_value = group_value.get(group_name) if isinstance(group_value, dict) else None
    if isinstance(group_value, dict):
        group_value.pop(name, None)
