"""The guides: every command line is valid, and the example importer works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from finetune_api import names
from finetune_cli.importers.draft import Importer, Request
from finetune_cli.importers.registry import IMPORTERS
from finetune_cli.importers.run_import import run_import
from finetune_cli.main import COMMANDS, app
from finetune_cli.mistakes import InvalidInput

from tests.unit.cli.conftest import WriteFile

GUIDES_FOLDER = Path(__file__).parents[3] / "docs" / "guides"


def list_documented_command_lines() -> list[str]:
    """Return the command lines in the guides and in the help of every command."""
    command_lines: list[str] = []
    for name in ("cli.md", "import.md"):
        for block in re.findall(r"```\n(.*?)```", (GUIDES_FOLDER / name).read_text(encoding="utf-8"), re.DOTALL):
            command_lines += [line for line in block.splitlines() if line.startswith("finetune ")]
    for command in COMMANDS.values():
        command_lines += re.findall(r"Example: (finetune .*)", command.__doc__ or "")
    return command_lines


@pytest.mark.parametrize("line", list_documented_command_lines())
def test_documented_command_line_is_valid(line: str) -> None:
    words = shlex.split(line.partition(" | ")[0].partition(" -- ")[0])[1:]
    root_command = typer.main.get_command(app)
    if words[0].startswith("--"):
        assert words[0] in [option for parameter in root_command.params for option in parameter.opts]
        return
    command = root_command.commands[words[0]]  # type: ignore[attr-defined]  # the root is a group
    command.make_context(words[0], words[1:], obj=[])


def test_every_command_is_documented() -> None:
    text = (GUIDES_FOLDER / "cli.md").read_text(encoding="utf-8") + (GUIDES_FOLDER / "import.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"finetune {name}" not in text] == []


def test_every_source_is_documented() -> None:
    text = (GUIDES_FOLDER / "import.md").read_text(encoding="utf-8")
    assert [name for name in IMPORTERS if f"| `{name}` |" not in text or f"* **`{name}`**" not in text] == []


def test_example_importer_of_the_guide_works(write_file: WriteFile) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (GUIDES_FOLDER / "import.md").read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Importer] = {}
    exec(code, scope)
    registry = {**IMPORTERS, "sixth": scope["IMPORTER"]}
    import_outcome = run_import(
        Request((write_file("a.json", '{"base": "org/m", "rows": "s3://data/t.jsonl", "passes": 4}'),)), registry
    )
    assert import_outcome.spec == {
        "model": {"source": "org/m"},
        "dataset": {"train": "s3://data/t.jsonl"},
        "training": {"epochs": 4},
    }
    with pytest.raises(InvalidInput) as invalid:
        run_import(Request((write_file("b.json", '{"base": "org/m", "passes": 0, "pases": 1}'),)), registry)
    assert [str(mistake) for mistake in invalid.value.mistakes] == [
        "b.json: pases: unknown key; did you mean passes?",
        "b.json: passes: 0 is out of range; allowed: an integer of at least 1",
        "b.json: rows: this required option is missing; add it, or give --data URI",
    ]


def test_table_of_secrets_lists_every_secret(write_file: WriteFile) -> None:
    env = "MODEL_NAME=org/m\nTRAIN_DATA_PATH=org/d\nDATASET_TYPE=qa\nHUGGINGFACE_TOKEN=h\nMONGODB_URI=mongodb://a:b@c\n"
    toml = '[fine_tuner]\nbase_model_id = "org/m"\ntraining_data_id = "org/d"\nreport_to = "wandb"\n'
    flags = (
        "--hf-key",
        "h",
        "--wandb-key",
        "w",
        "--openai-key",
        "o",
        "--mlflow-username",
        "u",
        "--mlflow-password",
        "p",
    )
    fields_by_key: dict[str, str] = {}
    for name, text, words in (("a.env", env, ()), ("a.toml", toml, flags)):
        import_outcome = run_import(Request((write_file(name, text),), words), IMPORTERS)
        assert set(import_outcome.secrets) == set(find_secret_references(import_outcome.spec))
        fields_by_key |= find_secret_references(import_outcome.spec)
    text = (GUIDES_FOLDER / "import.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]* \| ([^|]*) \| `([^|`]*)` \| ([^|]*) \|$", text, re.MULTILINE)
    documented_fields = {key: path for keys, path, _ in rows for key in re.findall("`([^`]*)`", keys)}
    variables = {name for *_, names in rows for name in re.findall("`([^`]*)`", names)}
    assert documented_fields == fields_by_key
    assert variables == {
        names.Env.HF_TOKEN.value, names.WANDB_KEY, names.MONGODB_URI, "OPENAI_API_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    }  # fmt: skip


def find_secret_references(value: Any, path: str = "") -> dict[str, str]:
    """Return the Secret keys to which a spec refers, each with the path of the field that refers to it."""
    if isinstance(value, list):
        return (
            {key: path for variable in value for key in find_secret_references(variable["secretKeyRef"])}
            if path == "placement.env"
            else {}
        )
    if not isinstance(value, dict):
        return {}
    if set(value) == {"name", "key"}:
        return {value["key"]: path}
    fields_by_key: dict[str, str] = {}
    for name, inner in value.items():
        fields_by_key |= find_secret_references(inner, f"{path}.{name}" if path else name)
    return fields_by_key
