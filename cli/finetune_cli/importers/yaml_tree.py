"""YAML with line numbers, read as the other tools' own readers do (YAML 1.1), duplicates refused.

`2e-4` becomes a number although YAML 1.1 wants a dot, since every tool means one; `1_000` is one by the grammar; an unquoted
`no` is false, which the converters of words take for the word again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.importers.material import Document, Entry, Mistake, Origin, Refused


@dataclass
class Tree:
    """Values by dotted path, and the line of each."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    duplicates: list[tuple[str, int, int]] = field(default_factory=list)
    """(path, first line, second line)."""

    def leaves(self, opaque: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
        """(dotted path, value) of everything that is not a mapping; mappings named in `opaque` count as values."""
        yield from _leaves(self.value, "", opaque)


def _leaves(value: Any, prefix: str, opaque: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, dict) and path not in opaque:
            yield from _leaves(inner, path, opaque)
        else:
            yield path, inner


def parse(document: Document) -> Tree:
    """Parse one YAML (or JSON) document that is a mapping. Raises Refused."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    try:
        node = yaml.compose(io.StringIO(document.text))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{document.name}:{mark.line + 1}" if mark else document.name
        raise Refused([Mistake(place, "", f"it is not YAML: {error.problem or error.context}")]) from None
    except YAMLError as error:
        raise Refused([Mistake(document.name, "", f"it is not YAML: {str(error).splitlines()[0]}")]) from None
    if node is None:
        raise Refused([Mistake(document.name, "", "it is empty")])
    if node.id != "mapping":
        raise Refused([Mistake(document.name, "", "it is not a mapping of names and values")])
    tree = Tree({})
    tree.value = _mapping(node, "", tree)
    if tree.duplicates:
        raise Refused([
            Mistake(f"{document.name}:{second}", path, f"it stands twice: lines {first} and {second}", "keep one")
            for path, first, second in tree.duplicates
        ])  # fmt: skip
    return tree


def parse_value(text: str) -> Any:
    """One value as YAML, for overrides on a command line; a text that is not YAML is itself."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    try:
        node = yaml.compose(io.StringIO(text))
    except YAMLError:
        return text
    return "" if node is None else _value(node, "", Tree({}))


def _mapping(node: Any, prefix: str, tree: Tree) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key == "<<":
            for one in value_node.value if value_node.id == "sequence" else [value_node]:
                for name, inherited in _mapping(one, prefix, Tree({})).items():
                    result.setdefault(name, inherited)
            continue
        path = f"{prefix}.{key}" if prefix else key
        line = key_node.start_mark.line + 1
        if path in tree.lines:
            tree.duplicates.append((path, tree.lines[path], line))
            continue
        tree.lines[path] = line
        result[key] = _value(value_node, path, tree)
    return result


def _value(node: Any, path: str, tree: Tree) -> Any:
    if node.id == "mapping":
        return _mapping(node, path, tree)
    if node.id == "sequence":
        return [_value(one, f"{path}[{i}]", tree) for i, one in enumerate(node.value)]
    return scalar(node)


def scalar(node: Any) -> Any:
    """A scalar node as YAML 1.1 means it, with numbers as everybody means them."""
    kind = str(node.tag).rpartition(":")[2]
    raw = str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return raw.lower() in ("true", "yes", "on", "y")
    if kind in ("int", "float") and not node.style:
        return _plain_number(raw)
    return raw


def _plain_number(raw: str) -> Any:
    """A number of YAML 1.1: underscores, 0x, 0b and a leading 0 for octal; base 60 stays a text."""
    digits = raw.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    plain = digits.lstrip("+-")
    try:
        if plain.lower().startswith("0x"):
            return sign * int(plain[2:], 16)
        if plain.lower().startswith("0b"):
            return sign * int(plain[2:], 2)
        if plain.isdigit():
            return sign * int(plain, 8 if len(plain) > 1 and plain.startswith("0") else 10)
        return float(digits)
    except ValueError:
        return raw


def entries(document: Document, tree: Tree, opaque: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """Every leaf of a tree as an entry with file and line."""
    for path, value in tree.leaves(opaque):
        line = tree.lines.get(path)
        yield Entry(path, value, Origin(f"{document.name}:{line}" if line else document.name))


def parse_json(document: Document) -> dict[str, Any]:
    """Parse a JSON object. Raises Refused."""
    try:
        value = json.loads(document.text)
    except json.JSONDecodeError as error:
        raise Refused([Mistake(f"{document.name}:{error.lineno}", "", f"it is not JSON: {error.msg}")]) from None
    if not isinstance(value, dict):
        raise Refused([Mistake(document.name, "", "it is not a JSON object")])
    return value


def sniff(document: Document) -> dict[str, Any]:
    """The document as a mapping if it is YAML or JSON, else an empty one: for recognising a source, never for errors."""
    if document.folder or document.path.suffix.lower() in (".env", ".toml"):
        return {}
    try:
        return dict(parse(document).value)
    except Refused:
        return _keys_by_eye(document.text)


def _keys_by_eye(text: str) -> dict[str, Any]:
    """Top-level keys of a text that is not valid YAML, so that its error can be told by the right importer."""
    result: dict[str, Any] = {}
    section: dict[str, Any] = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        if not colon or name.strip().startswith(("#", "-")) or not name.strip():
            continue
        if not name.startswith((" ", "\t")):
            section = {}
            result[name.strip()] = rest.strip() or section
        else:
            section[name.strip()] = rest.strip()
    return result
