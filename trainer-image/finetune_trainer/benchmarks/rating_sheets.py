"""Writes the sheets in which people rate answers. If two models answered, the sheet does not show which model gave which answer."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.rating_sheet import (
    BASE_MODEL,
    COLUMNS,
    CSV_FILE,
    HIGHEST_SCORE,
    INSTRUCTIONS,
    INSTRUCTIONS_FILE,
    JSON_FILE,
    KEY_FILE,
    LOWEST_SCORE,
    SCORE_COLUMNS,
    TRAINED_MODEL,
    to_plain_cell,
)


@dataclass(frozen=True)
class SheetRow:
    """One answer that raters rate. If the answers of two models are compared, `model` is a letter instead of a name."""

    number: int
    prompt_number: int
    model: str
    prompt: str
    response: str

    def cells(self) -> dict[str, object]:
        """Return the values of the row by column. The columns that raters fill in are empty."""
        known_cells: dict[str, object] = {
            "id": self.number, "promptID": self.prompt_number, "model": self.model, "prompt": self.prompt, "response": self.response,
        }  # fmt: skip
        return known_cells | dict.fromkeys(SCORE_COLUMNS) | {"rater": "", "comments": ""}


def build_sheet_rows(
    prompts: Sequence[str], trained_answers: Sequence[str], base_answers: Sequence[str] | None, *, seed: int
) -> tuple[list[SheetRow], dict[int, str]]:
    """Return the rows of the sheet, and the model that answered in each row, by row number.

    `trained_answers`, `base_answers`: the answers of the models. With answers of the base model, each prompt has two rows in random order.
    """
    random_generator = random.Random(seed)  # noqa: S311  no secret
    rows: list[SheetRow] = []
    model_by_row: dict[int, str] = {}
    for prompt_index, prompt in enumerate(prompts):
        answers = [(TRAINED_MODEL, trained_answers[prompt_index])] + ([(BASE_MODEL, base_answers[prompt_index])] if base_answers is not None else [])
        random_generator.shuffle(answers)
        for letter, (model, answer) in zip("AB", answers, strict=False):
            row = SheetRow(len(rows) + 1, prompt_index + 1, TRAINED_MODEL if base_answers is None else letter, prompt, answer)
            rows.append(row)
            model_by_row[row.number] = model
    return rows, model_by_row


def write_sheets(folder: Path, rows: Sequence[SheetRow], model_by_row: dict[int, str]) -> None:
    """Write the sheet as JSON and CSV, the instructions, and a separate file that says which model gave which answer."""
    scale = {"lowest": LOWEST_SCORE, "highest": HIGHEST_SCORE}
    sheet = {"instructions": INSTRUCTIONS, "scale": scale, "scores": list(SCORE_COLUMNS), "rows": [row.cells() for row in rows]}
    (folder / JSON_FILE).write_text(json.dumps(sheet, indent=1, ensure_ascii=False).encode(errors="replace").decode())
    # The byte order mark of `utf-8-sig` makes spreadsheets read the file as UTF-8.
    with (folder / CSV_FILE).open("w", encoding="utf-8-sig", errors="replace", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: to_plain_cell(value) if isinstance(value, str) else value for name, value in row.cells().items()})
    (folder / INSTRUCTIONS_FILE).write_text(INSTRUCTIONS)
    (folder / KEY_FILE).write_text(json.dumps({"models": {str(number): model for number, model in model_by_row.items()}}, indent=1))
