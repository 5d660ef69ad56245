"""The files with the results of an evaluation: two JSON files for programs and one workbook for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_trainer.evaluation.predictions import COLUMNS, Prediction, replace_file
from finetune_trainer.evaluation.values import MetricValue

SUMMARY_NAMES = {"bleu": "bleu_score", "rougeL": "rouge_score(mode=fmeasure)"}
"""Names in `evaluation_summary.json` that differ from the metric's name in snake case. Ragas uses the same names."""
RESULT_NAMES = {"rouge1": "rouge1_f", "rouge2": "rouge2_f", "rougeL": "rougeL_f"}
"""Names in `evaluation_results.json` that differ from the metric's name in snake case."""
REASONS = "reasons"
"""Key of the object with reasons in `evaluation_results.json`."""
CELL_LIMIT = 32_767
"""Maximum length of the text in an Excel cell, in UTF-16 code units."""
ROW_LIMIT = 1_048_576
"""Maximum number of rows of an Excel sheet, including the header."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet treats a text that starts with one of these characters as a formula."""


def write_summary(path: Path, metrics: Mapping[str, MetricValue]) -> None:
    """Write `evaluation_summary.json`: metric -> number, or null if it could not be computed. BLEU is on the scale 0 to 100."""
    _write_json(path, {_name(metric, SUMMARY_NAMES): result.value for metric, result in metrics.items()})


def write_results(path: Path, metrics: Mapping[str, MetricValue]) -> None:
    """Write `evaluation_results.json`: metric -> number or null, and the object `reasons` with the remarks by metric."""
    named = {_name(metric, RESULT_NAMES): result for metric, result in metrics.items()}
    reasons = {name: result.reason for name, result in named.items() if result.reason}
    _write_json(path, {**{name: result.value for name, result in named.items()}, REASONS: reasons})


def _name(metric: str, names: Mapping[str, str]) -> str:
    """Return the name of a metric in a file: `semanticSimilarity` becomes `semantic_similarity`."""
    return names.get(metric) or re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: "_" + match[1].lower(), metric)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, "utf-8")

    replace_file(path, write)


def write_workbook(path: Path, predictions: Sequence[Prediction], metrics: Mapping[str, MetricValue]) -> None:
    """Write an Excel workbook with one row per prediction: its texts, and a column for each metric with scores of single rows.

    Texts are never formulas. A text that is too long for a cell is cut, and a remark at its end says that it was cut. Rows that exceed
    Excel's maximum continue in another sheet.
    """
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell

    columns = {_name(metric, SUMMARY_NAMES): result.rows for metric, result in metrics.items() if result.rows is not None}
    for name, rows in columns.items():
        if len(rows) != len(predictions):
            raise ValueError(f"metric {name} has {len(rows)} row scores for {len(predictions)} predictions")
    workbook = Workbook(write_only=True)
    sheet: Any = None

    def text_cell(text: str) -> Any:
        cell = WriteOnlyCell(sheet, value=cell_text(text))
        cell.data_type = "s"  # openpyxl treats a text that starts with = as a formula
        cell.quotePrefix = text.startswith(FORMULA_STARTS)  # The cell stays text if it is edited or exported as CSV.
        return cell

    for index in range(max(1, len(predictions))):
        if index % (ROW_LIMIT - 1) == 0:
            sheet = workbook.create_sheet("samples" if index == 0 else f"samples {index // (ROW_LIMIT - 1) + 1}")
            sheet.append([text_cell(name) for name in (*COLUMNS, *columns)])
        if predictions:
            texts = (getattr(predictions[index], column) for column in COLUMNS)
            scores = (rows[index] for rows in columns.values())
            sheet.append([*(None if text is None else text_cell(text) for text in texts), *scores])

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            workbook.save(file)

    replace_file(path, save)


def cell_text(text: str) -> str:
    """Remove what a cell cannot contain: control characters, half surrogate pairs, and characters beyond the maximum length of a cell."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    text = ILLEGAL_CHARACTERS_RE.sub("\ufffd", text)
    text = re.sub("[\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    if _utf16_length(text) <= CELL_LIMIT:
        return text
    mark = f" … [cut: the text has {len(text)} characters]"
    kept = text.encode("utf-16-le")[: 2 * (CELL_LIMIT - _utf16_length(mark))].decode("utf-16-le", "ignore")
    return kept + mark


def _utf16_length(text: str) -> int:
    return len(text) + sum(character > "\uffff" for character in text)
