"""Paths of the spec, from the models themselves: what may be set, explained and compared."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.base import DEFAULT, DEFAULT_TEXT, EXAMPLE
from finetune_api.spec import FineTuneJobSpec


@dataclass(frozen=True)
class Field:
    """One field of the spec, as its model documents it."""

    path: str
    kind: str
    description: str
    default: str
    example: str
    group: bool


@functools.cache
def fields() -> tuple[Field, ...]:
    """Every field, groups before what is in them; `[]` marks the items of a list."""
    return tuple(_fields(FineTuneJobSpec, ""))


@functools.cache
def leaf_paths() -> frozenset[str]:
    """Paths that a value can be set at: fields that are not groups, and lists as a whole."""
    return frozenset(one.path for one in fields() if not one.group and "[]" not in one.path)


def _fields(model: Any, prefix: str) -> Iterator[Field]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        inner, is_list = _group(info.annotation)
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        default = extra.get(DEFAULT)
        shown = _plain(default) if default is not None else str(extra.get(DEFAULT_TEXT, ""))
        example = _plain(extra[EXAMPLE]) if EXAMPLE in extra else ""
        yield Field(
            path,
            _kind(info.annotation, info.metadata, inner, is_list),
            info.description or "",
            shown,
            example,
            inner is not None and not is_list,
        )
        if inner is not None:
            yield from _fields(inner, f"{path}[]." if is_list else f"{path}.")


def _plain(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


def _group(annotation: Any) -> tuple[Any, bool]:
    """(model, whether it is the item of a list) below a field, if there is one."""
    for one in _inside(annotation):
        if hasattr(one, "model_fields"):
            return one, False
        if getattr(one, "__origin__", None) is list:
            model, _ = _group(one.__args__[0])
            return model, model is not None
    return None, False


def _inside(annotation: Any) -> Iterator[Any]:
    """Members of unions and Annotated types."""
    args = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) in (list, dict) or not args or hasattr(annotation, "model_fields"):
        yield getattr(annotation, "__origin__", None) and annotation or annotation
        return
    if hasattr(annotation, "__metadata__"):
        yield from _inside(annotation.__origin__)
        return
    for one in args:
        yield from _inside(one)


def _kind(annotation: Any, metadata: list[Any], inner: Any, is_list: bool) -> str:
    from enum import Enum

    if is_list:
        return "list of groups"
    if inner is not None:
        return "group"
    types = [one for one in _inside(annotation) if one is not type(None)]
    words = []
    for one in types:
        if isinstance(one, type) and issubclass(one, Enum):
            words.append(" | ".join(str(member.value) for member in one))
        elif getattr(one, "__origin__", None) is list:
            words.append("list")
        elif getattr(one, "__origin__", None) is dict:
            words.append("map of texts")
        else:
            words.append(
                {"str": "text", "int": "integer", "float": "number", "bool": "true | false"}.get(
                    getattr(one, "__name__", ""), "text"
                )
            )
    return " | ".join(dict.fromkeys(words))
