"""Every block of code in the documentation is run, applied or checked. If a block needs a cloud, it is marked, and only its syntax is checked."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from finetune_api import rules
from finetune_api.names import KIND
from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import find_unsupported_fields
from finetune_cli.main import app

from tests.support.doc_blocks import PAGES, ROOT, SMALLEST_SPEC, Block, is_chart_values, read_blocks, read_objects
from tests.unit.delivery.conftest import RunFinetune

BLOCKS = read_blocks()
LANGUAGES = {"", "sh", "console", "yaml", "json", "python", "ini", "toml"}
OFFLINE_COMMANDS = ("validate", "import", "init", "explain")
"""Commands of `finetune` that need no cluster. The tests run them."""
OTHER_YAML = {"docs/guides/benchmarks.md": {"task"}, "docs/guides/openai.md": {"keys", "models"}}
"""Pages that contain YAML for other programs than kubectl and Helm, and the keys of this YAML: a task of the lm-evaluation-harness, and files of `finetune
serve-openai`.
"""
INCOMPLETE_FRAGMENTS = {"docs/guides/checkpoints.md": {"encryption"}}
"""Keys of YAML fragments that show only one nested group of a spec. On the page, the text before the fragment says where the group belongs."""


def list_blocks_with_language(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def make_block_name(block: Block) -> str:
    return block.name


def test_languages_are_known() -> None:
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert len(list_blocks_with_language("sh")) > 30 and len(list_blocks_with_language("yaml")) > 35


@pytest.mark.parametrize("block", list_blocks_with_language("json"), ids=make_block_name)
def test_json_is_valid(block: Block) -> None:
    texts = block.text.splitlines() if block.title.endswith(".jsonl") else [block.text]
    assert [json.loads(text) for text in texts]


@pytest.mark.parametrize("block", list_blocks_with_language("python"), ids=make_block_name)
def test_python_is_valid(block: Block) -> None:
    ast.parse(block.text)


def test_shell_is_valid() -> None:
    for block in list_blocks_with_language("sh"):
        completed_process = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
        assert completed_process.returncode == 0, f"{block.name}: {completed_process.stderr}"


@pytest.mark.parametrize("block", [block for block in list_blocks_with_language("sh") if block.is_run], ids=make_block_name)
def test_blocks_without_a_mark_contain_only_commands_that_tests_run(block: Block) -> None:
    """The integration tests run the kubectl commands, and `.ci/run` runs the make commands."""
    targets = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    for words in block.words():
        assert words[0] == "kubectl" or (words[0] == "make" and words[1] in targets) or (words[0] == "finetune" and words[1] in OFFLINE_COMMANDS), (
            f"{' '.join(words)}: no test runs this command; write a line `*Not run here: ...*` in front of the block"
        )


def list_pages_with_commands() -> list[Path]:
    return sorted({block.page for block in list_blocks_with_language("sh") if block.is_run and "finetune " in block.text})


@pytest.mark.parametrize("page", list_pages_with_commands(), ids=lambda page: page.stem)
def test_offline_commands_of_a_page_succeed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_finetune: RunFinetune) -> None:
    monkeypatch.chdir(tmp_path)
    for block in (block for block in BLOCKS if block.page == page and block.is_run):
        if block.title:
            Path(block.title).write_text(block.text, "utf-8")
        elif block.language == "sh":
            for words in (words for words in block.words() if words[0] == "finetune"):
                outcome = run_finetune(words[1:])
                assert outcome.exit_code == 0, f"{block.name}: {' '.join(words)}: {outcome.output}"


def list_finetune_lines() -> list[tuple[str, str]]:
    """Return all command lines of `finetune` in the blocks, each with the name of its block."""
    blocks = list_blocks_with_language("", "sh", "console")
    return [(block.name, command) for block in blocks for command in block.commands() if command.startswith("finetune ")]


def test_all_command_lines_are_valid() -> None:
    root_command: Any = typer.main.get_command(app)
    for name, line in list_finetune_lines():
        words = Block(ROOT, 0, "sh", "", line.partition(" | ")[0].partition(" -- ")[0], True).words()[0][1:]
        if not words[0].startswith("-"):
            assert words[0] in root_command.commands, f"{name}: {line}"
            root_command.commands[words[0]].make_context(words[0], words[1:], obj=[])
    assert len(list_finetune_lines()) > 50


def is_input_of_a_command(block: Block) -> bool:
    return bool(block.title) and block.page.parent.name == "migration" and block.title != "job.yaml"


YAML_BLOCKS = [block for block in list_blocks_with_language("yaml") if not is_input_of_a_command(block)]


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=make_block_name)
def test_each_yaml_block_is_an_object_or_chart_values(block: Block) -> None:
    page = block.page.relative_to(ROOT).as_posix()
    (first_document, *_) = documents = [document for document in yaml.safe_load_all(block.text) if document]
    if set(first_document) & (OTHER_YAML.get(page, set()) | INCOMPLETE_FRAGMENTS.get(page, set())):
        return
    assert is_chart_values(block) or len(read_objects(block)) == len(documents), f"write `# chart values` into the first line, or a whole object: {block.text}"


@pytest.mark.parametrize("block", [block for block in YAML_BLOCKS if not is_chart_values(block)], ids=make_block_name)
def test_jobs_pass_all_checks(block: Block) -> None:
    for item in (item for item in read_objects(block) if item["kind"] == KIND):
        spec = FineTuneJobSpec.model_validate(item["spec"])
        assert rules.check_spec(spec) == []
        assert find_unsupported_fields(spec) == []


def merge_values(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge values as Helm does: maps are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        is_map = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge_values(base[key], value) if is_map else value
    return merged


@pytest.mark.parametrize("block", [block for block in YAML_BLOCKS if is_chart_values(block)], ids=make_block_name)
def test_values_are_valid_for_the_chart(block: Block) -> None:
    chart = ROOT / "helm/finetune-operator"
    defaults = yaml.safe_load((chart / "values.yaml").read_text("utf-8"))
    schema = json.loads((chart / "values.schema.json").read_text("utf-8"))
    jsonschema.validate(merge_values(defaults, yaml.safe_load(block.text)), schema)


def test_a_fragment_becomes_a_whole_job() -> None:
    block = Block(ROOT / "x.md", 1, "yaml", "", "spec:\n  suspend: true\n", True)
    assert [item["spec"] for item in read_objects(block)] == [SMALLEST_SPEC | {"suspend": True}]


LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text("utf-8")) if ":" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def list_nav_entries(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [entry for item in (value.values() if isinstance(value, dict) else value) for entry in list_nav_entries(item)]


def test_every_page_has_a_place_in_the_navigation() -> None:
    entries = list_nav_entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert len(entries) == len(set(entries))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    decisions = {page for page in pages if re.match(r"decisions/0", page)}
    docs_entries = {entry for entry in entries if not entry.startswith("source/")}
    assert docs_entries == pages - decisions
    assert [entry for entry in entries if entry.startswith("source/") and not (ROOT / entry.removeprefix("source/")).is_file()] == []


def test_metrics_of_the_alerts_exist() -> None:
    from finetune_operator.metrics import Metrics

    named_metrics = set(re.findall(r"finetune_operator_[a-z_]+", (ROOT / "docs/operations/monitor.md").read_text("utf-8")))
    known_metrics = {f"{metric.name}{suffix}" for metric in Metrics().registry.collect() for suffix in ("", "_total", "_bucket")}
    assert len(named_metrics) >= 5
    assert named_metrics - known_metrics == set()


def test_speeds_of_training_are_those_of_the_benchmarks() -> None:
    speeds = re.findall(r"\b\d{1,2},\d{3}\b", (ROOT / "docs/operations/performance.md").read_text("utf-8").split("## Time of operations")[0])
    source = (ROOT / "benchmarks/README.md").read_text("utf-8")
    assert len(speeds) > 12
    assert [speed for speed in speeds if speed not in source and speed != "4,096"] == []
