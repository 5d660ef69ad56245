"""Manifests on disk: FineTuneJobs with the line of every field, checked as the API server and the operator check them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.names import API_VERSION, GROUP, KIND, MAX_NAME_LENGTH, NAME_PATTERN
from finetune_api.rules import ExecutionTarget, check
from finetune_api.spec import FineTuneJobSpec, load_spec
from finetune_api.support import unsupported_fields
from pydantic import ValidationError

from finetune_cli.files import Unreadable, read_text, shown
from finetune_cli.hiding import looks_secret
from finetune_cli.importers.convert import nearest
from finetune_cli.importers.material import Mistake
from finetune_cli.importers.yaml_tree import NotYaml, Tree, trees
from finetune_cli.paths import fields
from finetune_cli.shapes import Misshapen, inside, misshapen, unreadable


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
        """Whether it says that it is a FineTuneJob, or was meant to say so."""
        kind, version = str(self.value.get("kind")), str(self.value.get("apiVersion"))
        return kind.lower() == KIND.lower() or version.startswith(f"{GROUP}/")

    def place(self, path: str) -> str:
        """`file:line` of a field, or of the nearest group around it."""
        while path and path not in self.lines:
            path = path[: path.rfind("[")] if path.endswith("]") else path.rpartition(".")[0]
        return f"{self.file}:{self.lines[path]}" if path else self.file


def read(path: Path) -> list[Manifest]:
    """Every document of a YAML or JSON file, or of standard input. Raises Unreadable."""
    return list(parse(read_text(path), shown(path)))


def read_all(paths: Iterable[Path]) -> tuple[list[Manifest], list[Mistake]]:
    """Every document of several files, and what is wrong with the files that cannot be read."""
    found: list[Manifest] = []
    wrong: list[Mistake] = []
    for path in paths:
        try:
            found += read(path)
        except Unreadable as unreadable:
            wrong.append(unreadable.mistake)
    return found, wrong


def parse(text: str, file: str) -> Iterator[Manifest]:
    """Every document of a text, read as kubectl reads it. Raises Unreadable."""
    try:
        found = trees(text)
    except NotYaml as error:
        raise Unreadable(Mistake(f"{file}:{error.line}" if error.line else file, "", str(error))) from None
    for number, tree in enumerate(found):
        for one in tree.problems:
            raise Unreadable(Mistake(f"{file}:{one.line}", one.path, one.message, one.hint))
        if tree.value is None:
            continue
        if not isinstance(tree.value, dict):
            raise Unreadable(Mistake(f"{file}:{tree.line}", "", "it is not a manifest: a mapping is needed"))
        if tree.value.get("kind") == LIST and isinstance(tree.value.get("items"), list):
            yield from _items(file, number, tree)
        elif tree.value:
            yield Manifest(file, number, tree.value, tree.lines)


def _items(file: str, number: int, tree: Tree) -> Iterator[Manifest]:
    """The objects of a List, as `get -o yaml` prints it and kubectl takes it."""
    for i, item in enumerate(tree.value["items"]):
        start = f"items[{i}]"
        if not isinstance(item, dict):
            raise Unreadable(
                Mistake(
                    f"{file}:{tree.lines.get(start, tree.line)}", start, "it is not a manifest: a mapping is needed"
                )
            )
        lines = {
            path.removeprefix(f"{start}."): line for path, line in tree.lines.items() if path.startswith(f"{start}.")
        }
        yield Manifest(file, number, item, lines)


# --- checking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One problem of a manifest; `serious` is false for what only `--strict` refuses."""

    mistake: Mistake
    code: str
    serious: bool = True


def serious(findings: list[Finding]) -> list[Finding]:
    """What must be mended; the others are told as warnings."""
    return [one for one in findings if one.serious]


def advice(findings: list[Finding]) -> list[Mistake]:
    """What is legal and unwise."""
    return [one.mistake for one in findings if not one.serious]


def examine(manifest: Manifest, target: ExecutionTarget = ExecutionTarget.CLUSTER) -> tuple[FineTuneJobSpec | None, list[Finding]]:
    """The spec, if it can be read, and everything that is wrong with the manifest."""
    findings = list(_frame(manifest))
    raw = manifest.value.get("spec")
    if not isinstance(raw, dict):
        mistake = Mistake(
            manifest.place("spec"), "spec", "it is missing" if raw is None else "it is not a group", "write spec:"
        )
        return None, [*findings, Finding(mistake, "SpecMissing")]
    raw = without_nulls(raw)
    findings += _unknown(manifest, raw)
    spec, wrong = _shaped(raw)
    findings += [
        _finding(manifest, one.path, one.message, one.hint, "ValueInvalid") for one in wrong if not one.unknown
    ]
    if spec is not None:
        findings += [
            _finding(manifest, one.path, one.message, one.hint, one.code)
            for one in (*check(spec, target=target), *unsupported_fields(spec))
            if not (target is ExecutionTarget.LOCAL and one.code == "SourceInvalid" and _is_local_path(raw, one.path))
            and not any(inside(one.path, other.path) or inside(other.path, one.path) for other in wrong)
        ]
    findings += _secrets(manifest, raw)
    return spec, findings


def _secrets(manifest: Manifest, raw: dict[str, Any], path: str = "spec") -> Iterator[Finding]:
    """Texts that look like secrets: legal, and read by everybody who may read the job."""
    for key, inner in raw.items():
        here = f"{path}.{key}"
        if isinstance(inner, dict):
            yield from _secrets(manifest, inner, here)
        elif looks_secret(inner):
            message = "it looks like a token or password, and everybody who may read the job sees it"
            hint = "put it into a Secret, and name that"
            yield Finding(Mistake(manifest.place(here), here, message, hint), "LooksSecret", serious=False)


def _finding(manifest: Manifest, path: str, message: str, hint: str, code: str) -> Finding:
    return Finding(Mistake(manifest.place(f"spec.{path}"), f"spec.{path}", message, hint), code)


def without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """A copy in which nulls are absent: the API server prunes them."""
    return {
        key: without_nulls(inner) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if inner is not None
    }


def _is_local_path(raw: dict[str, Any], path: str) -> bool:
    """A path relative to the user's folder: fine on the user's machine."""
    value: Any = raw
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return isinstance(value, str) and value.startswith(("file://", ".", "/", "~"))


LIST = "List"
FRAME = ("apiVersion", "kind", "metadata", "spec", "status")
METADATA = (
    "name", "namespace", "labels", "annotations", "generateName", "finalizers", "ownerReferences", "uid", "resourceVersion", "generation",
    "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "managedFields", "selfLink",
)  # fmt: skip


def _frame(manifest: Manifest) -> Iterator[Finding]:
    """What stands around the spec."""
    for key, wanted, code in (("apiVersion", API_VERSION, "ApiVersion"), ("kind", KIND, "Kind")):
        found = manifest.value.get(key)
        if found != wanted:
            message = "it is missing" if found is None else f"{found} is not {wanted}"
            yield Finding(Mistake(manifest.place(key), key, message, f"write {key}: {wanted}"), code)
    yield from (_strange_word(manifest, key, FRAME, "") for key in manifest.value if key not in FRAME)
    metadata = manifest.value.get("metadata")
    if not re.match(NAME_PATTERN, manifest.name) or len(manifest.name) > MAX_NAME_LENGTH:
        message = f"{manifest.name!r} cannot be the name of a FineTuneJob" if manifest.name else "it is missing"
        hint = f"a-z, 0-9 and -, a letter first, at most {MAX_NAME_LENGTH} characters"
        yield Finding(Mistake(manifest.place("metadata.name"), "metadata.name", message, hint), "NameInvalid")
    if isinstance(metadata, dict):
        yield from (_strange_word(manifest, key, METADATA, "metadata.") for key in metadata if key not in METADATA)
        yield from _texts(manifest, metadata)


def _strange_word(manifest: Manifest, key: str, known: tuple[str, ...], prefix: str) -> Finding:
    near = nearest(key, known)
    hint = f"did you mean {prefix}{near}?" if near else "remove it" if prefix else "remove it, or move it below spec"
    return Finding(Mistake(manifest.place(prefix + key), prefix + key, "unknown field", hint), "UnknownField")


def _texts(manifest: Manifest, metadata: dict[str, Any]) -> Iterator[Finding]:
    """The server takes texts only as labels, annotations and names: a number must be quoted."""
    found: list[tuple[str, Any]] = [("namespace", metadata.get("namespace"))]
    for group in ("labels", "annotations"):
        inner = metadata.get(group)
        found += [(f"{group}.{key}", value) for key, value in inner.items()] if isinstance(inner, dict) else []
    for key, value in found:
        if isinstance(value, bool | int | float):
            path, text = f"metadata.{key}", str(value).lower() if isinstance(value, bool) else str(value)
            yield Finding(
                Mistake(manifest.place(path), path, f"{text} is not a text", f'quote it: "{text}"'), "ValueInvalid"
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


def _shaped(raw: dict[str, Any]) -> tuple[FineTuneJobSpec | None, list[Misshapen]]:
    """Read the spec with its models; what does not fit is told and left out, so that the rules can look at the rest."""
    wrong: list[Misshapen] = []
    value = raw
    for _ in range(3):
        try:
            return load_spec(value), wrong
        except ValidationError as error:
            wrong += list(misshapen(error, wrong))
            value = _without(value, list(unreadable(error)))
    return None, wrong


def _without(value: dict[str, Any], locations: list[tuple[Any, ...]]) -> dict[str, Any]:
    """A copy without some fields; of a list with a wrong item nothing is left."""
    import copy

    result = copy.deepcopy(value)
    for location in locations:
        group: Any = result
        for depth, part in enumerate(location):
            inner = group.get(part) if isinstance(group, dict) else None
            if depth == len(location) - 1 or not isinstance(inner, dict):
                if isinstance(group, dict):
                    group.pop(part, None)
                break
            group = inner
    return result
