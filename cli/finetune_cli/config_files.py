"""Reads YAML files that hold one mapping: the chart's values file and the OpenAI server's configuration.

Each reported mistake names the file and the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_cli.field_errors import to_dotted_path
from finetune_cli.files import UnreadableFile, display_name, read_text
from finetune_cli.mistakes import Mistake
from finetune_cli.yaml_reader import InvalidYaml, read_trees


def read_mapping(path: Path, expected_content: str, hint: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the mapping in a YAML file, and the line number of each path. Raises UnreadableFile.

    The error message says what the file should be (`expected_content`, such as `a values file of the chart`) and what to write (`hint`).
    """
    file_name = display_name(path)
    try:
        trees = list(read_trees(read_text(path)))
    except InvalidYaml as error:
        raise UnreadableFile(Mistake(f"{file_name}:{error.line}" if error.line else file_name, "", f"this is not YAML: {error}")) from error
    if len(trees) > 1 or (trees and not isinstance(trees[0].value, dict | None)):
        raise UnreadableFile(Mistake(file_name, "", f"this is not {expected_content}", hint))
    if trees and trees[0].problems:
        problem = trees[0].problems[0]
        raise UnreadableFile(Mistake(f"{file_name}:{problem.line}", problem.path, problem.message, problem.hint))
    return (trees[0].value or {}, trees[0].lines) if trees else ({}, {})


def list_mistakes(error: ValidationError, file_name: str, lines: dict[str, int], unknown_key_message: str) -> Iterator[Mistake]:
    """Yield a mistake for each error that pydantic found in the file. `unknown_key_message`: the message for a key that the model does not have."""
    for details in error.errors():
        key = to_dotted_path(details["loc"])
        line = lines.get(key)
        messages = {"extra_forbidden": unknown_key_message, "missing": "this required field is missing"}
        message = messages.get(details["type"], details["msg"].removeprefix("Value error, "))
        yield Mistake(f"{file_name}:{line}" if line else file_name, key, message)
