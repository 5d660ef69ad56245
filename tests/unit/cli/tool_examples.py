"""Imports the published examples of other tools and counts the outcomes.

`python -m tests.unit.cli.tool_examples [FOLDER]` prints a report. The examples are not in the repository. Their folder is `shared/tool-examples` next to the
checkout, or the value of the environment variable TOOL_EXAMPLES. The folder has one JSONL file for each tool. Each line of a file has `example` (a path),
`kind` (`text` or `multimodal`) and `config` (the parsed settings).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from finetune_api.rules import check_spec
from finetune_api.spec import load_spec
from finetune_api.support import find_unsupported_fields
from finetune_cli.importers.draft import Request
from finetune_cli.importers.registry import IMPORTERS
from finetune_cli.importers.run_import import run_import
from finetune_cli.mistakes import InvalidInput, Mistake

EXAMPLES_FOLDER = Path(os.environ.get("TOOL_EXAMPLES") or Path(__file__).parents[3].parent / "shared" / "tool-examples")
FILE_BY_TOOL = {"axolotl": "axolotl.jsonl", "llamafactory": "llama-factory.jsonl"}
"""For each importer, the name of the file that contains its examples."""


@dataclass
class ExampleOutcome:
    """The outcome of one example. It is accepted if `problems` and `mistakes` are empty, and refused otherwise."""

    example: str
    kind: str
    problems: list[str] = field(default_factory=list)
    """What `finetune validate` reports for the manifest."""
    mistakes: list[Mistake] = field(default_factory=list)
    unmentioned_keys: list[str] = field(default_factory=list)
    """Keys of the example that the import silently ignored: they set no field, and no warning or note mentions them."""

    @property
    def is_valid(self) -> bool:
        return not self.problems and not self.mistakes

    @property
    def features(self) -> list[str]:
        """The features of the example that a FineTuneJob does not have."""
        return list(dict.fromkeys(mistake.feature for mistake in self.mistakes if mistake.feature))


def read_examples(tool: str, folder: Path = EXAMPLES_FOLDER) -> list[dict[str, Any]]:
    """Return the examples of a tool, or an empty list if their file does not exist."""
    path = folder / FILE_BY_TOOL[tool]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def import_settings(settings: dict[str, Any], folder: Path, **request_fields: Any) -> Any:
    """Write settings to a YAML file, and import this file with the importer that recognises it. Raise InvalidInput if the importer refuses the file."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return run_import(Request((file,), **request_fields), IMPORTERS)


def import_example(example: dict[str, Any], folder: Path) -> ExampleOutcome:
    """Import one example and check the manifest as `finetune validate` does."""
    outcome = ExampleOutcome(example["example"], example["kind"])
    try:
        import_outcome = import_settings(example["config"], folder)
    except InvalidInput as invalid:
        outcome.mistakes = invalid.mistakes
        return outcome
    spec = load_spec(import_outcome.spec)
    outcome.problems = [f"{problem.path}: {problem.message}" for problem in [*check_spec(spec), *find_unsupported_fields(spec)]]
    outcome.unmentioned_keys = list(find_unmentioned_keys(example["config"], import_outcome))
    return outcome


def find_unmentioned_keys(settings: dict[str, Any], import_outcome: Any) -> Iterator[str]:
    """Yield the keys that the import silently ignored: they set no field, and no warning or note mentions them."""
    mentioned_keys = {assigned.key for assigned in import_outcome.assigned_values.values()} | set(import_outcome.reasons)
    mentioned_words = " ".join([*import_outcome.warnings, *import_outcome.notes]).replace(",", " ").replace(":", " ").split()
    for key in settings:
        if not any(name == key or name.startswith((f"{key}.", f"{key}[")) for name in mentioned_keys):
            yield key
    yield from (name for name in import_outcome.reasons if name not in mentioned_words)


def build_report_lines(folder: Path) -> Iterator[str]:
    """Yield the lines of the report on the examples of all tools."""
    with tempfile.TemporaryDirectory() as temporary_folder:
        for tool in FILE_BY_TOOL:
            outcomes = [import_example(example, Path(temporary_folder)) for example in read_examples(tool, folder)]
            for kind in dict.fromkeys(outcome.kind for outcome in outcomes):
                yield from _report_kind(tool, kind, [outcome for outcome in outcomes if outcome.kind == kind])


def _report_kind(tool: str, kind: str, outcomes: list[ExampleOutcome]) -> Iterator[str]:
    valid_outcomes = [outcome for outcome in outcomes if outcome.is_valid]
    refused_outcomes = [outcome for outcome in outcomes if outcome.features]
    other_outcomes = [outcome for outcome in outcomes if not outcome.is_valid and not outcome.features]
    importable_count = len(valid_outcomes) + len(other_outcomes)
    yield (
        f"{tool}, {kind}: {len(outcomes)} examples, {len(valid_outcomes)} validate, {len(refused_outcomes)} refused by feature, {len(other_outcomes)} others; "
        f"{len(valid_outcomes)} of {importable_count} without a missing feature validate; "
        f"{sum(len(outcome.unmentioned_keys) for outcome in outcomes)} unmentioned keys"
    )
    counts = Counter(feature for outcome in refused_outcomes for feature in outcome.features)
    yield from (f"  {count} x {feature}" for feature, count in counts.most_common())
    for outcome in other_outcomes:
        yield from (f"  {outcome.example}: {problem}" for problem in [*outcome.problems, *map(str, outcome.mistakes)])


def main() -> None:
    """Print the report on the examples in a folder."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES_FOLDER
    print("\n".join(build_report_lines(folder)))


if __name__ == "__main__":
    main()
