"""Writes the reference page about types of models from the recorded runs of `tests/support/model_matrix.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD_FILE = Path(__file__).resolve().parent.parent / "tests/support/model_matrix.json"
COLUMNS = tuple(f"{method}{packing}" for method in ("full", "lora", "lora, 8-bit base", "qlora") for packing in ("", ", packed"))
"""Columns of each table: method and quantisation, without and with packing."""
WORKS, NOT_TRIED = "yes", "–"
HEADER = """# Types of models

Tiny models of these types were trained with each combination of method, quantisation, strategy and packing that is marked in the tables. The runs had the
library versions {versions}, and used CPUs: one for `one rank`, else two ranks.

| mark | meaning |
|---|---|
| • | The combination trained and saved an artefact. |
| number | The combination was refused before training, or failed, with the message below. |
| – | The combination was not tried with this type. |

[What works together](matrix.md) shows more methods, and all objectives and strategies, with one type of model.
`python -m tests.support.model_matrix` records the runs, `tests/pod/strategies/test_model_matrix.py` compares the record with new runs, and `make generate`
writes this page from the record.
"""


def make_models_page() -> str:
    """Return the text of the reference page about types of models."""
    record: dict[str, Any] = json.loads(RECORD_FILE.read_text("utf-8"))
    reasons: list[str] = []
    verdicts_by_strategy: dict[str, dict[str, dict[str, str]]] = record["verdicts"]
    family_names = list(dict.fromkeys(name for verdicts_by_family in verdicts_by_strategy.values() for name in verdicts_by_family))
    sections = [
        _format_table(strategy, {name: verdicts_by_family.get(name, {}) for name in family_names}, reasons)
        for strategy, verdicts_by_family in verdicts_by_strategy.items()
    ]
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)) or "No combination."
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n".join([HEADER.format(versions=versions), "\n\n".join(sections), "\n## Refused or failed\n", notes, ""])


def _format_table(strategy: str, verdicts_by_family: dict[str, dict[str, str]], reasons: list[str]) -> str:
    """Return the heading and table of one strategy. Appends the refusal messages that `reasons` does not contain yet."""
    lines = [f"## {strategy}", "", f"| type | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for family, verdicts in verdicts_by_family.items():
        unknown_columns = verdicts.keys() - set(COLUMNS)
        if unknown_columns:
            raise ValueError(f"{RECORD_FILE.name} has a verdict on {', '.join(sorted(unknown_columns))}, which has no column")
        lines.append(f"| `{family}` | {' | '.join(_to_mark(verdicts.get(column), reasons) for column in COLUMNS)} |")
    return "\n".join(lines)


def _to_mark(verdict: str | None, reasons: list[str]) -> str:
    if verdict is None or verdict == WORKS:
        return NOT_TRIED if verdict is None else "•"
    if verdict not in reasons:
        reasons.append(verdict)
    return str(reasons.index(verdict) + 1)
