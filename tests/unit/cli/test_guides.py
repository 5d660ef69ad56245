"""The guides tell the truth: every command line in them is one that the program takes, and the sixth tool imports."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from finetune_cli.importers.engine import run
from finetune_cli.importers.material import Importer, Refused, Request
from finetune_cli.importers.registry import IMPORTERS
from finetune_cli.main import COMMANDS, app

from tests.unit.cli.conftest import Write

GUIDES = Path(__file__).parents[3] / "docs" / "guides"


def documented() -> list[str]:
    """Command lines of the guides and of every command's own help."""
    found: list[str] = []
    for name in ("cli.md", "import.md"):
        for block in re.findall(r"```\n(.*?)```", (GUIDES / name).read_text(encoding="utf-8"), re.DOTALL):
            found += [line for line in block.splitlines() if line.startswith("finetune ")]
    for command in COMMANDS.values():
        found += re.findall(r"Example: (finetune .*)", command.__doc__ or "")
    return found


@pytest.mark.parametrize("line", documented())
def test_a_documented_command_line_is_understood(line: str) -> None:
    words = shlex.split(line.partition(" | ")[0].partition(" -- ")[0])[1:]
    root = typer.main.get_command(app)
    if words[0].startswith("--"):
        assert words[0] in [option for parameter in root.params for option in parameter.opts]
        return
    command = root.commands[words[0]]  # type: ignore[attr-defined]  # the root is a group
    command.make_context(words[0], words[1:], obj=[])


def test_every_command_is_documented() -> None:
    text = (GUIDES / "cli.md").read_text(encoding="utf-8") + (GUIDES / "import.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"finetune {name}" not in text] == []


def test_every_source_is_documented() -> None:
    text = (GUIDES / "import.md").read_text(encoding="utf-8")
    assert [name for name in IMPORTERS if f"| `{name}` |" not in text or f"* **`{name}`**" not in text] == []


def test_the_sixth_tool_of_the_guide_imports(write: Write) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (GUIDES / "import.md").read_text(encoding="utf-8"), re.DOTALL)
    scope: dict[str, Importer] = {}
    exec(code, scope)
    registry = {**IMPORTERS, "sixth": scope["SIXTH"]}
    found = run(Request((write("a.json", '{"base": "org/m", "rows": "s3://data/t.jsonl", "passes": 4}'),)), registry)
    assert found.spec == {
        "model": {"source": "org/m"},
        "dataset": {"train": "s3://data/t.jsonl"},
        "training": {"epochs": 4},
    }
    with pytest.raises(Refused) as refused:
        run(Request((write("b.json", '{"base": "org/m", "passes": 0, "pases": 1}'),)), registry)
    assert [str(one) for one in refused.value.mistakes] == [
        "b.json: pases: unknown key; did you mean passes?",
        "b.json: passes: 0 is out of range; allowed: an integer of at least 1",
        "b.json: rows: it is missing, and it is required; add it, or give --data URI",
    ]
