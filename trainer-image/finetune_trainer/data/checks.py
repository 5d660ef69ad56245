"""Runs the checks of `dataset.checks`: finds duplicates, answers that are not JSON and personal data, and counts the answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finetune_trainer.data.rows import (
    Completion,
    Conversation,
    Example,
    LabelledAnswer,
    Preference,
    Prompt,
    RawRow,
    RowError,
    Text,
    Turn,
)

PERSONAL_DATA_PATTERNS = {
    # The lookbehind and the bounds keep the search time linear. Without them, a long row without spaces takes quadratic time.
    "email": re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    "phone": re.compile(
        r"(?<![\w.])(?:\+\d[\d ()/-]{7,16}\d|0\d[\d ()/-]{6,14}\d|\(?\d{3}\)?[ -]\d{3}[ -]\d{4})(?!\w)"
    ),
    "creditCard": re.compile(r"\b(?:\d[ -]?){13,16}\b"),
    "ipAddress": re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"),
}
TOP_ANSWERS = 10


@dataclass
class CheckFindings:
    """Results of the checks. A field is None if its check was not requested."""

    duplicate_count: int | None = None
    personal_data_counts: dict[str, int] | None = None
    """Number of rows with at least one match, by kind of personal data. The matches themselves are not stored."""
    top_answer_counts: dict[str, int] | None = None
    """The most frequent answers with their counts."""
    share_of_top_answer: float | None = None


Rows = Sequence[tuple[RawRow, Example]]


def deduplicate(sources: Sequence[Rows]) -> tuple[list[list[tuple[RawRow, Example]]], int]:
    """Remove every row whose example equals an earlier example of any source. Returns the sources and the number of removed rows."""
    seen_digests: set[bytes] = set()
    unique_rows: list[list[tuple[RawRow, Example]]] = []
    for rows in sources:
        unique_rows.append([])
        for raw, example in rows:
            key = hashlib.blake2b(repr(example).encode(), digest_size=16).digest()
            if key not in seen_digests:
                seen_digests.add(key)
                unique_rows[-1].append((raw, example))
    return unique_rows, sum(map(len, sources)) - sum(map(len, unique_rows))


def find_json_error(example: Example) -> RowError | None:
    """Return an error if an answer of the example is not JSON, else None."""
    for answer in answer_texts(example):
        try:
            json.loads(answer)
        except ValueError as error:
            return RowError(
                "AnswerNotJson",
                f"the answer is not valid JSON: {error}",
                "write valid JSON, or set dataset.checks.validateJson: false",
            )
    return None


def scan_personal(rows: Rows) -> dict[str, int]:
    """Return the number of rows that match a pattern of personal data, by kind."""
    matching_rows: Counter[str] = Counter(dict.fromkeys(PERSONAL_DATA_PATTERNS, 0))
    for _, example in rows:
        text = "\n".join(all_texts(example))
        matching_rows.update(kind for kind, pattern in PERSONAL_DATA_PATTERNS.items() if pattern.search(text))
    return dict(matching_rows)


def count_top_answers(rows: Rows) -> tuple[dict[str, int], float]:
    """Return the most frequent answers (first 80 characters) with their counts, and the share of the most frequent answer."""
    counts = Counter(answer.strip()[:80] for _, example in rows for answer in answer_texts(example))
    total = sum(counts.values())
    top = counts.most_common(TOP_ANSWERS)
    return dict(top), (top[0][1] / total if total else 0.0)


def answer_texts(example: Example) -> list[str]:
    """Return the texts that the model is trained to generate."""
    match example:
        case Conversation(turns):
            return [turn.content for turn in turns if turn.role == "assistant" and turn.weight]
        case Completion(_, completion):
            return [completion]
        case Preference(_, chosen, _):
            return list(_list_texts(chosen))
        case LabelledAnswer(_, completion, _):
            return list(_list_texts(completion))
        case _:
            return []


def all_texts(example: Example) -> list[str]:
    """Return every text of an example."""
    match example:
        case Conversation(turns):
            return [turn.content for turn in turns]
        case Text(text):
            return [text]
        case Completion(prompt, completion):
            return [prompt, completion]
        case Preference(prompt, chosen, rejected):
            return [*_list_texts(prompt), *_list_texts(chosen), *_list_texts(rejected)]
        case LabelledAnswer(prompt, completion, _):
            return [*_list_texts(prompt), *_list_texts(completion)]
        case Prompt(prompt, _):
            return list(_list_texts(prompt))


def _list_texts(part: tuple[Turn, ...] | str) -> Iterable[str]:
    return [part] if isinstance(part, str) else [turn.content for turn in part]
