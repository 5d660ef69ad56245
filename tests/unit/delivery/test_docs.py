"""Users can copy the YAML of the README and the quickstart without changes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api import rules
from finetune_api.names import KIND
from finetune_api.spec import FineTuneJobSpec
from finetune_api.support import find_unsupported_fields

ROOT = Path(__file__).resolve().parents[3]


def read_yaml_blocks() -> list[tuple[str, dict[str, Any]]]:
    """Read the YAML blocks of the README and the quickstart. Returns (page, block) pairs."""
    yaml_blocks = []
    for page in ("README.md", "docs/guides/quickstart.md"):
        texts = re.findall(r"^```yaml[^\n]*\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)
        yaml_blocks += [(page, yaml.safe_load(text)) for text in texts]
    return yaml_blocks


JOBS = [body for _, body in read_yaml_blocks() if body.get("kind") == KIND]
VALUES = [body for _, body in read_yaml_blocks() if "kind" not in body]


def test_documents_contain_yaml_blocks() -> None:
    assert (len(JOBS), len(VALUES)) == (2, 1)


@pytest.mark.parametrize("body", JOBS, ids=lambda body: body["metadata"]["name"])
def test_documented_job_passes_all_checks(body: dict[str, Any]) -> None:
    spec = FineTuneJobSpec.model_validate(body["spec"])
    assert rules.check_spec(spec) == []
    assert find_unsupported_fields(spec) == []


@pytest.mark.parametrize("body", VALUES, ids=lambda _: "values")
def test_documented_values_are_valid_for_the_chart(helm: Path, body: dict[str, Any]) -> None:
    command = [helm, "template", "x", ROOT / "helm/finetune-operator", "-f", "-"]
    completed_process = subprocess.run(command, input=json.dumps(body), capture_output=True, text=True)
    assert completed_process.returncode == 0, completed_process.stderr
