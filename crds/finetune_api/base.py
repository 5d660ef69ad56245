"""What all models share: camelCase on the wire, nothing unknown, and options that carry their own documentation.

`option` is the one place where a field's meaning, unit, default and example are written; the CRD's descriptions, the
reference pages and the resolver of defaults all read it from there.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class WireModel(BaseModel):
    """A model whose JSON is camelCase, frozen, and refuses fields it does not know."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def to_wire(self) -> dict[str, Any]:
        """JSON-ready dict with wire names, without the fields that were never given a value."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class LenientModel(WireModel):
    """For reading what another version wrote: unknown fields are dropped instead of refused."""

    model_config = ConfigDict(extra="ignore")


DEFAULT = "x-default"
DEFAULT_TEXT = "x-default-text"
EXAMPLE = "x-example"


def option(
    description: str, *, default: Any = None, default_text: str = "", example: Any = None, **constraints: Any
) -> Any:
    """An optional field of the spec.

    `default` is the value the resolver fills in (a constant); `default_text` says in words what it fills in where
    that depends on other fields. The field itself stays None until resolved: a schema default would hide where a value
    came from.
    """
    extra: dict[str, Any] = {}
    if default is not None:
        extra[DEFAULT] = default
    if default_text:
        extra[DEFAULT_TEXT] = default_text
    if example is not None:
        extra[EXAMPLE] = example
    return Field(default=None, description=description, json_schema_extra=extra or None, **constraints)


PROMPT = "x-prompt"


class Prompt(StrEnum):
    """Which change of a status field is written at once instead of with the next periodic status write."""

    VALUE = "value"
    """Every change of the value."""
    PRESENCE = "presence"
    """Only the change from absent to present or back."""


def status_field(
    description: str,
    *,
    default: Any = None,
    default_factory: Any = None,
    example: Any = None,
    prompt: Prompt | None = None,
) -> Any:
    """A field of the status; `default=...` makes it required."""
    extra = {key: value for key, value in ((EXAMPLE, example), (PROMPT, prompt)) if value is not None}
    if default_factory is not None:
        return Field(default_factory=default_factory, description=description, json_schema_extra=extra or None)
    return Field(default=default, description=description, json_schema_extra=extra or None)


class Group(WireModel):
    """A group of options. `cel` holds (expression, message) pairs that only concern the group's own fields."""

    cel: ClassVar[tuple[tuple[str, str], ...]] = ()
