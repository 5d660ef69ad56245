"""Reads the code blocks of all Markdown pages of the project."""

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
"""If the line before a code block starts with this text, the tests do not run the block and check only its syntax. The rest of that line states why."""
SPEC_FIELDS = {field.alias or name for name, field in FineTuneJobSpec.model_fields.items()}
VALUES_COMMENT = "# chart values"
SMALLEST_SPEC: dict[str, Any] = {"model": {"source": "org/name"}, "dataset": {"train": "s3://bucket/train.jsonl"}}


@dataclass(frozen=True)
class Block:
    """One code block of a page. `title` is the name of the file that the reader saves the block as, or empty."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    is_run: bool

    @property
    def name(self) -> str:
        """Page and line number, for messages and test ids."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """Return the commands of a shell block without comments, each joined into one line."""
        joined_text = self.text.replace("\\\n", " ")
        if self.language == "console":  # a transcript: commands after a `$` prompt, and their output
            joined_text = "\n".join(line.removeprefix("$ ") for line in joined_text.splitlines() if line.startswith("$ "))
        return [" ".join(line.split()) for line in joined_text.splitlines() if line.strip() and not line.strip().startswith("#")]

    def words(self) -> list[list[str]]:
        """Return each command as a list of words, without a comment at its end."""
        return [shlex.split(command, comments=True) for command in self.commands()]


@cache
def read_blocks() -> tuple[Block, ...]:
    """Return the blocks of all pages, in the order of PAGES."""
    return tuple(block for page in PAGES for block in _read_page_blocks(page))


def _read_page_blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        lines_before = text[: match.start()].rstrip().splitlines()
        is_run = not (lines_before and lines_before[-1].strip().startswith(NOT_RUN))
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(Block(page, line, match["language"], match["title"] or "", textwrap.dedent(match["text"]), is_run))
    return blocks


def read_objects(block: Block) -> list[dict[str, Any]]:
    """Return the Kubernetes objects of a YAML block. If a block shows only fields of a spec, they are added to SMALLEST_SPEC, and a FineTuneJob with this
    spec is returned.
    """
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
    """Whether the block contains values for the Helm chart."""
    return block.language == "yaml" and (block.text.startswith(VALUES_COMMENT) or block.title == "values.yaml" or "\ntrainer:\n" in f"\n{block.text}")
