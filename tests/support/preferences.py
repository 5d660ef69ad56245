"""Small datasets for the objectives that train on preferences, labels or rewards."""

from __future__ import annotations

from typing import Any


def user_message(text: str) -> dict[str, str]:
    """Return a user message."""
    return {"role": "user", "content": text}


def assistant_message(text: str) -> dict[str, str]:
    """Return an assistant message."""
    return {"role": "assistant", "content": text}


_QUESTIONS = [
    ("one", "red", "no no"), ("two", "green", "yes"), ("three", "blue", "four five"), ("four", "yes", "red"), ("five", "no", "green blue"),
    ("question", "Paris", "Berlin"), ("answer", "Berlin", "Paris yes"), ("input", "nine", "three"), ("output", "three", "nine"), ("true", "false", "true"),
]  # fmt: skip
PREFERENCE_PAIRS: list[dict[str, Any]] = [
    {"prompt": [user_message(question)], "chosen": [assistant_message(good)], "rejected": [assistant_message(bad)]} for question, good, bad in _QUESTIONS
]
"""Ten questions, each with a better and a worse answer."""
LABELLED_ANSWERS: list[dict[str, Any]] = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PREFERENCE_PAIRS
    for side in ("chosen", "rejected")
]
"""The questions of PREFERENCE_PAIRS with one answer per row. The label is True for the better answer."""
PROMPTS: list[dict[str, Any]] = [{"prompt": [user_message(question)], "answer": good} for question, good, _ in _QUESTIONS]
"""The questions of PREFERENCE_PAIRS as prompts. The column `answer` contains the better answer."""
