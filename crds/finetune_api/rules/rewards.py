"""Names and types of the parameters of GRPO's built-in rewards. In the spec, all parameter values are strings."""

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
"""Maps each built-in reward to its parameters. A parameter has a type or a tuple of allowed values."""
REQUIRED_PARAMETERS = {BuiltinReward.REGEX: "pattern", BuiltinReward.JSON_SCHEMA: "schema"}


def invalid_parameters(path: str, builtin: BuiltinReward, given: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield (path, message, hint) for each invalid parameter of a built-in reward."""
    known = REWARD_PARAMETERS[builtin]
    unknown = sorted(set(given) - set(known))
    if unknown:
        yield path, f"{builtin} has no parameter {', '.join(unknown)}", f"{builtin} has the parameters {', '.join(sorted(known))}"
    required = REQUIRED_PARAMETERS.get(builtin)
    if required is not None and required not in given:
        yield f"{path}.{required}", f"missing, but {builtin} needs this parameter", f"write `parameters: {{{required}: ...}}`"
    if builtin is BuiltinReward.LENGTH and not {"minimum", "maximum"} & set(given):
        yield path, "both minimum and maximum are missing", "write minimum, maximum or both"
    for name, text in given.items():
        hint = _hint_for_invalid_value(known[name], text) if name in known else None
        if hint is not None:
            yield f"{path}.{name}", f"{text[:200]!r} is not a valid value", hint


def _hint_for_invalid_value(kind: tuple[str, ...] | str, text: str) -> str | None:
    """Return a hint for an invalid parameter value `text`. Return None for a valid value."""
    if isinstance(kind, tuple):
        return None if text in kind else f"write one of {', '.join(kind)}"
    try:
        match kind:
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
        return "write a number" if kind == "number" else "write JSON"
    return None
