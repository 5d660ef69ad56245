"""Usual mistakes in manifests, and the messages of `finetune validate` about them. The file `mistakes.txt` has one row for each mistake.

The first line of a row is a part of a spec with the mistake. The indented lines after this line are the expected messages. `python -m
tests.unit.cli.mistakes` overwrites the expected messages with the current messages; review the changes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli.checks import check_manifest
from finetune_cli.manifests import Manifest
from finetune_cli.yaml_reader import read_trees

FILE = Path(__file__).with_name("mistakes.txt")
SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}
"""A row's part of a spec is merged into this spec. If the part has the value null for a field, the field is removed."""


@dataclass(frozen=True)
class Row:
    """A part of a spec, and the messages about this part. If a message is a warning, its text begins with `warning: `."""

    text: str
    messages: list[str]


def read_rows() -> list[Row]:
    """Return the rows of the file. Lines that begin with `#` are headings."""
    rows: list[Row] = []
    for line in FILE.read_text("utf-8").splitlines():
        if line.startswith("    "):
            rows[-1].messages.append(line.strip())
        elif line and not line.startswith("#"):
            rows.append(Row(line, []))
    return rows


def list_messages_about(text: str) -> list[str]:
    """Return the errors and warnings about SPEC after the part `text` was merged into it."""
    spec = _merge(SPEC, read_trees(text)[0].value)
    manifest = {"apiVersion": "finetune-operator.io/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "bot"}, "spec": spec}
    findings = check_manifest(Manifest("", 0, manifest, {}))[1]
    return [
        f"{'' if finding.is_error else 'warning: '}{dataclasses.replace(finding.mistake, location='')} [{finding.code}]"
        for finding in findings
    ]


def _merge(base: Any, part: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(part, dict):
        return part
    merged = {key: _merge(base[key], part[key]) if key in base and key in part else part.get(key, base.get(key)) for key in {**base, **part}}
    return {key: value for key, value in merged.items() if value is not None}


def write_rows() -> None:
    """Write the file with the current messages."""
    lines: list[str] = []
    for line in FILE.read_text("utf-8").splitlines():
        if line.startswith("    "):
            continue
        lines.append(line)
        if line and not line.startswith("#"):
            lines += [f"    {message}" for message in list_messages_about(line)]
    FILE.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    write_rows()
