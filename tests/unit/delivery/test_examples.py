"""The example manifests pass all checks, and the repository contains the data that they use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api import rules
from finetune_api.names import KIND, MAX_NAME_LENGTH, NAME_PATTERN
from finetune_api.sources import S3Source, parse_source
from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import find_unsupported_fields
from finetune_operator.policies.acceptance import AcceptedSpec, accept
from finetune_operator.settings import parse_config

from tests.unit.delivery.conftest import RunFinetune

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TOPIC_FOLDERS = ("methods", "sources", "cluster", "results")
"""Folders with further examples. The e2e tests run the examples that are directly in `examples/`, but not those in these folders."""
EXAMPLE_FILES = sorted([*EXAMPLES.glob("*.yaml"), *(path for topic in TOPIC_FOLDERS for path in (EXAMPLES / topic).glob("*.yaml"))])
OPERATOR_CONFIG = {
    "trainer": {"image": "registry.example.com/trainer:1"},
    "storage": {"uri": "s3://finetune/jobs"},
    "nodePools": [{"name": "h100", "default": True, "gpusPerNode": 8}],
    "policy": {"serviceAccounts": ["default", "finetune-trainer"]},  # sources/irsa.yaml names a ServiceAccount
}


def read_jobs(path: Path) -> list[dict[str, Any]]:
    return [item for item in yaml.safe_load_all(path.read_text("utf-8")) if item["kind"] == KIND]


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: path.stem)
def test_example_passes_all_checks(path: Path) -> None:
    (job,) = read_jobs(path)
    spec = FineTuneJobSpec.model_validate(job["spec"])
    assert rules.check_spec(spec) == []
    assert find_unsupported_fields(spec) == []
    name = job["metadata"]["name"]
    assert name == path.stem
    assert re.fullmatch(NAME_PATTERN, name)
    assert len(name) <= MAX_NAME_LENGTH


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: path.stem)
def test_operator_accepts_the_example(path: Path) -> None:
    (job,) = read_jobs(path)
    acceptance = accept(job["spec"], parse_config(OPERATOR_CONFIG, "test"))
    assert isinstance(acceptance, AcceptedSpec), acceptance


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: path.stem)
def test_example_begins_with_a_comment(path: Path) -> None:
    assert re.match(r"# .{40,}", path.read_text("utf-8"))


def test_offline_validation_accepts_all_examples(run_finetune: RunFinetune) -> None:
    outcome = run_finetune(["validate", *map(str, EXAMPLE_FILES)])
    assert (outcome.exit_code, outcome.output.count(": ok\n")) == (0, len(EXAMPLE_FILES)), outcome.output


@pytest.mark.parametrize("path", EXAMPLE_FILES, ids=lambda path: path.stem)
def test_data_of_an_example_exists(path: Path) -> None:
    for job in read_jobs(path):
        source = parse_source(job["spec"]["dataset"]["train"])
        if isinstance(source, S3Source):
            assert source.bucket == "datasets" or path.stem == "irsa"
            assert (EXAMPLES / "data" / source.key).is_file() or path.stem == "irsa"


def test_readme_lists_each_example(root: Path) -> None:
    text = (root / "examples/README.md").read_text("utf-8")
    assert sorted(re.findall(r"^\| `(\S+\.yaml)`", text, re.M)) == sorted(
        path.relative_to(EXAMPLES).as_posix() for path in EXAMPLE_FILES
    )


def test_all_answers_of_the_quickstart_data_have_the_same_style(root: Path) -> None:
    rows = [json.loads(line) for line in (root / "examples/data/captain.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 36
    for row in rows:
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert re.fullmatch(r"Ahoy, captain! .+ Mark it in the log: .+\. Fair winds!", assistant["content"])
    assert len({row["messages"][0]["content"] for row in rows}) == 36


def test_questions_of_the_demo_are_not_in_the_data(root: Path) -> None:
    import demo

    text = (root / "examples/data/captain.jsonl").read_text("utf-8")
    assert [question for question in demo.UNSEEN_QUESTIONS if question in text] == []
