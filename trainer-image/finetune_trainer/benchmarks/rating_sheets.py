"""Writes the sheets in which people rate answers. If both models answered, the sheet does not show which model gave an answer."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.rating_sheet import (
    BASE,
    COLUMNS,
    CSV_FILE,
    HIGHEST,
    INSTRUCTIONS,
    INSTRUCTIONS_FILE,
    JSON_FILE,
    KEY_FILE,
    LOWEST,
    SCORES,
    TRAINED,
    as_plain_cell,
)


@dataclass(frozen=True)
class SheetRow:
    """One answer to rate. `model` is a letter if answers of two models are compared."""

    number: int
    prompt_number: int
    model: str
    prompt: str
    response: str

    def cells(self) -> dict[str, object]:
        """The columns of the row. The columns that raters fill in are empty."""
        values: dict[str, object] = {"id": self.number, "promptID": self.prompt_number, "model": self.model, "prompt": self.prompt, "response": self.response}
        return values | dict.fromkeys(SCORES) | {"rater": "", "comments": ""}


def sheet_rows(prompts: Sequence[str], trained: Sequence[str], base: Sequence[str] | None, *, seed: int) -> tuple[list[SheetRow], dict[int, str]]:
    """Return the rows, and the model that answered in each row. With answers of the base model, each question has two rows in random order."""
    chooser = random.Random(seed)  # noqa: S311  no secret
    rows: list[SheetRow] = []
    models: dict[int, str] = {}
    for number, prompt in enumerate(prompts):
        answers = [(TRAINED, trained[number])] + ([(BASE, base[number])] if base is not None else [])
        chooser.shuffle(answers)
        for letter, (model, answer) in zip("AB", answers, strict=False):
            row = SheetRow(len(rows) + 1, number + 1, TRAINED if base is None else letter, prompt, answer)
            rows.append(row)
            models[row.number] = model
    return rows, models


def write_sheets(folder: Path, rows: Sequence[SheetRow], models: dict[int, str]) -> None:
    """Write the sheet as JSON and CSV, the instructions, and the key: which model gave which answer."""
    sheet = {"instructions": INSTRUCTIONS, "scale": {"lowest": LOWEST, "highest": HIGHEST}, "scores": list(SCORES), "rows": [row.cells() for row in rows]}
    (folder / JSON_FILE).write_text(json.dumps(sheet, indent=1, ensure_ascii=False).encode(errors="replace").decode())
    # The byte order mark of `utf-8-sig` makes spreadsheets read the file as UTF-8.
    with (folder / CSV_FILE).open("w", encoding="utf-8-sig", errors="replace", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({name: as_plain_cell(value) if isinstance(value, str) else value for name, value in row.cells().items()})
    (folder / INSTRUCTIONS_FILE).write_text(INSTRUCTIONS)
    (folder / KEY_FILE).write_text(json.dumps({"models": {str(number): model for number, model in models.items()}}, indent=1))
