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


def find_invalid_parameters(path: str, builtin_reward: BuiltinReward, parameters: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (path, message, hint) for each missing, unknown or invalid parameter of a built-in reward."""
    known_names = REWARD_PARAMETERS[builtin_reward]
    unknown_names = sorted(set(parameters) - set(known_names))
    if unknown_names:
        yield path, f"{builtin_reward} has no parameter {', '.join(unknown_names)}", f"{builtin_reward} has the parameters {', '.join(sorted(known_names))}"
    required_name = REQUIRED_PARAMETERS.get(builtin_reward)
    if required_name is not None and required_name not in parameters:
        yield f"{path}.{required_name}", f"missing, but {builtin_reward} needs this parameter", f"write `parameters: {{{required_name}: ...}}`"
    if builtin_reward is BuiltinReward.LENGTH and not {"minimum", "maximum"} & set(parameters):
        yield path, "both minimum and maximum are missing", "write minimum, maximum or both"
    for name, value_text in parameters.items():
        hint = _make_hint_for_invalid_value(known_names[name], value_text) if name in known_names else None
        if hint is not None:
            yield f"{path}.{name}", f"{value_text[:200]!r} is not a valid value", hint


def _make_hint_for_invalid_value(parameter_type: tuple[str, ...] | str, value_text: str) -> str | None:
    """Return a hint if `value_text` is not a valid value of a parameter of this type. Return None for a valid value."""
    if isinstance(parameter_type, tuple):
        return None if value_text in parameter_type else f"write one of {', '.join(parameter_type)}"
    try:
        match parameter_type:
            case "flag" if value_text not in ("true", "false"):
                return "write true or false"
            case "number" if not math.isfinite(float(value_text)):
                return "write a finite number"
            case "pattern":
                re.compile(value_text)
            case "json":
                json.loads(value_text)
    except re.error as error:
        return f"write a valid regular expression ({error})"
    except ValueError:
        return "write a number" if parameter_type == "number" else "write JSON"
    return None
