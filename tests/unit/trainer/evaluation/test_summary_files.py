"""The result files of an evaluation."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from finetune_trainer.evaluation import summary_files
from finetune_trainer.evaluation.predictions import Prediction
from finetune_trainer.evaluation.summary_files import to_cell_text, write_results, write_summary, write_workbook
from finetune_trainer.evaluation.values import MetricValue
from openpyxl import load_workbook

METRICS = {
    "bleu": MetricValue(25.5, None, [20.0, None]),
    "rougeL": MetricValue(0.5, "1 of 2 rows are not scored", [0.5, None]),
    "rouge1": MetricValue(0.75),
    "semanticSimilarity": MetricValue.missing("set a field"),
    "f1": MetricValue(1.0),
}
ROWS = [
    Prediction("=1+1", "+1", "-1", "@SUM(A1)"),
    Prediction(None, '=HYPERLINK("http://host")', "plain ä 🙂", None),
]


def test_the_summary_contains_a_number_or_null_for_each_metric(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_summary.json"
    write_summary(path, METRICS)
    assert json.loads(path.read_text("utf-8")) == {
        "bleu_score": 25.5, "rouge_score(mode=fmeasure)": 0.5, "rouge1": 0.75, "semantic_similarity": None, "f1": 1.0,
    }  # fmt: skip


def test_the_results_contain_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_results.json"
    write_results(path, METRICS)
    assert json.loads(path.read_text("utf-8")) == {
        "bleu": 25.5, "rougeL_f": 0.5, "rouge1_f": 0.75, "semantic_similarity": None, "f1": 1.0,
        "reasons": {"rougeL_f": "1 of 2 rows are not scored", "semantic_similarity": "set a field"},
    }  # fmt: skip


def test_the_workbook_has_a_row_per_sample_and_a_column_per_metric_with_rows(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_detailed.xlsx"
    write_workbook(path, ROWS, METRICS)
    sheet = load_workbook(path)["samples"]
    assert [[cell.value for cell in row] for row in sheet.rows] == [
        ["system_prompt", "user_prompt", "assistant_response", "ground_truth", "bleu_score", "rouge_score(mode=fmeasure)"],
        ["=1+1", "+1", "-1", "@SUM(A1)", 20, 0.5],
        [None, '=HYPERLINK("http://host")', "plain ä 🙂", None, None, None],
    ]


def test_no_cell_of_the_workbook_is_a_formula(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_detailed.xlsx"
    write_workbook(path, ROWS, METRICS)
    cells = [cell for row in load_workbook(path)["samples"].iter_rows(min_row=2) for cell in row if cell.value is not None]
    assert {cell.data_type for cell in cells} == {"s", "n"}
    assert [cell.value for cell in cells if cell.quotePrefix] == ["=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("http://host")']
    with zipfile.ZipFile(path) as archive:
        assert b"<f>" not in archive.read("xl/worksheets/sheet1.xml")


def test_long_texts_are_cut_to_the_length_that_excel_accepts() -> None:
    assert to_cell_text("x" * 32_767) == "x" * 32_767
    cut_text = to_cell_text("x" * 32_768)
    assert len(cut_text) == 32_767 and cut_text.endswith("x … [cut: the text has 32768 characters]")
    wide_text = to_cell_text("🙂" * 20_000)  # each of these characters counts as two in Excel
    assert len(wide_text.encode("utf-16-le")) // 2 in (32_766, 32_767) and wide_text.endswith("🙂 … [cut: the text has 20000 characters]")


def test_characters_that_a_workbook_cannot_contain_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_detailed.xlsx"
    write_workbook(path, [Prediction(None, "bell \x07", "half a pair \ud83d", "\uffff")], {})
    cell_values = [cell.value for cell in list(load_workbook(path)["samples"].rows)[1]]
    assert cell_values == [None, "bell \ufffd", "half a pair \ufffd", "\ufffd"]


def test_rows_beyond_the_limit_of_excel_continue_in_another_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary_files, "MAX_SHEET_ROWS", 3)
    path = tmp_path / "evaluation_detailed.xlsx"
    write_workbook(path, [Prediction(None, str(number), "", None) for number in range(5)], {})
    workbook = load_workbook(path)
    assert {name: [row[1].value for row in workbook[name].rows] for name in workbook.sheetnames} == {
        "samples": ["user_prompt", "0", "1"], "samples 2": ["user_prompt", "2", "3"], "samples 3": ["user_prompt", "4"],
    }  # fmt: skip


def test_a_workbook_without_rows_has_a_header(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_detailed.xlsx"
    write_workbook(path, [], {})
    assert [cell.value for cell in next(load_workbook(path)["samples"].rows)][:2] == ["system_prompt", "user_prompt"]


def test_a_wrong_number_of_row_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bleu_score has 2 row scores for 1 predictions"):
        write_workbook(tmp_path / "x.xlsx", ROWS[:1], METRICS)
    assert not list(tmp_path.iterdir())
