"""Suggestions for misspelled names and for names that other tools use."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from finetune_api.aliases import field_for_alias, normalise


def suggest_field(path: str, known: Iterable[str]) -> str:
    """Return the field that an unknown path probably means; an empty string if none is similar.

    Both may begin with `spec.`. A field of the same group with another spelling (`batch_size`) comes first, then usual names of
    other tools (`lr`), then similar names.
    """
    candidates = list(known)
    group, _, name = path.rpartition(".")
    same_group = (one for one in candidates if one.rpartition(".")[0] == group)
    found = next((one for one in same_group if normalise(one.rpartition(".")[2]) == normalise(name)), "")
    prefix = "spec." if path.startswith("spec.") else ""
    alias = field_for_alias(path.removeprefix("spec."))
    return found or (prefix + alias if prefix + alias in candidates else "") or closest_name(path, candidates)


def closest_name(word: str, known: Iterable[str]) -> str:
    """Return the known name most similar to a word, or an empty string. For a dotted name, names of the same group come first."""
    candidates = list(dict.fromkeys(known))
    head, dot, tail = word.rpartition(".")
    siblings = {one.rpartition(".")[2]: one for one in candidates if one.rpartition(".")[0] == head}
    initials = {_initials(name): one for name, one in reversed(siblings.items())}
    if len(tail.strip("-")) <= 3 and tail.strip("-").lower() in initials:
        return initials[tail.strip("-").lower()]
    found = _most_similar(tail, siblings, 0.55)
    if found:
        return siblings[found]
    start = next((one for name, one in siblings.items() if tail.startswith(name) or name.startswith(tail)), "")
    if not dot:
        return start if len(tail) > 1 else ""
    elsewhere = next((one for one in candidates if one.rpartition(".")[2] == tail), "")
    return start or elsewhere or ("" if siblings else _most_similar(word, candidates, 0.8))


def _most_similar(word: str, known: Iterable[str], cutoff: float) -> str:
    lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(word.lower(), lower, 1, cutoff)
    return lower[found[0]] if found else ""


def _initials(name: str) -> str:
    """Return the initials of the words of a name: `lr` for `learning_rate`."""
    return "".join(part[:1] for part in re.split("[-_]", name.strip("-").lower()))
