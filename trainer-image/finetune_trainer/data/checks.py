"""Runs the checks of `dataset.checks`: finds duplicate rows, answers that are not JSON, and personal data, and counts equal answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.spec.dataset import Checks

from finetune_trainer.data.rows import (
    Completion,
    Conversation,
    Example,
    LabelledAnswer,
    Preference,
    Prompt,
    RowError,
    Text,
    TokenSequence,
    Turn,
)

PERSONAL_DATA_PATTERNS = {
    # The lookbehind and the bounds keep the search time linear. Without lookbehind and bounds, the search in a long row without spaces takes quadratic time.
    "email": re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"),
    "phone": re.compile(
        r"(?<![\w.])(?:\+\d[\d ()/-]{7,16}\d|0\d[\d ()/-]{6,14}\d|\(?\d{3}\)?[ -]\d{3}[ -]\d{4})(?!\w)"
    ),
    "creditCard": re.compile(r"\b(?:\d[ -]?){13,16}\b"),
    "ipAddress": re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"),
}
TOP_ANSWERS = 10
"""Number of most frequent answers to report."""
ANSWER_CHARACTERS = 80
"""Number of characters at the start of an answer that are compared. Answers that differ only after these characters count as equal."""


@dataclass
class CheckFindings:
    """Results of the checks. A field is None if its check was not requested."""

    duplicate_count: int | None = None
    personal_data_counts: dict[str, int] | None = None
    """Number of rows with at least one match, by kind of personal data. The matches themselves are not stored."""
    top_answer_counts: dict[str, int] | None = None
    """The most frequent answers with their counts."""
    share_of_top_answer: float | None = None
    """Share of the most frequent answer among all answers, from 0 to 1."""

    def notes(self) -> list[str]:
        """Return sentences about the findings for the status."""
        notes = []
        if self.duplicate_count is not None:
            notes.append(f"{self.duplicate_count} duplicate rows were left out")
        if self.personal_data_counts is not None:
            counts_text = ", ".join(f"{kind} in {count}" for kind, count in self.personal_data_counts.items() if count)
            notes.append(f"rows that may hold personal data: {counts_text or 'none'}")
        if self.top_answer_counts:
            most_frequent_answer = next(iter(self.top_answer_counts))
            notes.append(f"most frequent answer: {most_frequent_answer!r}, {self.share_of_top_answer:.1%} of all answers")
        return notes


class RowChecks:
    """Finds duplicates, finds personal data and counts answers, one training row after the other."""

    def __init__(self, options: Checks | None):
        self.options = options or Checks()
        self._seen_digests: set[bytes] = set()
        self._duplicate_count = self._answer_count = 0
        self._personal_data_counts: Counter[str] = Counter(dict.fromkeys(PERSONAL_DATA_PATTERNS, 0))
        self._answer_counts: Counter[str] = Counter()

    def accept(self, example: Example) -> bool:
        """Count the row. Return False if the row must be left out because it equals an earlier row of any source."""
        if self.options.deduplicate:
            digest = hashlib.blake2b(repr(example).encode(), digest_size=16).digest()
            if digest in self._seen_digests:
                self._duplicate_count += 1
                return False
            self._seen_digests.add(digest)
        if self.options.pii_scan:
            text = "\n".join(all_texts(example))
            self._personal_data_counts.update(kind for kind, pattern in PERSONAL_DATA_PATTERNS.items() if pattern.search(text))
        if self.options.balance:
            self._answer_counts.update(answer.strip()[:ANSWER_CHARACTERS] for answer in answer_texts(example))
        return True

    def findings(self) -> CheckFindings:
        """Return the results for all rows so far."""
        findings = CheckFindings()
        if self.options.deduplicate:
            findings.duplicate_count = self._duplicate_count
        if self.options.pii_scan:
            findings.personal_data_counts = dict(self._personal_data_counts)
        if self.options.balance:
            most_frequent_answers = self._answer_counts.most_common(TOP_ANSWERS)
            findings.top_answer_counts = dict(most_frequent_answers)
            findings.share_of_top_answer = most_frequent_answers[0][1] / self._answer_counts.total() if most_frequent_answers else 0.0
        return findings


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
        case TokenSequence():
            return []


def _list_texts(turns_or_text: tuple[Turn, ...] | str) -> Iterable[str]:
    return [turns_or_text] if isinstance(turns_or_text, str) else [turn.content for turn in turns_or_text]
