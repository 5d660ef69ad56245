"""Reads YAML files with one mapping: values of the chart, and the configuration of the OpenAI server. Mistakes name file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_cli.field_errors import path_of
from finetune_cli.files import UnreadableFile, display_name, read_text
from finetune_cli.mistakes import Mistake
from finetune_cli.yaml_reader import InvalidYaml, read_trees


def read_mapping(path: Path, kind: str, hint: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the mapping in a YAML file, and the line of each path. Errors: UnreadableFile.

    `kind` and `hint` are for messages: what the file should be (`a values file of the chart`), and what to write.
    """
    name = display_name(path)
    try:
        trees = list(read_trees(read_text(path)))
    except InvalidYaml as error:
        raise UnreadableFile(Mistake(f"{name}:{error.line}" if error.line else name, "", f"this is not YAML: {error}")) from error
    if len(trees) > 1 or (trees and not isinstance(trees[0].value, dict | None)):
        raise UnreadableFile(Mistake(name, "", f"this is not {kind}", hint))
    if trees and trees[0].problems:
        problem = trees[0].problems[0]
        raise UnreadableFile(Mistake(f"{name}:{problem.line}", problem.path, problem.message, problem.hint))
    return (trees[0].value or {}, trees[0].lines) if trees else ({}, {})


def mistakes_of(error: ValidationError, name: str, lines: dict[str, int], unknown_key: str) -> Iterator[Mistake]:
    """Yield the mistakes of a file's model. `unknown_key` is the message for a key that the model does not have."""
    for item in error.errors():
        key = path_of(item["loc"])
        line = lines.get(key)
        messages = {"extra_forbidden": unknown_key, "missing": "this required field is missing"}
        message = messages.get(item["type"], item["msg"].removeprefix("Value error, "))
        yield Mistake(f"{name}:{line}" if line else name, key, message)
