"""Looks at the rows before training (`dataset.checks`): duplicates, JSON answers, personal data, how often each answer occurs."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from finetune_trainer.data.rows import (
    Completion,
    Conversation,
    Example,
    Judged,
    Preference,
    Prompt,
    Raw,
    RowError,
    Text,
    Turn,
)

PERSONAL = {
    # Begins where a run of its characters begins, and has bounds: a long row without spaces must not cost its square.
    "email": re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    "phone": re.compile(
        r"(?<![\w.])(?:\+\d[\d ()/-]{7,16}\d|0\d[\d ()/-]{6,14}\d|\(?\d{3}\)?[ -]\d{3}[ -]\d{4})(?!\w)"
    ),
    "creditCard": re.compile(r"\b(?:\d[ -]?){13,16}\b"),
    "ipAddress": re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"),
}
MOST_FREQUENT = 10


@dataclass
class Findings:
    """What the looks found; None: not asked for."""

    duplicates: int | None = None
    personal: dict[str, int] | None = None
    """Rows with at least one hit, by kind. Never the hits themselves."""
    answers: dict[str, int] | None = None
    """The most frequent answers."""
    share_of_top_answer: float | None = None
    notes: list[str] = field(default_factory=list)


Rows = Sequence[tuple[Raw, Example]]


def deduplicate(sources: Sequence[Rows]) -> tuple[list[list[tuple[Raw, Example]]], int]:
    """Each source without the rows that equal an earlier one, of any source, after normalisation; and how many went."""
    seen: set[bytes] = set()
    kept: list[list[tuple[Raw, Example]]] = []
    for rows in sources:
        kept.append([])
        for raw, example in rows:
            key = hashlib.blake2b(repr(example).encode(), digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                kept[-1].append((raw, example))
    return kept, sum(map(len, sources)) - sum(map(len, kept))


def answer_error(example: Example) -> RowError | None:
    """What is wrong with an answer that should be JSON, or None."""
    for answer in answers(example):
        try:
            json.loads(answer)
        except ValueError as error:
            return RowError(
                "AnswerNotJson",
                f"the answer is not valid JSON: {error}",
                "write valid JSON, or turn dataset.checks.validateJson off",
            )
    return None


def scan_personal(rows: Rows) -> dict[str, int]:
    """Rows that hold something like personal data, by kind."""
    found: Counter[str] = Counter(dict.fromkeys(PERSONAL, 0))
    for _, example in rows:
        text = "\n".join(texts(example))
        found.update(kind for kind, pattern in PERSONAL.items() if pattern.search(text))
    return dict(found)


def balance(rows: Rows) -> tuple[dict[str, int], float]:
    """The most frequent answers with their counts, and the share of the first."""
    counts = Counter(answer.strip()[:80] for _, example in rows for answer in answers(example))
    total = sum(counts.values())
    top = counts.most_common(MOST_FREQUENT)
    return dict(top), (top[0][1] / total if total else 0.0)


def answers(example: Example) -> list[str]:
    """Texts that the model learns to say."""
    match example:
        case Conversation(turns):
            return [turn.content for turn in turns if turn.role == "assistant" and turn.weight]
        case Completion(_, completion):
            return [completion]
        case Preference(_, chosen, _):
            return list(_texts_of(chosen))
        case Judged(_, completion, _):
            return list(_texts_of(completion))
        case _:
            return []


def texts(example: Example) -> list[str]:
    """Every text of an example."""
    match example:
        case Conversation(turns):
            return [turn.content for turn in turns]
        case Text(text):
            return [text]
        case Completion(prompt, completion):
            return [prompt, completion]
        case Preference(prompt, chosen, rejected):
            return [*_texts_of(prompt), *_texts_of(chosen), *_texts_of(rejected)]
        case Judged(prompt, completion, _):
            return [*_texts_of(prompt), *_texts_of(completion)]
        case Prompt(prompt, _):
            return list(_texts_of(prompt))


def _texts_of(part: tuple[Turn, ...] | str) -> Iterable[str]:
    return [part] if isinstance(part, str) else [turn.content for turn in part]
