"""Reads manifests from files and keeps the line of every field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.names import GROUP, KIND

from finetune_cli.files import UnreadableFile, display_name, read_text
from finetune_cli.mistakes import Mistake
from finetune_cli.output import CommandError
from finetune_cli.yaml_reader import InvalidYaml, Tree, read_trees

LIST_KIND = "List"


@dataclass(frozen=True)
class Manifest:
    """One Kubernetes object of a file, with the line number of every field."""

    file: str
    document_number: int
    value: dict[str, Any]
    lines: dict[str, int]

    @property
    def name(self) -> str:
        """`metadata.name`, or an empty string."""
        metadata = self.value.get("metadata")
        return str(metadata.get("name") or "") if isinstance(metadata, dict) else ""

    @property
    def is_job(self) -> bool:
        """Whether the object has the kind FineTuneJob or an apiVersion of the same API group. One of the two is enough: the other may be misspelled."""
        kind, version = str(self.value.get("kind")), str(self.value.get("apiVersion"))
        return kind.lower() == KIND.lower() or version.startswith(f"{GROUP}/")

    @property
    def spec(self) -> dict[str, Any]:
        """The spec, or an empty dict if there is no spec. Raises CommandError if the spec is not a mapping."""
        spec = self.value.get("spec") or {}
        if not isinstance(spec, dict):
            raise CommandError(
                f"{self.location('spec')}: spec: this is not a mapping; write `spec:` followed by its fields"
            )
        return spec

    def location(self, path: str) -> str:
        """Return `file:line` of a field or, if the file lacks the field, of the nearest enclosing group."""
        while path and path not in self.lines:
            path = path[: path.rfind("[")] if path.endswith("]") else path.rpartition(".")[0]
        return f"{self.file}:{self.lines[path]}" if path else self.file


def read(path: Path) -> list[Manifest]:
    """Read every object of a YAML or JSON file or of standard input. Raises UnreadableFile."""
    return list(parse_manifests(read_text(path), display_name(path)))


def read_all_manifests(paths: Iterable[Path]) -> tuple[list[Manifest], list[Mistake]]:
    """Read every object of several files. Returns the objects, and a mistake for each unreadable file."""
    manifests: list[Manifest] = []
    mistakes: list[Mistake] = []
    for path in paths:
        try:
            manifests += read(path)
        except UnreadableFile as error:
            mistakes.append(error.mistake)
    return manifests, mistakes


def read_job(path: Path) -> Manifest:
    """Read a file that holds exactly one FineTuneJob. Raises UnreadableFile or CommandError."""
    jobs = [manifest for manifest in read(path) if manifest.is_job]
    if len(jobs) != 1:
        raise CommandError(f"{display_name(path)}: the file holds {len(jobs)} FineTuneJobs, but exactly one is needed")
    return jobs[0]


def parse_manifests(text: str, file: str) -> Iterator[Manifest]:
    """Parse every object of a text as kubectl does. Raises UnreadableFile."""
    try:
        yaml_trees = read_trees(text)
    except InvalidYaml as error:
        raise UnreadableFile(Mistake(f"{file}:{error.line}" if error.line else file, "", str(error))) from None
    for document_number, tree in enumerate(yaml_trees):
        for problem in tree.problems:
            raise UnreadableFile(Mistake(f"{file}:{problem.line}", problem.path, problem.message, problem.hint))
        if tree.value is None:
            continue
        if not isinstance(tree.value, dict):
            raise UnreadableFile(
                Mistake(f"{file}:{tree.line}", "", "this is not a manifest, because it is not a mapping")
            )
        if tree.value.get("kind") == LIST_KIND and isinstance(tree.value.get("items"), list):
            yield from _iterate_list_items(file, document_number, tree)
        elif tree.value:
            yield Manifest(file, document_number, tree.value, tree.lines)


def _iterate_list_items(file: str, document_number: int, list_document: Tree) -> Iterator[Manifest]:
    """Yield the objects of a `List`. `kubectl get -o yaml` prints several objects as such a document."""
    for i, item in enumerate(list_document.value["items"]):
        item_path = f"items[{i}]"
        if not isinstance(item, dict):
            location = f"{file}:{list_document.lines.get(item_path, list_document.line)}"
            raise UnreadableFile(Mistake(location, item_path, "this is not a manifest, because it is not a mapping"))
        lines = {
            path.removeprefix(f"{item_path}."): line for path, line in list_document.lines.items() if path.startswith(f"{item_path}.")
        }
        yield Manifest(file, document_number, item, lines)
