"""Parses the input documents of an import as YAML or JSON and lists the options with file and line."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

from finetune_cli.importers.draft import InputDocument, OptionEntry
from finetune_cli.mistakes import InvalidInput, Mistake
from finetune_cli.provenance import ValueOrigin
from finetune_cli.yaml_reader import InvalidYaml, Tree, read_trees


def parse_document(document: InputDocument) -> Tree:
    """Parse a document that holds one YAML or JSON mapping. Raises InvalidInput for any other content."""
    try:
        trees = read_trees(document.text)
    except InvalidYaml as error:
        raise InvalidInput([Mistake(_line_location(document, error.line), "", str(error))]) from None
    if not trees:
        raise InvalidInput([Mistake(document.name, "", "the file is empty")])
    tree = trees[0]
    if len(trees) > 1:
        location = _line_location(document, trees[1].line)
        raise InvalidInput(
            [Mistake(location, "", "a second YAML document begins here", "keep one configuration per file")]
        )
    if not isinstance(tree.value, dict):
        raise InvalidInput([Mistake(document.name, "", "the file is not a mapping of names to values")])
    if tree.problems:
        raise InvalidInput(
            [
                Mistake(_line_location(document, problem.line), problem.path, problem.message, problem.hint)
                for problem in tree.problems
            ]
        )
    return tree


def _line_location(document: InputDocument, line: int) -> str:
    return f"{document.name}:{line}" if line else document.name


def iterate_entries(document: InputDocument, tree: Tree, opaque_paths: frozenset[str] = frozenset()) -> Iterator[OptionEntry]:
    """Yield an entry, with file and line, for each value of a tree that is not a mapping."""
    for path, value in tree.leaves(opaque_paths):
        line = tree.lines.get(path)
        yield OptionEntry(path, value, ValueOrigin(f"{document.name}:{line}" if line else document.name))


def parse_json(document: InputDocument) -> dict[str, Any]:
    """Parse a document that holds one JSON object. Raises InvalidInput for any other content."""
    try:
        value = json.loads(document.text)
    except json.JSONDecodeError as error:
        raise InvalidInput([Mistake(f"{document.name}:{error.lineno}", "", f"invalid JSON: {error.msg}")]) from None
    except (ValueError, RecursionError):
        message = "the file holds a number that is too long, or is nested too deeply"
        raise InvalidInput([Mistake(document.name, "", message)]) from None
    if not isinstance(value, dict):
        raise InvalidInput([Mistake(document.name, "", "the file is not a JSON object")])
    return value


@functools.lru_cache(maxsize=16)
def peek_json(document: InputDocument) -> dict[str, Any]:
    """Return the object of a JSON document, or an empty dict for any other document. Used to recognise the tool. Does not report errors."""
    if document.is_folder or not document.text.lstrip().startswith("{"):
        return {}
    try:
        return parse_json(document)
    except InvalidInput:
        return {}


@functools.lru_cache(maxsize=16)
def peek_keys(document: InputDocument) -> dict[str, Any]:
    """Return the mapping of a YAML or JSON document, or guessed keys if the YAML is invalid.

    Used to recognise the tool. Does not report errors.
    """
    if document.is_folder or document.path.suffix.lower() in (".env", ".toml"):
        return {}
    try:
        return dict(parse_document(document).value)
    except InvalidInput:
        return _guess_keys(document.text)


def _guess_keys(text: str) -> dict[str, Any]:
    """Return the keys in a file that is not valid YAML. These keys select the importer, and the importer reports the syntax error."""
    result: dict[str, Any] = {}
    section: dict[str, Any] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if not colon or name.strip().startswith(("#", "-")) or not name.strip():
            continue
        if not name.startswith((" ", "\t")):
            section = {}
            result[name.strip()] = value.strip() or section
        else:
            section[name.strip()] = value.strip()
    return result
