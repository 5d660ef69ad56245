"""The checks of `dataset.checks`."""

from __future__ import annotations

from pathlib import Path

import pytest
from finetune_trainer.data import check_files
from finetune_trainer.data.rows import Turn

from tests.support.data import catch_check_error, make_data_run

HI, HO = Turn("user", "hi"), Turn("assistant", "ho")


@pytest.mark.timeout(30)
def test_the_scan_of_a_long_row_without_spaces_takes_linear_time(tmp_path: Path) -> None:
    """A search that restarts at every dot would take minutes for a row with many dots."""
    dots = "a.b-c." * 50_000
    rows = [{"text": dots}, {"text": f"{dots}@{dots}"}, {"text": "to a.b@mail.example.org."}, {"text": "a@b"}]
    run, inputs = make_data_run(tmp_path, {"dataset": {"checks": {"piiScan": True}}}, rows)
    findings = check_files(run, inputs).findings
    assert findings.personal_data_counts is not None and findings.personal_data_counts["email"] == 1


def test_an_answer_that_is_not_json_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"question": "hi", "answer": '{"a": 1}'}, {"question": "hi", "answer": "{a: 1}"}]
    error = catch_check_error(tmp_path, {"checks": {"validateJson": True}}, rows)
    assert error.code == "AnswerNotJson" and "row 2" in error.message


def test_the_results_of_all_checks_are_reported(tmp_path: Path) -> None:
    rows = [
        {"question": "Mail me", "answer": "to a.b@example.org"}, {"question": "Mail me", "answer": "to a.b@example.org"},
        {"question": "Call", "answer": "+49 170 1234567"}, {"question": "Which", "answer": "yes"}, {"question": "What", "answer": "yes"},
    ]  # fmt: skip
    run, inputs = make_data_run(
        tmp_path, {"dataset": {"checks": {"deduplicate": True, "piiScan": True, "balance": True}}}, rows
    )
    summary = check_files(run, inputs)
    assert summary.rows["train"] == 4
    assert summary.findings.duplicate_count == 1
    assert summary.findings.personal_data_counts == {"email": 1, "phone": 1, "creditCard": 0, "ipAddress": 0, "iban": 0}
    assert summary.findings.top_answer_counts is not None and summary.findings.top_answer_counts["yes"] == 2
    assert summary.findings.share_of_top_answer == 0.5
    assert not any("example.org" in note for note in summary.notes if "personal" in note)
