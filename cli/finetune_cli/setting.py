"""`--set PATH=VALUE`, and the options that stand for one field: what the user sets beside a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from finetune_cli.importers.convert import nearest
from finetune_cli.importers.material import Assigned, Mistake, Origin, Refused
from finetune_cli.importers.yaml_tree import parse_value
from finetune_cli.paths import Field, fields

OWN = {
    "model": "model.source", "data": "dataset.train", "validation": "dataset.validation", "test": "dataset.test",
    "adapter": "method.adapter.source", "storage": "storage.uri", "gpus": "resources.gpusPerNode", "nodes": "resources.nodes",
}  # fmt: skip
REFERENCES = {"prompts": "evaluation.comparison.promptsRef", "deepspeed": "distributed.deepspeed.configRef"}
PATHS = ("model", "data", "validation", "test", "adapter")
NAME = re.compile(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
KEY = re.compile(r"^[-._a-zA-Z0-9]+$")


def settings(sets: Iterable[str], options: Mapping[str, Any] | None = None) -> dict[str, Assigned]:
    """Fields by spec path. `options`: values of our own options, by name; None if not given. Raises Refused."""
    mistakes: list[Mistake] = []
    result: dict[str, Assigned] = {}
    for option, value in (options or {}).items():
        if value is not None:
            result |= _option(option, value, mistakes)
    by_path = {one.path.removeprefix("spec."): one for one in fields() if one.path.startswith("spec.")}
    for text in sets:
        result |= _set(text, by_path, mistakes)
    if mistakes:
        raise Refused(mistakes)
    return result


def _option(option: str, value: Any, mistakes: list[Mistake]) -> dict[str, Assigned]:
    origin, spelled = Origin(f"--{option}"), f"--{option}"
    if option in OWN:
        # A path of this machine becomes a source; everything else stays as it is.
        is_path = option in PATHS and str(value).startswith((".", "/", "~"))
        return {OWN[option]: Assigned(f"file://{value}" if is_path else value, origin, spelled)}
    name, _, key = str(value).removeprefix("configmap://").partition("/")
    if not NAME.match(name) or not KEY.match(key):
        mistakes.append(Mistake(spelled, str(value), "it is not the name and key of a ConfigMap", "write NAME/KEY"))
        return {}
    path = REFERENCES[option]
    return {f"{path}.name": Assigned(name, origin, spelled), f"{path}.key": Assigned(key, origin, spelled)}


def _set(text: str, by_path: dict[str, Field], mistakes: list[Mistake]) -> dict[str, Assigned]:
    written, equals, value = text.partition("=")
    path = written.removeprefix("spec.")
    field = by_path.get(path)
    if field is None:
        mistakes.append(Mistake("--set", written, "unknown field", _near(path, by_path)))
    elif not equals or value == "":
        mistakes.append(Mistake("--set", path, "it has no value", f"write --set {path}=VALUE, or {path}=null for none"))
    elif value == "null":
        return {path: Assigned(None, Origin("--set"), path)}
    elif field.group:
        inner = next((one for one in by_path if one.startswith(f"{path}.")), path)
        hint = f"set its fields, for example --set {inner}=VALUE, or take it away with --set {path}=null"
        mistakes.append(Mistake("--set", path, "it is a group of fields", hint))
    else:
        return {path: Assigned(_value(field.kind, value), Origin("--set"), path)}
    return {}


def _near(path: str, by_path: dict[str, Field]) -> str:
    """What to write instead of an unknown path. Lists and maps are set as a whole."""
    whole = path
    while whole and whole not in by_path:
        whole = whole[: whole.rfind("[")] if whole.endswith("]") else whole.rpartition(".")[0]
    kind = by_path[whole].kind if whole else ""
    if kind.startswith("list of"):
        return f"a list is set as a whole: --set '{whole}=[...]'"
    if kind.startswith("map of"):
        return f"a map is set as a whole: --set '{whole}={{NAME: VALUE}}'"
    near = nearest(path, [one for one in by_path if "[]" not in one])
    return f"did you mean {near}?" if near else "`finetune explain` lists all"


def _value(kind: str, text: str) -> Any:
    """The text as the field's kind means it: `no` and `010` are themselves where a word is wanted."""
    if kind.startswith("string") or (" | " in kind and not kind.startswith("list")):
        return text
    found = parse_value(text)
    if kind == "map of string" and isinstance(found, dict):
        return {key: one if isinstance(one, str | dict | list) else _word(one) for key, one in found.items()}
    if kind.startswith("list of") and isinstance(found, str) and not text.startswith("["):
        return [part.strip() for part in found.split(",")]
    return found


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
