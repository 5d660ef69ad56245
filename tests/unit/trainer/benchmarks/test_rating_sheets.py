"""Rating sheets hide which model gave an answer, and have no cell that a spreadsheet would execute."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from finetune_api.rating_sheet import BASE_MODEL, COLUMNS, TRAINED_MODEL, to_plain_cell
from finetune_trainer.benchmarks.rating_sheets import build_sheet_rows, write_sheets

PROMPTS = [f"question {number}" for number in range(40)]
TRAINED_ANSWERS, BASE_ANSWERS = [f"trained {number}" for number in range(40)], [f"base {number}" for number in range(40)]


def test_the_models_answer_in_random_order_and_only_the_key_names_them() -> None:
    rows, models = build_sheet_rows(PROMPTS, TRAINED_ANSWERS, BASE_ANSWERS, seed=1)
    assert [row.model for row in rows] == ["A", "B"] * 40 and [row.number for row in rows] == list(range(1, 81))
    assert all(row.response.startswith(models[row.number]) and row.response.endswith(f" {row.prompt_number - 1}") for row in rows)
    trained_first_count = sum(models[row.number] == TRAINED_MODEL for row in rows if row.model == "A")
    assert 10 < trained_first_count < 30
    assert build_sheet_rows(PROMPTS, TRAINED_ANSWERS, BASE_ANSWERS, seed=1) == (rows, models)


def test_without_the_base_model_each_question_has_one_row() -> None:
    rows, models = build_sheet_rows(PROMPTS[:2], TRAINED_ANSWERS[:2], None, seed=1)
    assert [(row.number, row.model, row.response) for row in rows] == [(1, TRAINED_MODEL, "trained 0"), (2, TRAINED_MODEL, "trained 1")]
    assert models == {1: TRAINED_MODEL, 2: TRAINED_MODEL}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\r=x", "  =1", "\n=1"])
def test_a_cell_that_would_be_a_formula_gets_an_apostrophe(text: str, tmp_path: Path) -> None:
    assert to_plain_cell(text) == f"'{text}"
    rows, models = build_sheet_rows([text], [text], [text], seed=1)
    write_sheets(tmp_path, rows, models)
    with (tmp_path / "human_rating.csv").open(encoding="utf-8-sig", newline="") as stream:
        csv_rows = list(csv.DictReader(stream))
    assert [(row["prompt"], row["response"]) for row in csv_rows] == [(f"'{text}", f"'{text}")] * 2
    assert json.loads((tmp_path / "human_rating.json").read_text())["rows"][0]["prompt"] == text


def test_the_sheets_have_empty_columns_for_people_and_no_names_of_models(tmp_path: Path) -> None:
    rows, models = build_sheet_rows(["a, \"b\"\nc \ud800"], ["x"], ["y"], seed=1)
    write_sheets(tmp_path, rows, models)
    sheet = json.loads((tmp_path / "human_rating.json").read_text())
    assert tuple(sheet["rows"][0]) == COLUMNS and sheet["rows"][0]["overall"] is None and sheet["scale"] == {"lowest": 1, "highest": 5}
    assert "from 1 (worst) to 5 (best)" in sheet["instructions"] == (tmp_path / "human_rating_instructions.txt").read_text()
    for name in ("human_rating.json", "human_rating.csv"):
        assert BASE_MODEL not in (tmp_path / name).read_text() and TRAINED_MODEL not in (tmp_path / name).read_text()
