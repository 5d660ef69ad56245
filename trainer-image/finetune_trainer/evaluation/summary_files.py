"""Writes the result files of an evaluation: two JSON files for programs and one workbook for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.evaluation.predictions import PREDICTION_KEYS, Prediction
from finetune_trainer.evaluation.values import MetricValue
from finetune_trainer.files import replace_file

SUMMARY_NAMES = {"bleu": "bleu_score", "rougeL": "rouge_score(mode=fmeasure)"}
"""Names of metrics in `evaluation_summary.json`, by metric. All other metrics have their name in snake case. Ragas uses the same names."""
RESULT_NAMES = {"rouge1": "rouge1_f", "rouge2": "rouge2_f", "rougeL": "rougeL_f"}
"""Names of metrics in `evaluation_results.json`, by metric. All other metrics have their name in snake case."""
REASONS_KEY = "reasons"
"""Key in `evaluation_results.json` of the object with the reasons."""
MAX_CELL_LENGTH = 32_767
"""Maximum length of the text in an Excel cell, in UTF-16 code units."""
MAX_SHEET_ROWS = 1_048_576
"""Maximum number of rows of an Excel sheet, including the header."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""Characters at the start of a text that make a spreadsheet treat the text as a formula."""


def write_summary(path: Path, metrics: Mapping[str, MetricValue]) -> None:
    """Write `evaluation_summary.json`: for each metric its value, or null if it could not be computed. BLEU is on the scale 0 to 100."""
    _write_json(path, {_choose_name_in_file(metric, SUMMARY_NAMES): result.value for metric, result in metrics.items()})


def write_results(path: Path, metrics: Mapping[str, MetricValue]) -> None:
    """Write `evaluation_results.json`: for each metric its value or null, and the object `reasons` with the reason of each metric that has one."""
    result_by_name = {_choose_name_in_file(metric, RESULT_NAMES): result for metric, result in metrics.items()}
    reasons = {name: result.reason for name, result in result_by_name.items() if result.reason}
    _write_json(path, {**{name: result.value for name, result in result_by_name.items()}, REASONS_KEY: reasons})


def _choose_name_in_file(metric: str, names: Mapping[str, str]) -> str:
    """Return the name of a metric in a file: its name in `names`, else its name in snake case, such as `semantic_similarity`."""
    return names.get(metric) or re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: "_" + match[1].lower(), metric)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with replace_file(path) as partial_file:
        partial_file.write_text(text, "utf-8")


def write_workbook(path: Path, predictions: Sequence[Prediction], metrics: Mapping[str, MetricValue]) -> None:
    """Write an Excel workbook with one row per prediction: its texts, and the row's score for each metric with scores of single rows.

    No text becomes a formula. A text that is too long for a cell is cut, and ends with a remark that it was cut. If there are more rows than fit into
    a sheet, the further rows are written to additional sheets.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    scores_by_column = {_choose_name_in_file(metric, SUMMARY_NAMES): result.rows for metric, result in metrics.items() if result.rows is not None}
    for name, rows in scores_by_column.items():
        if len(rows) != len(predictions):
            raise ValueError(f"metric {name} has {len(rows)} row scores for {len(predictions)} predictions")
    workbook = Workbook(write_only=True)
    sheet: Any = None

    def create_text_cell(text: str) -> Any:
        cell = WriteOnlyCell(sheet, value=to_cell_text(text))
        cell.data_type = "s"  # openpyxl treats a text that starts with = as a formula
        cell.quotePrefix = text.startswith(FORMULA_STARTS)  # With quotePrefix, the cell stays text even if it is edited or exported as CSV.
        return cell

    for index in range(max(1, len(predictions))):
        if index % (MAX_SHEET_ROWS - 1) == 0:
            sheet = workbook.create_sheet("samples" if index == 0 else f"samples {index // (MAX_SHEET_ROWS - 1) + 1}")
            sheet.append([create_text_cell(name) for name in (*PREDICTION_KEYS, *scores_by_column)])
        if predictions:
            texts = (getattr(predictions[index], column) for column in PREDICTION_KEYS)
            scores = (rows[index] for rows in scores_by_column.values())
            sheet.append([*(None if text is None else create_text_cell(text) for text in texts), *scores])

    with replace_file(path) as partial_file, partial_file.open("wb") as file:
        workbook.save(file)


def to_cell_text(text: str) -> str:
    """Return the text in a form that a cell can contain. Control characters and unpaired surrogates are replaced, and a text that is too long is cut."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    text = ILLEGAL_CHARACTERS_RE.sub("\ufffd", text)
    text = re.sub("[\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    if _count_utf16_units(text) <= MAX_CELL_LENGTH:
        return text
    remark = f" … [cut: the text has {len(text)} characters]"
    kept_text = text.encode("utf-16-le")[: 2 * (MAX_CELL_LENGTH - _count_utf16_units(remark))].decode("utf-16-le", "ignore")
    return kept_text + remark


def _count_utf16_units(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)
