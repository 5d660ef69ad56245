"""Checks the parameters of the built-in rewards for GRPO. In the spec, all parameter values are strings."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

from finetune_api.spec.enums import BuiltinReward

REWARD_PARAMETERS: dict[BuiltinReward, dict[str, tuple[str, ...] | str]] = {
    BuiltinReward.CITATION_FORMAT: {"multiline": "flag"},
    BuiltinReward.THINK_FORMAT: {"emptyAnswer": "flag"},
    BuiltinReward.REGEX: {
        "pattern": "pattern", "match": ("search", "full"), "ignoreCase": "flag", "dotAll": "flag", "multiline": "flag",
    },
    BuiltinReward.EXACT_MATCH: {"column": "text", "ignoreCase": "flag", "strip": "flag", "extract": "pattern"},
    BuiltinReward.LENGTH: {"unit": ("tokens", "words", "characters"), "minimum": "number", "maximum": "number"},
    BuiltinReward.JSON_SCHEMA: {"schema": "json", "parsed": "number"},
}  # fmt: skip
"""The parameters of each built-in reward by name. The value is the type of the parameter, or the tuple of its allowed values."""
REQUIRED_PARAMETERS = {BuiltinReward.REGEX: "pattern", BuiltinReward.JSON_SCHEMA: "schema"}
"""For each built-in reward with a required parameter: the name of this parameter."""


def find_invalid_parameters(path: str, builtin_reward: BuiltinReward, given_parameters: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (path, message, hint) for each missing, unknown or invalid parameter of a built-in reward."""
    known_names = REWARD_PARAMETERS[builtin_reward]
    unknown_names = sorted(set(given_parameters) - set(known_names))
    if unknown_names:
        yield path, f"{builtin_reward} has no parameter {', '.join(unknown_names)}", f"{builtin_reward} has the parameters {', '.join(sorted(known_names))}"
    required_name = REQUIRED_PARAMETERS.get(builtin_reward)
    if required_name is not None and required_name not in given_parameters:
        yield f"{path}.{required_name}", f"missing, but {builtin_reward} needs this parameter", f"write `parameters: {{{required_name}: ...}}`"
    if builtin_reward is BuiltinReward.LENGTH and not {"minimum", "maximum"} & set(given_parameters):
        yield path, "both minimum and maximum are missing", "write minimum, maximum or both"
    for name, text in given_parameters.items():
        hint = _hint_for_invalid_value(known_names[name], text) if name in known_names else None
        if hint is not None:
            yield f"{path}.{name}", f"{text[:200]!r} is not a valid value", hint


def _hint_for_invalid_value(parameter_type: tuple[str, ...] | str, text: str) -> str | None:
    """Return a hint if `text` is not a valid value of a parameter of this type. Return None for a valid value."""
    if isinstance(parameter_type, tuple):
        return None if text in parameter_type else f"write one of {', '.join(parameter_type)}"
    try:
        match parameter_type:
            case "flag" if text not in ("true", "false"):
                return "write true or false"
            case "number" if not math.isfinite(float(text)):
                return "write a finite number"
            case "pattern":
                re.compile(text)
            case "json":
                json.loads(text)
    except re.error as error:
        return f"write a valid regular expression ({error})"
    except ValueError:
        return "write a number" if parameter_type == "number" else "write JSON"
    return None
