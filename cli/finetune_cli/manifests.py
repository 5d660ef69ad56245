"""Manifests on disk: FineTuneJobs with the line of every field, checked as the API server and the operator check them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.names import API_VERSION, GROUP, KIND, MAX_NAME_LENGTH, NAME_PATTERN
from finetune_api.rules import Where, check
from finetune_api.spec import FineTuneJobSpec, load
from finetune_api.support import unsupported
from pydantic import ValidationError

from finetune_cli.importers.convert import nearest
from finetune_cli.importers.material import Mistake
from finetune_cli.paths import fields


@dataclass(frozen=True)
class Manifest:
    """One document of a file."""

    file: str
    number: int
    value: dict[str, Any]
    lines: dict[str, int]

    @property
    def name(self) -> str:
        """metadata.name, or an empty text."""
        metadata = self.value.get("metadata")
        return str(metadata.get("name") or "") if isinstance(metadata, dict) else ""

    @property
    def is_job(self) -> bool:
        """Whether it says that it is a FineTuneJob."""
        return self.value.get("kind") == KIND

    def place(self, path: str) -> str:
        """`file:line` of a field, or of the nearest group around it."""
        while path and path not in self.lines:
            path = path[: path.rfind("[")] if path.endswith("]") else path.rpartition(".")[0]
        return f"{self.file}:{self.lines[path]}" if path else self.file


class Unreadable(Exception):
    """A file that is not a manifest."""

    def __init__(self, mistake: Mistake):
        super().__init__(str(mistake))
        self.mistake = mistake


def read(path: Path) -> list[Manifest]:
    """Every document of a YAML or JSON file. Raises Unreadable."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise Unreadable(Mistake(str(path), "", "there is no such file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(Mistake(str(path), "", f"it cannot be read: {error}")) from None
    return list(parse(text, str(path)))


def parse(text: str, file: str) -> Iterator[Manifest]:
    """Every document of a text; YAML 1.2 core numbers, as kubectl reads them. Raises Unreadable."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.allow_duplicate_keys = False
    yaml.version = (1, 1)
    try:
        nodes = list(yaml.compose_all(text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise Unreadable(
            Mistake(f"{file}:{mark.line + 1}" if mark else file, "", f"it is not YAML: {error.problem}")
        ) from None
    except YAMLError as error:
        raise Unreadable(Mistake(file, "", f"it is not YAML: {error}")) from None
    for number, node in enumerate(node for node in nodes if node is not None):
        if node.id != "mapping":
            raise Unreadable(
                Mistake(f"{file}:{node.start_mark.line + 1}", "", "it is not a manifest: a mapping is needed")
            )
        lines: dict[str, int] = {}
        value = _value(node, "", lines, file)
        if value:
            yield Manifest(file, number, value, lines)


def _value(node: Any, path: str, lines: dict[str, int], file: str) -> Any:
    from finetune_cli.importers.yaml_tree import scalar

    lines.setdefault(path, node.start_mark.line + 1)
    if node.id == "sequence":
        return [_value(one, f"{path}[{i}]", lines, file) for i, one in enumerate(node.value)]
    if node.id != "mapping":
        return scalar(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        inner = f"{path}.{key}" if path else key
        if key in result:
            raise Unreadable(Mistake(f"{file}:{key_node.start_mark.line + 1}", inner, "it stands twice", "keep one"))
        lines[inner] = key_node.start_mark.line + 1
        result[key] = _value(value_node, inner, lines, file)
    return result


# --- checking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One problem of a manifest; `serious` is false for what only `--strict` refuses."""

    mistake: Mistake
    code: str
    serious: bool = True


def examine(manifest: Manifest, where: Where = Where.CLUSTER) -> tuple[FineTuneJobSpec | None, list[Finding]]:
    """The spec, if it can be read, and everything that is wrong with the manifest."""
    findings = list(_frame(manifest))
    raw = manifest.value.get("spec")
    if not isinstance(raw, dict):
        mistake = Mistake(
            manifest.place("spec"), "spec", "it is missing" if raw is None else "it is not a group", "write spec:"
        )
        return None, [*findings, Finding(mistake, "SpecMissing")]
    strange = list(_unknown(manifest, raw))
    spec, shape = _shaped(manifest, raw)
    findings += [*strange, *shape]
    if spec is not None:
        findings += [
            Finding(Mistake(manifest.place(f"spec.{one.path}"), f"spec.{one.path}", one.message, one.hint), one.code)
            for one in (*check(spec, where=where), *unsupported(spec))
            if not (where is Where.LOCAL and one.code == "SourceInvalid" and _is_local_path(raw, one.path))
        ]
    return spec, findings


def _is_local_path(raw: dict[str, Any], path: str) -> bool:
    """A path relative to the user's folder: fine on the user's machine."""
    value: Any = raw
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return isinstance(value, str) and value.startswith(("file://", ".", "/", "~"))


def _frame(manifest: Manifest) -> Iterator[Finding]:
    version = manifest.value.get("apiVersion")
    if version != API_VERSION:
        hint = (
            f"write {API_VERSION}"
            if str(version).startswith(GROUP) or version is None
            else f"write apiVersion: {API_VERSION}"
        )
        yield Finding(
            Mistake(
                manifest.place("apiVersion"), "apiVersion", f"{version or 'missing'} is not a version of {KIND}", hint
            ),
            "ApiVersion",
        )
    if not re.match(NAME_PATTERN, manifest.name) or len(manifest.name) > MAX_NAME_LENGTH:
        shown = f"{manifest.name!r} cannot be the name of a FineTuneJob" if manifest.name else "it is missing"
        hint = f"a-z, 0-9 and -, a letter first, at most {MAX_NAME_LENGTH} characters"
        yield Finding(Mistake(manifest.place("metadata.name"), "metadata.name", shown, hint), "NameInvalid")
    for key in manifest.value:
        if key not in ("apiVersion", "kind", "metadata", "spec", "status"):
            yield Finding(
                Mistake(manifest.place(key), key, "unknown field", "remove it, or move it below spec"), "UnknownField"
            )


def _unknown(manifest: Manifest, raw: dict[str, Any]) -> Iterator[Finding]:
    """Fields that the schema does not have, each with the nearest one that it has."""
    known: dict[str, bool] = {one.path: one.group or one.kind.startswith("list of group") for one in fields()}
    open_maps = {one.path for one in fields() if one.kind.startswith("map of")}
    yield from _strange(manifest, raw, "spec", "spec", known, open_maps)


def _strange(
    manifest: Manifest, value: dict[str, Any], path: str, pattern: str, known: dict[str, bool], maps: set[str]
) -> Iterator[Finding]:
    for key, inner in value.items():
        here, wanted = f"{path}.{key}", f"{pattern}.{key}"
        if wanted not in known:
            near = nearest(wanted, known)
            hint = f"did you mean {near}?" if near else "`finetune explain` lists all fields"
            yield Finding(Mistake(manifest.place(here), here, "unknown field", hint), "UnknownField")
        elif wanted in maps:
            continue
        elif isinstance(inner, dict) and known[wanted]:
            yield from _strange(manifest, inner, here, wanted, known, maps)
        elif isinstance(inner, list):
            for i, item in enumerate(inner):
                if isinstance(item, dict):
                    yield from _strange(manifest, item, f"{here}[{i}]", f"{wanted}[]", known, maps)


def _shaped(manifest: Manifest, raw: dict[str, Any]) -> tuple[FineTuneJobSpec | None, list[Finding]]:
    """Read the spec with its models; what does not fit is told and left out, so that the rules can look at the rest."""
    findings: list[Finding] = []
    value = _without(raw, [])
    for _ in range(2):
        try:
            return load(value), findings
        except ValidationError as error:
            locations = []
            for one in error.errors():
                locations.append(list(one["loc"]))
                if one["type"] == "extra_forbidden":
                    continue
                path = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in one["loc"])
                shown = f"{one['input']!r}: " if isinstance(one["input"], str | int | float) else ""
                message = shown + str(one["msg"]).removeprefix("Value error, ").removeprefix("Input ")
                findings.append(Finding(Mistake(manifest.place(path), path, message), "ValueInvalid"))
            value = _without(value, locations)
    return None, findings


def _without(value: dict[str, Any], locations: list[list[Any]]) -> dict[str, Any]:
    """A copy without some fields; nulls count as absent, as the API server prunes them."""
    import copy

    result = copy.deepcopy(value)
    for location in locations:
        group: Any = result
        for depth, part in enumerate(location):
            if isinstance(group, list) or depth == len(location) - 1:
                break
            inner = group.get(part) if isinstance(group, dict) else None
            if not isinstance(inner, dict | list):
                break
            if isinstance(inner, list):
                break
            group = inner
        else:
            continue
        if isinstance(group, dict):
            group.pop(location[depth], None)
    return result
