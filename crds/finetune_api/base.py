"""Base classes of all models: camelCase names in JSON, and fields that contain their own documentation.

Each field is declared by `option` or `status_field`, with its description, default and example. The CRD's descriptions, the
reference pages and the defaults are generated from these declarations.
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
    """A frozen model with camelCase JSON that refuses unknown fields."""

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
    """A model for data that another version may have written: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class ReportModel(LenientModel):
    """A model for status and reports of another version: unknown fields and unreadable values are dropped, all other values are kept.

    A field with an unreadable value counts as absent; an unreadable list item is omitted. Errors: ValidationError if a
    required field is absent or unreadable.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _drop_unreadable_values(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            if not isinstance(data, dict):
                raise
            return handler(_without_values(data, [item["loc"] for item in error.errors()]))


def _without_values(data: dict[str, Any], locations: list[tuple[int | str, ...]]) -> dict[str, Any]:
    """Return a copy of `data` without the fields at `locations`. If a location is inside a list, only that list item is removed."""
    unreadable_items: dict[str, set[int]] = {}
    remaining_values = dict(data)
    for field, *inner in locations:
        if inner and isinstance(inner[0], int) and isinstance(data.get(str(field)), list):
            unreadable_items.setdefault(str(field), set()).add(inner[0])
        else:
            remaining_values.pop(str(field), None)
    for field, indices in unreadable_items.items():
        remaining_values[field] = [item for i, item in enumerate(data[field]) if i not in indices]
    return remaining_values


DEFAULT_KEY = "x-default"
DEFAULT_TEXT_KEY = "x-default-text"
EXAMPLE_KEY = "x-example"
SINCE_KEY = "x-since"


def spec_field(
    description: str, *, default: Any = None, default_text: str = "", example: Any = None, since: str = "", **constraints: Any
) -> Any:
    """Declare an optional field of the spec. Without a user's value, the field is None until `defaults.resolve_defaults` fills it in.

    `default`: a constant default. `default_text`: the description of a default that depends on other fields. `since`: the release
    that added the field. The default of a field that was added later must keep the behaviour of earlier releases.
    """
    given_metadata = {DEFAULT_KEY: default, DEFAULT_TEXT_KEY: default_text or None, EXAMPLE_KEY: example, SINCE_KEY: since or None}
    schema_extra = {key: value for key, value in given_metadata.items() if value is not None}
    return Field(default=None, description=description, json_schema_extra=schema_extra or None, **constraints)


PROMPT_KEY = "x-prompt"


class PromptWrite(StrEnum):
    """Which changes of a status field the operator writes at once. Other changes may wait for the next periodic status write."""

    WHEN_VALUE_CHANGES = "value"
    """Every change of the value is written at once."""
    WHEN_PRESENCE_CHANGES = "presence"
    """A change is written at once only if the field appears or disappears; other changes may wait."""


def status_field(
    description: str,
    *,
    default: Any = None,
    default_factory: Any = None,
    example: Any = None,
    prompt: PromptWrite | None = None,
) -> Any:
    """Declare a field of the status; `default=...` makes the field required."""
    schema_extra = {key: value for key, value in ((EXAMPLE_KEY, example), (PROMPT_KEY, prompt)) if value is not None}
    if default_factory is not None:
        return Field(default_factory=default_factory, description=description, json_schema_extra=schema_extra or None)
    return Field(default=default, description=description, json_schema_extra=schema_extra or None)


class CelRule(NamedTuple):
    """A CEL rule of the CRD about the fields of one group of the spec."""

    expression: str
    message: str
    """Error message that the API server returns if the expression is false."""
    code: str
    """Code of the equivalent Python rule in `finetune_api.rules`."""


class Group(WireModel):
    """A group of options in the spec. `cel` contains only CEL rules about fields of the same group."""

    cel: ClassVar[tuple[CelRule, ...]] = ()


def nested_group(annotation: Any) -> type[Group] | None:
    """Return the group in a field's annotation (`SomeGroup` or `SomeGroup | None`). None: the annotation contains no group."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((item for item in options if isinstance(item, type) and issubclass(item, Group) and item.model_fields), None)


def nested_groups(model: type[Group]) -> Iterator[type[Group]]:
    """Yield `model` and every group nested in `model`, including groups in lists. A group that is used by several fields is yielded several times."""
    yield model
    for info in model.model_fields.values():
        for group in _groups_in(info.annotation):
            yield from nested_groups(group)


def _groups_in(annotation: Any) -> Iterator[type[Group]]:
    if isinstance(annotation, type) and issubclass(annotation, Group):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _groups_in(argument)


def member_docs(enum_class: type[Enum]) -> dict[str, str]:
    """Return the docstrings of an enumeration's members, by member name."""
    body = ast.parse(inspect.getsource(enum_class)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs_by_member: dict[str, str] = {}
    for node, follower in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.Assign) and isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
            target = node.targets[0]
            assert isinstance(target, ast.Name)
            docs_by_member[target.id] = inspect.cleandoc(str(follower.value.value))
    return docs_by_member


@cache
def fields_with_since(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Map spec paths to the release that added the field. Fields of the first release are omitted."""
    release_by_path: dict[str, str] = {}
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        if isinstance(info.json_schema_extra, dict) and SINCE_KEY in info.json_schema_extra:
            release_by_path[path] = str(info.json_schema_extra[SINCE_KEY])
        group = nested_group(info.annotation)
        if group is not None:
            release_by_path |= fields_with_since(group, f"{path}.")
    return release_by_path


def version_key(release: str) -> tuple[int, ...]:
    """Return a sort key for a release, so that `0.10.0` is newer than `0.9.1`. Parts of the version that are not numbers count as 0."""
    return tuple(int(part) if part.isdecimal() else 0 for part in release.split("-")[0].split("."))


def value_at(value: Any, path: str) -> Any:
    """Return the value at a dotted path in nested dicts, or None."""
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def remove_path(value: dict[str, Any], path: str) -> None:
    """Remove the value at a dotted path from nested dicts, if the path exists."""
    *groups, name = path.split(".")
    group_value: Any = value
    for group in groups:
        group_value = group_value.get(group) if isinstance(group_value, dict) else None
    if isinstance(group_value, dict):
        group_value.pop(name, None)
