"""Parses the files of an import as YAML or JSON, and lists their options with file and line."""

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
    """Parse a file that holds one YAML or JSON mapping. Raise InvalidInput for any other content."""
    try:
        parsed_documents = read_trees(document.text)
    except InvalidYaml as error:
        raise InvalidInput([Mistake(_locate_line(document, error.line), "", str(error))]) from None
    if not parsed_documents:
        raise InvalidInput([Mistake(document.name, "", "the file is empty")])
    parsed_document = parsed_documents[0]
    if len(parsed_documents) > 1:
        location = _locate_line(document, parsed_documents[1].line)
        raise InvalidInput(
            [Mistake(location, "", "a second YAML document begins here", "keep one configuration per file")]
        )
    if not isinstance(parsed_document.value, dict):
        raise InvalidInput([Mistake(document.name, "", "the file is not a mapping of names to values")])
    if parsed_document.problems:
        raise InvalidInput(
            [
                Mistake(_locate_line(document, problem.line), problem.path, problem.message, problem.hint)
                for problem in parsed_document.problems
            ]
        )
    return parsed_document


def _locate_line(document: InputDocument, line: int) -> str:
    return f"{document.name}:{line}" if line else document.name


def iterate_entries(document: InputDocument, parsed_document: Tree, opaque_paths: frozenset[str] = frozenset()) -> Iterator[OptionEntry]:
    """Yield one entry, with file and line, for each value that is not a mapping. A mapping at one of `opaque_paths` is not searched: it is one value."""
    for path, value in parsed_document.leaves(opaque_paths):
        line = parsed_document.lines.get(path)
        yield OptionEntry(path, value, ValueOrigin(f"{document.name}:{line}" if line else document.name))


def parse_json(document: InputDocument) -> dict[str, Any]:
    """Parse a file that holds one JSON object. Raise InvalidInput for any other content."""
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
    """Return the object in a JSON file, or an empty dict for any other file. Importers call this to recognise their files."""
    if document.is_folder or not document.text.lstrip().startswith("{"):
        return {}
    try:
        return parse_json(document)
    except InvalidInput:
        return {}


@functools.lru_cache(maxsize=16)
def peek_mapping(document: InputDocument) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file. If the syntax of the file is invalid, return the keys that a simple scan of its lines finds.

    Importers call this function to recognise their files. It reports no mistakes.
    """
    if document.is_folder or document.path.suffix.lower() in (".env", ".toml"):
        return {}
    try:
        return dict(parse_document(document).value)
    except InvalidInput:
        return _guess_keys(document.text)


def _guess_keys(text: str) -> dict[str, Any]:
    """Return the keys that a simple scan finds in a file that is not valid YAML.

    These keys are enough to select the importer. The importer then reports the syntax error.
    """
    guessed_mapping: dict[str, Any] = {}
    section: dict[str, Any] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if not colon or name.strip().startswith(("#", "-")) or not name.strip():
            continue
        if not name.startswith((" ", "\t")):
            section = {}
            guessed_mapping[name.strip()] = value.strip() or section
        else:
            section[name.strip()] = value.strip()
    return guessed_mapping
