"""Turns a regular expression for module names, as PEFT accepts it, into a list of names, as a FineTuneJob needs it."""

from __future__ import annotations

import re
from typing import Any

MAX_NAMES = 256
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
"""Some tools wrap modules to recompute their activations, which adds this text to the names of the modules.

The importer removes this text from the names, because the trainer of a FineTuneJob wraps no modules.
"""
PLAIN_NAME_PATTERN = re.compile(r"^[\w.-]+$")


class UnsupportedPattern(Exception):
    """The regular expression cannot be turned into a short list of names. The message says why."""


def expand_pattern(pattern: str) -> list[str]:
    """Return the endings of all module names that a regular expression matches, such as `mlp.up_proj`. If `pattern` is a plain name, return this name.

    In a FineTuneJob, a name in the list selects all modules whose names end with this name. Therefore, the start of the expression up to its last
    repetition, such as `model.layers.[0-9]+`, is ignored.

    Raise UnsupportedPattern if the expression matches no short list of names.
    """
    if PLAIN_NAME_PATTERN.match(pattern):
        return [pattern]
    try:
        parsed_regex = re._parser.parse(pattern)  # type: ignore[attr-defined]
    except re.error as error:
        raise UnsupportedPattern(f"it is not a regular expression: {error}") from None
    names = [name.removeprefix(".") for name in _expand_regex(parsed_regex)]
    names = list(dict.fromkeys(name.replace(CHECKPOINT_WRAPPER, "") for name in names))
    if not all(re.match(r"^\w[\w.-]*$", name) for name in names):
        raise UnsupportedPattern("its end is not a list of names")
    return names


def _expand_regex(parsed_regex: Any) -> list[str]:
    """Return all texts that a parsed regular expression matches. Ignore every repetition such as `x+`, and everything before it."""
    texts = [""]
    for operator, operand in parsed_regex:
        operator_name = str(operator)
        if operator_name == "LITERAL":
            endings = [chr(operand)]
        elif operator_name == "ANY":
            endings = ["."]
        elif operator_name == "SUBPATTERN":
            endings = _expand_regex(operand[-1])
        elif operator_name == "BRANCH":
            endings = [text for branch in operand[1] for text in _expand_regex(branch)]
        elif operator_name == "AT":
            continue
        elif operator_name in ("MAX_REPEAT", "MIN_REPEAT") and operand[0] == 0 and operand[1] == 1:
            endings = ["", *_expand_regex(operand[2])]
        elif operator_name in ("MAX_REPEAT", "MIN_REPEAT"):
            texts = [""]
            continue
        elif operator_name == "IN" and all(str(item_operator) == "LITERAL" for item_operator, _ in operand):
            endings = [chr(character_code) for _, character_code in operand]
        else:
            raise UnsupportedPattern(f"it contains {operator_name.lower()}")
        texts = [text + end for text in texts for end in endings]
        if len(texts) > MAX_NAMES:
            raise UnsupportedPattern(f"it matches more than {MAX_NAMES} names")
    return texts
