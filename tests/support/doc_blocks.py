"""Reads the blocks of code of all Markdown pages of the project."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from finetune_api.names import KIND
from finetune_api.spec import FineTuneJobSpec

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "examples/README.md", ROOT / "benchmarks/README.md"]
)
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^ *```$", re.M | re.S)
NOT_RUN = "*Not run here: "
"""A line with this text in front of a block says why the tests check only the syntax of the block."""
SPEC_FIELDS = {field.alias or name for name, field in FineTuneJobSpec.model_fields.items()}
VALUES_COMMENT = "# chart values"
SMALLEST_SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


@dataclass(frozen=True)
class Block:
    """One block of code of a page. `title` is the name of the file that the reader writes; empty if there is none."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    is_run: bool

    @property
    def name(self) -> str:
        """Page and line, for messages and ids of tests."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Return the commands of a shell block: one line each, without comments and continuations."""
        joined = self.text.replace("\\\n", " ")
        if self.language == "console":  # a transcript: commands with a prompt, and what they print
            joined = "\n".join(line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ "))
        return [" ".join(line.split()) for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]

    def words(self) -> list[list[str]]:
        """Return the words of each command, without comments at the end of a line."""
        return [shlex.split(command, comments=True) for command in self.commands()]


@cache
def read_blocks() -> tuple[Block, ...]:
    """Return the blocks of all pages, in the order of pages and lines."""
    return tuple(block for page in PAGES for block in _blocks_of(page))


def _blocks_of(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        lines_before = text[: match.start()].rstrip().splitlines()
        is_run = not (lines_before and lines_before[-1].strip().startswith(NOT_RUN))
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(page, line, match["language"], match["title"] or "", textwrap.dedent(match["text"]), is_run))
    return blocks


def read_objects(block: Block) -> list[dict[str, Any]]:
    """Return the Kubernetes objects of a YAML block. A block with fields of a spec becomes a FineTuneJob with the smallest spec."""
    documents = [document for document in yaml.safe_load_all(block.text) if document]
    objects = []
    for document in documents:
        if "kind" in document:
            objects.append(document)
        elif set(document) == {"spec"} or set(document) <= SPEC_FIELDS:
            spec = document.get("spec", document)
            objects.append({"kind": KIND, "apiVersion": "finetune-operator.io/v1alpha1", "metadata": {"name": "block"}, "spec": SMALLEST_SPEC | spec})
    return objects


def is_chart_values(block: Block) -> bool:
    """Whether the block has values of the chart."""
    return block.language == "yaml" and (block.text.startswith(VALUES_COMMENT) or block.title == "values.yaml" or "\ntrainer:\n" in f"\n{block.text}")
