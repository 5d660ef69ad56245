"""`test_split.jsonl` contains the rows of the test set as they are in their source."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer.data import load
from finetune_trainer.data.rows import RawRow
from finetune_trainer.results.test_split import jsonl_lines

from tests.support.data import make_data_run

ROWS = [{"question": f"q{number} é", "answer": "ho", "source": {"page": number, "tags": ["a", None]}} for number in range(20)]


def write_and_read_test_rows(folder: Path, dataset: dict[str, Any], **data: Any) -> list[Any]:
    run, inputs = make_data_run(folder, {"dataset": {"split": {"validation": 0.2, "test": 0.3, "seed": 5}, **dataset}}, **data)
    data_sets = load(run, inputs)
    lines = list(jsonl_lines(row for row, _ in data_sets.test))
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    rows_of_other_sets = [dict(row.value) for row, _ in (*data_sets.train, *data_sets.validation)]
    rows = [json.loads(line) for line in lines]
    assert not [row for row in rows if row in rows_of_other_sets]
    return rows


def test_split_rows_equal_the_source_rows(tmp_path: Path) -> None:
    """The file also contains the columns that training does not read. Templates and system prompts are not applied to the text."""
    test_rows = write_and_read_test_rows(tmp_path, {"systemPrompt": "Answer.", "format": "qa"}, rows=ROWS)
    assert len(test_rows) == 6 and all(row in ROWS for row in test_rows)
    assert [ROWS.index(row) for row in test_rows] == sorted(ROWS.index(row) for row in test_rows)


def test_rows_of_text_files_have_one_column(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(10))
    test_rows = write_and_read_test_rows(tmp_path, {"format": "plainText"}, text=text, name="train.txt")
    assert len(test_rows) == 3 and {tuple(row) for row in test_rows} == {("text",)}
    assert all(row["text"] + "\n" in text for row in test_rows)


def test_rows_of_csv_files_have_the_columns_of_the_header(tmp_path: Path) -> None:
    text = "question,answer,id\n" + "".join(f'"a, ""b"" {number}",ho,{number}\n' for number in range(10))
    test_rows = write_and_read_test_rows(tmp_path, {"format": "qa"}, text=text, name="train.csv")
    assert test_rows and all(row == {"question": f'a, "b" {row["id"]}', "answer": "ho", "id": row["id"]} for row in test_rows)


@pytest.mark.parametrize(
    ("value", "expected_value"),
    [(float("nan"), None), (datetime.date(2025, 1, 2), "2025-01-02"), ("nan", "nan"), ([float("inf"), 1], [None, 1]), ("a\nb", "a\nb")],
)
def test_values_that_json_does_not_have_are_null_or_text(value: Any, expected_value: Any) -> None:
    (line,) = jsonl_lines([RawRow(Path("rows.parquet"), 1, {"column": value})])
    assert json.loads(line) == {"column": expected_value}
