"""Small data sets for objectives that compare, judge or reward answers."""

from __future__ import annotations

from typing import Any


def user(text: str) -> dict[str, str]:
    """A prompt of one user message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """What the model says."""
    return {"role": "assistant", "content": text}


_ASKED = [
    ("one", "red", "no no"), ("two", "green", "yes"), ("three", "blue", "four five"), ("four", "yes", "red"), ("five", "no", "green blue"),
    ("question", "Paris", "Berlin"), ("answer", "Berlin", "Paris yes"), ("input", "nine", "three"), ("output", "three", "nine"), ("true", "false", "true"),
]  # fmt: skip
PAIRS: list[dict[str, Any]] = [
    {"prompt": [user(asked)], "chosen": [assistant(good)], "rejected": [assistant(bad)]} for asked, good, bad in _ASKED
]
"""Ten questions with a better and a worse answer."""
JUDGED: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
"""The same answers one by one, judged."""
PROMPTS: list[dict[str, Any]] = [{"prompt": [user(asked)], "answer": good} for asked, good, _ in _ASKED]
"""The questions alone, with the right answer as a column."""
