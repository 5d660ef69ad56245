"""Reads domain files: questions of one domain with expected answers.

A file is a JSON array of objects, or an object that contains one such array. Each object has a question (`prompt`, `input` or `question`).
Each object also has an expected answer (`reference`, `output` or `answer`), or the choices of a multiple-choice question (`choices`) and the index of
the correct choice from 0 (`correct_answer`). `keywords` is optional: words that a good answer contains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError

DOMAIN_FILE_PREFIX = "domain_"
QUESTION_KEYS, ANSWER_KEYS = ("prompt", "input", "question"), ("reference", "output", "answer")
CHOICE_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class DomainQuestion:
    """One question of a domain file."""

    question: str
    reference: str | None = None
    """The expected answer. None for a multiple-choice question."""
    keywords: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    correct: int | None = None
    """Index of the correct choice, from 0."""

    @property
    def letters(self) -> tuple[str, ...]:
        """The letters A, B, C ... of the choices."""
        return tuple(CHOICE_LETTERS[: len(self.choices)])

    @property
    def text(self) -> str:
        """The question, followed by one line for each choice."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(self.letters, self.choices, strict=True)]
        return "\n".join([self.question, *lines])


def find_domain_files(folder: Path) -> dict[str, Path]:
    """Return the domain files of a folder by domain. The file of `medical` is `domain_medical.json`.

    If no file name in the folder begins with `domain_`, the file of `medical` is `medical.json`.
    """
    files = sorted(folder.glob(f"{DOMAIN_FILE_PREFIX}*.json")) or sorted(folder.glob("*.json"))
    return {path.stem.removeprefix(DOMAIN_FILE_PREFIX): path for path in files}


def select_domains(folder: Path, field: str, domains: list[str] | None) -> list[str]:
    """Check the files of the requested domains (default: all), and return these domains. `field`: name of the folder in messages.

    Errors: ConfigError DomainFileMissing, DomainFileInvalid.
    """
    files_by_domain = find_domain_files(folder)
    if not files_by_domain:
        raise ConfigError("DomainFileMissing", f"{field} contains no domain file", hint="add a file such as domain_medical.json")
    for domain in domains or ():
        if domain not in files_by_domain:
            raise ConfigError(
                "DomainFileMissing", f"{field} contains no file for the domain {domain}, only for {', '.join(sorted(files_by_domain))}",
                hint=f"add {DOMAIN_FILE_PREFIX}{domain}.json, or remove {domain} from tasks",
            )  # fmt: skip
    selected_domains = list(dict.fromkeys(domains)) if domains else sorted(files_by_domain)
    for domain in selected_domains:
        read_domain(files_by_domain[domain])
    return selected_domains


def read_domain(path: Path) -> list[DomainQuestion]:
    """Read the questions of a domain file. Errors: ConfigError DomainFileInvalid, which names the number of the question."""
    try:
        file_contents = json.loads(path.read_bytes())
    except ValueError as error:
        raise _domain_file_error(path, f"is not valid JSON: {error}") from error
    candidates = [file_contents] if isinstance(file_contents, list) else list(file_contents.values()) if isinstance(file_contents, dict) else []
    candidate_lists = [candidate for candidate in candidates if isinstance(candidate, list)]
    if len(candidate_lists) != 1 or not candidate_lists[0]:
        raise _domain_file_error(path, "contains neither a list of questions nor an object with one such list")
    return [_read_question(path, number, entry) for number, entry in enumerate(candidate_lists[0], 1)]


def _read_question(path: Path, number: int, entry: Any) -> DomainQuestion:
    if not isinstance(entry, Mapping):
        raise _domain_file_error(path, f"question {number} is not an object")
    question = next((entry[key] for key in QUESTION_KEYS if isinstance(entry.get(key), str) and entry[key].strip()), None)
    if question is None:
        raise _domain_file_error(path, f"question {number} has no text in {', '.join(QUESTION_KEYS)}")
    if "choices" in entry:
        return _read_choices(path, number, question, entry)
    reference = next((entry[key] for key in ANSWER_KEYS if isinstance(entry.get(key), str) and entry[key].strip()), None)
    if reference is None:
        raise _domain_file_error(path, f"question {number} has neither an expected answer ({', '.join(ANSWER_KEYS)}) nor choices")
    keywords = entry.get("keywords") or []
    if not isinstance(keywords, list) or not all(isinstance(word, str) and word.strip() for word in keywords):
        raise _domain_file_error(path, f"question {number} has keywords that are not a list of words")
    return DomainQuestion(question, reference, tuple(keywords))


def _read_choices(path: Path, number: int, question: str, entry: Mapping[str, Any]) -> DomainQuestion:
    choices, correct = entry["choices"], entry.get("correct_answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(CHOICE_LETTERS) or not all(isinstance(choice, str) and choice for choice in choices):
        raise _domain_file_error(path, f"question {number} has choices that are not a list of 2 to {len(CHOICE_LETTERS)} texts")
    if not isinstance(correct, int) or isinstance(correct, bool) or not 0 <= correct < len(choices):
        raise _domain_file_error(path, f"question {number} has the correct_answer {correct!r}, but it must be an index from 0 to {len(choices) - 1}")
    return DomainQuestion(question, choices=tuple(choices), correct=correct)


def _domain_file_error(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        "DomainFileInvalid", f"the domain file {path.name}: {problem}", hint='write a JSON list of objects such as {"question": "...", "answer": "..."}'
    )


def compute_keyword_recall(answer: str, keywords: tuple[str, ...]) -> float:
    """Return the share of the keywords that occur in an answer. Case is ignored."""
    return sum(word.casefold() in answer.casefold() for word in keywords) / len(keywords)
