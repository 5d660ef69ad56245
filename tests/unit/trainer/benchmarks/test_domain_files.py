"""Domain files in all documented formats are read, and an error in a domain file names the question that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.errors import ConfigError
from finetune_trainer.benchmarks.domain_files import (
    DomainQuestion,
    compute_keyword_recall,
    find_domain_files,
    read_domain,
    select_domains,
)

from tests.support.benchmark_folders import write_domain

CHOICE_QUESTION = {"question": "2 + 2?", "choices": ["3", "4"], "correct_answer": 1}


def write_and_read_domain(folder: Path, content: Any) -> list[DomainQuestion]:
    write_domain(folder, "domain_x.json", content)
    return read_domain(folder / "domain_x.json")


@pytest.mark.parametrize(("question_key", "answer_key"), [("prompt", "reference"), ("input", "output"), ("question", "answer")])
def test_question_and_answer_may_have_any_of_the_documented_names(question_key: str, answer_key: str, tmp_path: Path) -> None:
    assert write_and_read_domain(tmp_path, [{question_key: "Q", answer_key: "A", "keywords": ["a"]}]) == [DomainQuestion("Q", "A", ("a",))]


def test_the_text_of_a_multiple_choice_question_contains_its_choices_with_letters(tmp_path: Path) -> None:
    (question,) = write_and_read_domain(tmp_path, {"name": "sums", "questions": [CHOICE_QUESTION]})
    assert question == DomainQuestion("2 + 2?", choices=("3", "4"), correct=1)
    assert (question.text, question.letters) == ("2 + 2?\nA. 3\nB. 4", ("A", "B"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "contains neither a list of questions nor an object with one such list"),
        ({"a": [CHOICE_QUESTION], "b": [CHOICE_QUESTION]}, "contains neither a list of questions nor an object with one such list"),
        ([CHOICE_QUESTION, "text"], "question 2 is not an object"),
        ([{"answer": "A"}], "question 1 has no text in prompt, input, question"),
        ([{"question": "Q"}], "question 1 has neither an expected answer"),
        ([{"question": "Q", "answer": "A", "keywords": "a"}], "keywords that are not a list of words"),
        ([CHOICE_QUESTION | {"choices": ["3"]}], "not a list of 2 to 26 texts"),
        ([CHOICE_QUESTION | {"correct_answer": 2}], "correct_answer 2, but it must be an index from 0 to 1"),
        ([CHOICE_QUESTION | {"correct_answer": True}], "correct_answer True"),
    ],
)
def test_the_error_of_an_invalid_file_names_the_question(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        write_and_read_domain(tmp_path, content)
    assert caught.value.code == "DomainFileInvalid" and message in caught.value.message and "domain_x.json" in caught.value.message


def test_domains_are_selected_by_name(tmp_path: Path) -> None:
    write_domain(tmp_path, "legal.json", [CHOICE_QUESTION])
    write_domain(tmp_path, "medical.json", [CHOICE_QUESTION])
    assert select_domains(tmp_path, "folder", None) == ["legal", "medical"]
    assert select_domains(tmp_path, "folder", ["medical", "medical"]) == ["medical"]
    with pytest.raises(ConfigError, match="no file for the domain code, only for legal, medical"):
        select_domains(tmp_path, "folder", ["code"])
    write_domain(tmp_path, "domain_code.json", [CHOICE_QUESTION])  # with a file `domain_*.json`, the other JSON files count as data of other benchmarks
    assert find_domain_files(tmp_path) == {"code": tmp_path / "domain_code.json"}


def test_a_folder_without_domain_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(json.dumps([CHOICE_QUESTION]))
    with pytest.raises(ConfigError, match="contains no domain file"):
        select_domains(tmp_path, "folder", None)


def test_keyword_recall_ignores_case() -> None:
    assert compute_keyword_recall("The FEVER is high", ("fever", "cough")) == 0.5
