"""YAML with line numbers, read as the other tools' own readers do (YAML 1.1), duplicates refused.

`2e-4` becomes a number although YAML 1.1 wants a dot, since every tool means one; `1_000` is one by the grammar; an unquoted
`no` is false, which the converters of words take for the word again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.importers.material import Document, Entry, Mistake, Origin, Refused

MAX_NODES = 20_000
"""More than any configuration has: aliases of aliases make a few lines grow without end."""
SCALARS = frozenset({"null", "bool", "int", "float", "str", "timestamp", "value"})


@dataclass(frozen=True)
class Problem:
    """What is wrong with the YAML itself: line, path, what, and what to do."""

    line: int
    path: str
    message: str
    hint: str = ""


@dataclass
class Tree:
    """One document: its value, the line of every path in it, and what is wrong with it."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    line: int = 1

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


class NotYaml(Exception):
    """A text that is not YAML, or that nobody should try to read. `line` is 0 if it is not known."""

    def __init__(self, message: str, line: int = 0):
        super().__init__(message)
        self.line = line


def trees(text: str) -> list[Tree]:
    """Every document of a text that holds anything. Raises NotYaml."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    try:
        return [_tree(node) for node in yaml.compose_all(text) if node is not None]
    except MarkedYAMLError as error:
        mark = error.problem_mark
        raise NotYaml(f"it is not YAML: {error.problem or error.context}", mark.line + 1 if mark else 0) from None
    except YAMLError as error:
        raise NotYaml(f"it is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise NotYaml("it is nested too deeply to be a configuration") from None


def _tree(node: Any) -> Tree:
    tree = Tree(None, line=node.start_mark.line + 1)
    tree.value = _Reader(tree).value(node, "")
    return tree


def parse(document: Document) -> Tree:
    """Parse one YAML (or JSON) document that is a mapping. Raises Refused."""
    try:
        found = trees(document.text)
    except NotYaml as error:
        raise Refused([Mistake(_line(document, error.line), "", str(error))]) from None
    if not found:
        raise Refused([Mistake(document.name, "", "it is empty")])
    tree = found[0]
    if len(found) > 1:
        place = _line(document, found[1].line)
        raise Refused([Mistake(place, "", "a second document begins here", "give one configuration a file")])
    if not isinstance(tree.value, dict):
        raise Refused([Mistake(document.name, "", "it is not a mapping of names and values")])
    if tree.problems:
        raise Refused([Mistake(_line(document, one.line), one.path, one.message, one.hint) for one in tree.problems])
    return tree


def _line(document: Document, line: int) -> str:
    return f"{document.name}:{line}" if line else document.name


def parse_value(text: str) -> Any:
    """One value as YAML, for overrides on a command line; a text that is not YAML is itself."""
    try:
        found = trees(text)
    except NotYaml:
        return text
    return found[0].value if len(found) == 1 and not found[0].problems else text if found else ""


class _Reader:
    """From nodes to values, with lines; what cannot be read is a problem of the tree."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self.count = 0
        self.open: set[int] = set()
        """Nodes that are being read: an alias to one of them would never end."""

    def value(self, node: Any, path: str) -> Any:
        line = node.start_mark.line + 1
        self.count += 1
        if self.count > MAX_NODES:
            raise NotYaml(f"it holds more than {MAX_NODES} values, its aliases counted", line)
        self.tree.lines.setdefault(path, line)
        kind = str(node.tag).rpartition(":")[2]
        if node.id == "scalar":
            return (
                scalar(node) if kind in SCALARS else self._problem(line, path, f"the tag {node.tag} is not read here")
            )
        if id(node) in self.open:
            return self._problem(line, path, "an alias stands inside its own anchor")
        if kind not in ("map", "seq"):
            return self._problem(line, path, f"the tag {node.tag} is not read here")
        self.open.add(id(node))
        found = self._mapping(node, path) if node.id == "mapping" else self._sequence(node, path)
        self.open.discard(id(node))
        return found

    def _problem(self, line: int, path: str, message: str, hint: str = "write the value itself") -> None:
        self.tree.problems.append(Problem(line, path, message, hint))

    def _sequence(self, node: Any, path: str) -> list[Any]:
        return [self.value(one, f"{path}[{i}]") for i, one in enumerate(node.value)]

    def _mapping(self, node: Any, prefix: str) -> dict[str, Any]:
        """Merged mappings first, the nearest last: what stands in the mapping itself wins."""
        result: dict[str, Any] = {}
        for one in reversed(list(self._merged(node))):
            result |= self.value(one, prefix) or {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar":
                self._problem(line, prefix, "a name must be a text", "write name: value")
                continue
            key = str(key_node.value)
            path = f"{prefix}.{key}" if prefix else key
            if _is_merge(key_node):
                continue
            if key in first:
                self._problem(line, path, f"it stands twice: lines {first[key]} and {line}", "keep one")
                continue
            self.tree.lines[path] = first[key] = line
            result[key] = self.value(value_node, path)
        return result

    def _merged(self, node: Any) -> Iterator[Any]:
        """The mappings that `<<` names."""
        for key_node, value_node in node.value:
            if not _is_merge(key_node):
                continue
            for one in value_node.value if value_node.id == "sequence" else [value_node]:
                if one.id == "mapping":
                    yield one
                else:
                    self._problem(key_node.start_mark.line + 1, "<<", "it does not name a mapping")


def _is_merge(node: Any) -> bool:
    return bool(node.id == "scalar" and node.value == "<<" and not node.style)


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
    except (ValueError, RecursionError):
        raise Refused([Mistake(document.name, "", "a number is too long, or it is nested too deeply")]) from None
    if not isinstance(value, dict):
        raise Refused([Mistake(document.name, "", "it is not a JSON object")])
    return value


@functools.lru_cache(maxsize=16)
def sniff_json(document: Document) -> dict[str, Any]:
    """The document as an object if it is JSON, else an empty one: for recognising a source, never for errors."""
    if document.folder or not document.text.lstrip().startswith("{"):
        return {}
    try:
        return parse_json(document)
    except Refused:
        return {}


@functools.lru_cache(maxsize=16)
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
