"""Helpers for the tests of `finetune import`. The helpers run an import in the process of the test and return the import's outcome."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_cli.importers.draft import Request
from finetune_cli.importers.registry import IMPORTERS
from finetune_cli.importers.render import build_documents, render_manifest
from finetune_cli.importers.run_import import run_import
from finetune_cli.mistakes import InvalidInput
from finetune_cli.provenance import AssignedValue, ValueOrigin

CASES_FOLDER = Path(__file__).parent
ENVIRONMENT = {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
UNIMPLEMENTED_TEXT = "this release does not implement it"


@dataclass
class ImportOutcome:
    """The outcome of an import: the printed objects with warnings and notes, or a list of mistakes."""

    spec: dict[str, Any] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)
    documents: list[Any] = field(default_factory=list)
    text: str = ""

    def at(self, path: str) -> Any:
        """Return the value at a dotted path of the spec, or None if the spec has no such field."""
        value: Any = self.spec
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


def import_files(
    *files: Path,
    words: str | list[str] = "",
    source: str | None = None,
    overrides: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    name: str | None = None,
    **request_fields: Any,
) -> ImportOutcome:
    """Import files as `finetune import` does, but leave out warnings about fields that this release does not implement."""
    request = Request(
        files,
        tuple(shlex.split(words) if isinstance(words, str) else words),
        source,
        name,
        overrides={path: AssignedValue(value, ValueOrigin("option"), "--set") for path, value in (overrides or {}).items()},
        environment=ENVIRONMENT if environment is None else environment,
        **request_fields,
    )
    try:
        import_outcome = run_import(request, IMPORTERS)
    except InvalidInput as invalid:
        return ImportOutcome(mistakes=[str(mistake) for mistake in invalid.mistakes])
    return ImportOutcome(
        spec=import_outcome.spec,
        warnings=[warning for warning in import_outcome.warnings if UNIMPLEMENTED_TEXT not in warning],
        notes=import_outcome.notes,
        secrets=import_outcome.secrets,
        documents=list(build_documents(import_outcome)),
        text=render_manifest(import_outcome, with_origins=True),
    )
