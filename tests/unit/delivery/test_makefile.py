"""`make help` lists each target, and all documented make commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def read_make_targets(root: Path) -> set[str]:
    return set(re.findall(r"^\.PHONY: (\S+)$", (root / "Makefile").read_text("utf-8"), re.M))


def test_help_lists_each_target(root: Path) -> None:
    command = ["make", "-C", root, "--no-print-directory", "help"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^  ([a-z0-9-]+) ", out, re.M)) == read_make_targets(root)


def test_documented_make_targets_exist(root: Path) -> None:
    """Checks the `make` commands in code blocks and between backticks."""
    for path in [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "examples").glob("*.md")]:
        named_targets = set(re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", path.read_text("utf-8"), re.M))
        assert named_targets <= read_make_targets(root), path


def test_ci_runs_the_documented_targets(root: Path) -> None:
    text = (root / ".ci/run").read_text("utf-8")
    assert re.findall(r"^make .*?(\S+)$", text, re.M) == ["lint", "test"]


def test_generated_files_are_up_to_date(root: Path) -> None:
    import generate

    for path, text in generate.generate_files().items():
        assert path.read_text("utf-8") == text, f"{path} differs: run `make generate`"
