"""Suggestions for misspelled names and for names that other tools use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from finetune_api.aliases import find_field_for_alias, normalise

COMMON_NAMES = ("name", "key", "type", "value", "values", "source", "format", "columns", "weight", "operator")
"""Field names that several unrelated groups have in common. The name alone does not show which of these fields the user means."""


def suggest_field(path: str, known_paths: Iterable[str]) -> str:
    """Return the field that an unknown path probably means, or an empty string if no field is similar.

    `path` and `known_paths` may begin with `spec.`. Precedence: a field of the same group in another spelling (`batch_size`), the field for a
    name from other tools (`lr`), a field with the same name in another group, a field with a similar name.
    """
    candidates = list(known_paths)
    group, _, name = path.rpartition(".")
    fields_of_group = (field for field in candidates if field.rpartition(".")[0] == group)
    differently_spelled_field = next((field for field in fields_of_group if normalise(field.rpartition(".")[2]) == normalise(name)), "")
    prefix = "spec." if path.startswith("spec.") else ""
    alias = find_field_for_alias(path.removeprefix("spec."))
    known_alias = prefix + alias if prefix + alias in candidates else ""
    return differently_spelled_field or known_alias or _find_field_elsewhere(path, candidates) or find_closest_name(path, candidates)


def _find_field_elsewhere(path: str, candidates: list[str]) -> str:
    """Return the least nested field with the same name in another group, or an empty string if several fields are equally nested.

    Fields below the group of `path` have precedence. If the name is in COMMON_NAMES, no other fields are considered.
    """
    group, _, name = path.rpartition(".")
    same_name_fields = [field for field in candidates if normalise(field.rpartition(".")[2]) == normalise(name)]
    fields_below_group = [field for field in same_name_fields if group and field.startswith(f"{group}.")]
    suitable_fields = fields_below_group or (same_name_fields if name not in COMMON_NAMES else [])
    smallest_depth = min((field.count(".") for field in suitable_fields), default=0)
    least_nested_fields = [field for field in suitable_fields if field.count(".") == smallest_depth]
    return least_nested_fields[0] if len(least_nested_fields) == 1 else ""


def find_closest_name(word: str, known_names: Iterable[str]) -> str:
    """Return the known name that is most similar to a word, or an empty string. For a dotted word, names of the same group have precedence."""
    candidates = list(dict.fromkeys(known_names))
    group, dot, last_part = word.rpartition(".")
    sibling_by_last_part = {
        candidate.rpartition(".")[2]: candidate for candidate in candidates if candidate.rpartition(".")[0] == group
    }
    sibling_by_initials = {_get_initials(name): candidate for name, candidate in reversed(sibling_by_last_part.items())}
    if len(last_part.strip("-")) <= 3 and last_part.strip("-").lower() in sibling_by_initials:
        return sibling_by_initials[last_part.strip("-").lower()]
    similar_name = _find_most_similar(last_part, sibling_by_last_part, 0.55)
    if similar_name:
        return sibling_by_last_part[similar_name]
    same_prefix_name = next(
        (candidate for name, candidate in sibling_by_last_part.items() if last_part.startswith(name) or name.startswith(last_part)), ""
    )
    if not dot:
        return same_prefix_name if len(last_part) > 1 else ""
    names_in_other_groups = (candidate for candidate in candidates if candidate.rpartition(".")[2] == last_part and last_part not in COMMON_NAMES)
    name_in_other_group = next(names_in_other_groups, "")
    return same_prefix_name or name_in_other_group or ("" if sibling_by_last_part else _find_most_similar(word, candidates, 0.8))


def _find_most_similar(word: str, known_names: Iterable[str], cutoff: float) -> str:
    name_by_lower_case = {name.lower(): name for name in known_names}
    matches = difflib.get_close_matches(word.lower(), name_by_lower_case, 1, cutoff)
    return name_by_lower_case[matches[0]] if matches else ""


def _get_initials(name: str) -> str:
    """Return the initials of the words of a name: `lr` for `learning_rate`."""
    return "".join(part[:1] for part in re.split("[-_]", name.strip("-").lower()))
