"""Turns a regular expression for module names, as in PEFT, into the list of names that a FineTuneJob has."""

from __future__ import annotations

import re
from typing import Any

MAX_NAMES = 256
WRAPPER_OF_CHECKPOINTING = "_checkpoint_wrapped_module."
"""Part of module names in some tools, which the modules of this trainer do not have."""
PLAIN_NAME = re.compile(r"^[\w.-]+$")


class UnsupportedPattern(Exception):
    """The regular expression cannot be written as a list of names."""


def names_of_pattern(pattern: str) -> list[str]:
    """Return the ends of all module names that a regular expression matches, such as `mlp.up_proj`. A plain name is returned unchanged.

    A name in the list matches all modules whose names end with it. Therefore, the pattern is only read after its last repeated part, such as
    `model.layers.[0-9]+.`.

    Raises UnsupportedPattern.
    """
    if PLAIN_NAME.match(pattern):
        return [pattern]
    try:
        tree = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except re.error as error:
        raise UnsupportedPattern(f"it is not a regular expression: {error}") from None
    names = [name.removeprefix(".") for name in _expand(tree)]
    names = list(dict.fromkeys(name.replace(WRAPPER_OF_CHECKPOINTING, "") for name in names))
    if not all(re.match(r"^\w[\w.-]*$", name) for name in names):
        raise UnsupportedPattern("its end is not a list of names")
    return names


def _expand(tree: Any) -> list[str]:
    """Return all texts that the nodes of a parsed expression match. A part that is repeated without limit removes all text before it."""
    texts = [""]
    for operator, argument in tree:
        name = str(operator)
        if name == "LITERAL":
            ends = [chr(argument)]
        elif name == "ANY":
            ends = ["."]
        elif name == "SUBPATTERN":
            ends = _expand(argument[-1])
        elif name == "BRANCH":
            ends = [text for branch in argument[1] for text in _expand(branch)]
        elif name == "AT":
            continue
        elif name in ("MAX_REPEAT", "MIN_REPEAT") and argument[0] == 0 and argument[1] == 1:
            ends = ["", *_expand(argument[2])]
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            texts = [""]
            continue
        elif name == "IN" and all(str(kind) == "LITERAL" for kind, _ in argument):
            ends = [chr(code) for _, code in argument]
        else:
            raise UnsupportedPattern(f"it contains {name.lower()}")
        texts = [text + end for text in texts for end in ends]
        if len(texts) > MAX_NAMES:
            raise UnsupportedPattern(f"it matches more than {MAX_NAMES} names")
    return texts
