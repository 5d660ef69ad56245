"""Finds every failure code in the source text of the operator, the trainer and the API package."""

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
    """Return all literal failure codes. For the codes that an expression computes when an error is created, also return (file name, expression).

    A literal code is an argument `code` of an error class or a function, the value of a dictionary's key "code", or the value of a variable `code`.
    """
    trees = {path: ast.parse(path.read_text("utf-8")) for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))}
    error_classes = _find_error_classes(trees.values())
    positions = _find_code_positions(trees.values()) | dict.fromkeys(error_classes, 0)
    codes: set[str] = set()
    computed_codes: set[tuple[str, str]] = set()
    for tree in trees.values():
        for value in _find_named_codes(tree):
            codes |= _find_literal_codes(value)
    for path, tree in trees.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func).rpartition(".")[2]
            for value in _find_code_arguments(call, positions.get(name)):
                codes |= _find_literal_codes(value)
                if name in error_classes and not _find_literal_codes(value):
                    computed_codes.add((path.name, ast.unparse(value)))
    return codes, computed_codes


def _find_named_codes(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the values that the source assigns to dictionary keys "code" and to variables `code`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (value for key, value in zip(node.keys, node.values, strict=True) if isinstance(key, ast.Constant) and key.value == "code")
        elif isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "code" for target in node.targets):
            yield node.value


def _find_error_classes(trees: Iterable[ast.Module]) -> set[str]:
    """Return the names of `FineTuneError` and of all its subclasses."""
    class_nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    class_names = {"FineTuneError"}
    while True:
        derived_names = {node.name for node in class_nodes if any(ast.unparse(base).rpartition(".")[2] in class_names for base in node.bases)}
        if derived_names <= class_names:
            return class_names
        class_names |= derived_names


def _find_code_positions(trees: Iterable[ast.Module]) -> dict[str, int]:
    """Return the position of the parameter `code` among the parameters of each class or function that has it, by the name of the class or function."""
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


def _find_code_arguments(call: ast.Call, position: int | None) -> list[ast.expr]:
    keyword_values = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
    if position is None or position >= len(call.args):
        return keyword_values
    return [*keyword_values, call.args[position]]


def _find_literal_codes(value: ast.expr) -> set[str]:
    """Return the codes in an expression that is a string or chooses between strings (`a if x else b`, `a or b`)."""
    choices = [value.body, value.orelse] if isinstance(value, ast.IfExp) else value.values if isinstance(value, ast.BoolOp) else [value]
    texts = [choice.value for choice in choices if isinstance(choice, ast.Constant) and isinstance(choice.value, str)]
    return {text for text in texts if CODE_PATTERN.fullmatch(text)}
