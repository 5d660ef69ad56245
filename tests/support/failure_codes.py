"""Finds every failure code that the source text of operator, trainer and API models contains."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("crds/finetune_api", "operator/finetune_operator", "trainer-image/finetune_trainer")
CODE_PATTERN = re.compile(r"[A-Z][A-Za-z0-9]+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def find_failure_codes() -> tuple[set[str], set[tuple[str, str]]]:
    """Return all literal failure codes, and (file name, expression) of each call of an error class whose code is computed.

    A code is the argument `code` of an error class or of a function with a parameter of this name, the value of the key "code" of a dictionary, or
    the value of a variable `code`.
    """
    trees = {path: ast.parse(path.read_text("utf-8")) for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))}
    error_classes = _error_classes(trees.values())
    positions = _positions_of_code(trees.values()) | dict.fromkeys(error_classes, 0)
    codes: set[str] = set()
    computed: set[tuple[str, str]] = set()
    for tree in trees.values():
        for value in _named_code(tree):
            codes |= _literal_codes(value)
    for path, tree in trees.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).rpartition(".")[2]
            for value in _code_arguments(call, positions.get(name)):
                codes |= _literal_codes(value)
                if name in error_classes and not _literal_codes(value):
                    computed.add((path.name, ast.unparse(value)))
    return codes, computed


def _named_code(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the values of keys "code" of dictionaries and of variables `code`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (value for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant) and key.value == "code")
        elif isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "code" for target in node.targets):
            yield node.value


def _error_classes(trees: Iterable[ast.Module]) -> set[str]:
    """Return the names of `FineTuneError` and all classes that derive from it."""
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {"FineTuneError"}
    while True:
        derived = {node.name for node in classes if any(ast.unparse(base).rpartition(".")[2] in names for base in node.bases)}
        if derived <= names:
            return names
        names |= derived


def _positions_of_code(trees: Iterable[ast.Module]) -> dict[str, int]:
    """Map the name of each class or function with a parameter `code` to the position of this parameter in a call."""
    positions: dict[str, int] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            functions = [(node.name if item.name == "__init__" else item.name, item) for item in node.body if isinstance(item, Function)]
        else:
            functions = [(node.name, node)] if isinstance(node, Function) else []
        for name, function in functions:
            parameters = [argument.arg for argument in function.args.args if argument.arg not in ("self", "cls")]
            if "code" in parameters:
                positions[name] = parameters.index("code")
    return positions


def _code_arguments(call: ast.Call, position: int | None) -> list[ast.expr]:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    if position is None or position >= len(call.args):
        return named
    return [*named, call.args[position]]


def _literal_codes(value: ast.expr) -> set[str]:
    """Return the codes in an expression that is a literal or chooses between literals."""
    parts = [value.body, value.orelse] if isinstance(value, ast.IfExp) else value.values if isinstance(value, ast.BoolOp) else [value]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return {text for text in texts if CODE_PATTERN.fullmatch(text)}
