"""Reads YAML with line numbers by the rules of YAML 1.1, as kubectl and most other tools do. Duplicate keys are refused.

YAML 1.1 requires a dot in a number with an exponent. Nevertheless, `2e-4` is read as a number, because users who write `2e-4` mean a number. As in
YAML 1.1, `1_000` is a number, and an unquoted `no` is read as false. An importer that expects a word converts false back to `no`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.redaction import SECRET_NAME_PATTERN

MAX_NODES = 20_000
"""Maximum number of values after aliases are expanded. Real configurations have fewer. A few lines with nested aliases could expand to billions of values."""
MAX_QUOTED_CHARACTERS = 80
TEMPLATE_HINT = "a template must be rendered first, for example with `helm template`"
SCALAR_TAGS = frozenset({"null", "bool", "int", "float", "str", "timestamp", "value"})


@dataclass(frozen=True)
class Problem:
    """An error in the YAML itself."""

    line: int
    path: str
    message: str
    hint: str = ""


@dataclass
class Tree:
    """One YAML document: its value, the line number of each path, and its errors."""

    value: Any
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    line: int = 1

    def leaves(self, opaque_paths: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
        """Yield the dotted path of each value that is not a mapping, and the value. A mapping at one of `opaque_paths` is yielded as one value."""
        yield from _iterate_leaves(self.value, "", opaque_paths)


def _iterate_leaves(value: Any, prefix: str, opaque_paths: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(inner, dict) and path not in opaque_paths:
            yield from _iterate_leaves(inner, path, opaque_paths)
        else:
            yield path, inner


class InvalidYaml(Exception):
    """The text is invalid YAML, has too many values, or is nested too deeply. `line` is 0 if the line is unknown."""

    def __init__(self, message: str, line: int = 0):
        super().__init__(message)
        self.line = line


def read_trees(text: str) -> list[Tree]:
    """Read every non-empty document of a text. Raises InvalidYaml."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.version = (1, 1)
    try:
        return [_build_tree(node) for node in yaml.compose_all(text) if node is not None]
    except MarkedYAMLError as error:
        error_position = error.problem_mark or error.context_mark
        raise InvalidYaml(
            f"invalid YAML: {error.problem or error.context}{_quote_line(text, error_position)}{_make_yaml_hint(text, error_position)}",
            error_position.line + 1 if error_position else 0,
        ) from None
    except YAMLError as error:
        raise InvalidYaml(f"invalid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InvalidYaml("the YAML is nested too deeply for a configuration") from None


def _quote_line(text: str, error_position: Any) -> str:
    """Return a text that quotes the invalid line, for the end of an error message.

    The text is empty if the line is unknown or empty, or may hold a secret.
    """
    lines = text.splitlines()
    line = lines[error_position.line].strip() if error_position and error_position.line < len(lines) else ""
    if SECRET_NAME_PATTERN.search(line):
        return ""
    return f", in the line `{line[:MAX_QUOTED_CHARACTERS]}`" if line else ""


def _make_yaml_hint(text: str, error_position: Any) -> str:
    """Return a hint for the end of an error message, for two usual causes of invalid YAML: tabs and templates."""
    lines = text.splitlines()
    line = lines[error_position.line] if error_position and error_position.line < len(lines) else ""
    if re.match(r" *\t", line):
        return "; indent with spaces, because YAML allows no tabs there"
    return f"; {TEMPLATE_HINT}" if "{{" in line or "{%" in line else ""


def _build_tree(node: Any) -> Tree:
    tree = Tree(None, line=node.start_mark.line + 1)
    tree.value = _NodeReader(tree).read(node, "")
    return tree


def parse_value(text: str) -> Any:
    """Parse a value on the command line as YAML. A text that is not YAML is returned unchanged."""
    try:
        trees = read_trees(text)
    except InvalidYaml:
        return text
    return trees[0].value if len(trees) == 1 and not trees[0].problems else text if trees else ""


class _NodeReader:
    """Converts YAML nodes to values, and stores lines and errors in the tree."""

    def __init__(self, tree: Tree):
        self.tree = tree
        self.value_count = 0
        self.enclosing_node_ids: set[int] = set()
        """Python ids of the nodes that enclose the current node. An alias to an enclosing node would cause an endless recursion."""

    def read(self, node: Any, path: str) -> Any:
        line_number = node.start_mark.line + 1
        self.value_count += 1
        if self.value_count > MAX_NODES:
            raise InvalidYaml(f"the file holds more than {MAX_NODES} values after aliases are expanded", line_number)
        self.tree.lines.setdefault(path, line_number)
        tag_name = str(node.tag).rpartition(":")[2]
        if node.id == "scalar":
            return (
                read_scalar(node)
                if tag_name in SCALAR_TAGS
                else self._add_problem(line_number, path, f"the tag {node.tag} is not supported")
            )
        if id(node) in self.enclosing_node_ids:
            return self._add_problem(line_number, path, "the alias refers to a value that contains it")
        if tag_name not in ("map", "seq"):
            return self._add_problem(line_number, path, f"the tag {node.tag} is not supported")
        self.enclosing_node_ids.add(id(node))
        value = self._read_mapping(node, path) if node.id == "mapping" else self._read_sequence(node, path)
        self.enclosing_node_ids.discard(id(node))
        return value

    def _add_problem(self, line: int, path: str, message: str, hint: str = "write the value itself") -> None:
        self.tree.problems.append(Problem(line, path, message, hint))

    def _read_sequence(self, node: Any, path: str) -> list[Any]:
        return [self.read(item, f"{path}[{i}]") for i, item in enumerate(node.value)]

    def _read_mapping(self, node: Any, prefix: str) -> dict[str, Any]:
        """Read a mapping. The mapping's own keys override the keys of merged mappings (`<<`), and an earlier merged mapping overrides a later one."""
        value_by_key: dict[str, Any] = {}
        for merged_mapping in reversed(list(self._find_merged_mappings(node))):
            value_by_key |= self.read(merged_mapping, prefix) or {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.id != "scalar":
                is_template = key_node.id == "mapping" and key_node.flow_style
                self._add_problem(line, prefix, "a key must be plain text", TEMPLATE_HINT if is_template else "write key: value")
                continue
            key = str(key_node.value)
            path = f"{prefix}.{key}" if prefix else key
            if _is_merge(key_node):
                continue
            if key in first_lines:
                self._add_problem(line, path, f"the key occurs twice, in lines {first_lines[key]} and {line}", "keep one")
                continue
            self.tree.lines[path] = first_lines[key] = line
            value_by_key[key] = self.read(value_node, path)
        return value_by_key

    def _find_merged_mappings(self, node: Any) -> Iterator[Any]:
        """Yield the mappings that are merged with `<<`."""
        for key_node, value_node in node.value:
            if not _is_merge(key_node):
                continue
            for mapping in value_node.value if value_node.id == "sequence" else [value_node]:
                if mapping.id == "mapping":
                    yield mapping
                else:
                    self._add_problem(key_node.start_mark.line + 1, "<<", "the merge key does not refer to a mapping")


def _is_merge(node: Any) -> bool:
    return bool(node.id == "scalar" and node.value == "<<" and not node.style)


def read_scalar(node: Any) -> Any:
    """Return the value of a scalar node by the rules of YAML 1.1, with the exception for numbers in this module's docstring."""
    tag_name = str(node.tag).rpartition(":")[2]
    raw_text = str(node.value)
    if tag_name == "null":
        return None
    if tag_name == "bool":
        return raw_text.lower() in ("true", "yes", "on", "y")
    if tag_name in ("int", "float") and not node.style:
        return _parse_plain_number(raw_text)
    return raw_text


def _parse_plain_number(number_text: str) -> Any:
    """Parse a number of YAML 1.1: with underscores, 0x, 0b, or a leading 0 for octal. A number in base 60 stays text."""
    digits = number_text.replace("_", "")
    sign = -1 if digits.startswith("-") else 1
    unsigned_digits = digits.lstrip("+-")
    try:
        if unsigned_digits.lower().startswith("0x"):
            return sign * int(unsigned_digits[2:], 16)
        if unsigned_digits.lower().startswith("0b"):
            return sign * int(unsigned_digits[2:], 2)
        if unsigned_digits.isdigit():
            return sign * int(unsigned_digits, 8 if len(unsigned_digits) > 1 and unsigned_digits.startswith("0") else 10)
        return float(digits)
    except ValueError:
        return number_text
