"""Imports of the published examples of other tools. The examples are not in this repository. If they are missing on this machine, these tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.tool_examples import FILE_BY_TOOL, import_example, read_examples


@pytest.mark.parametrize("tool", FILE_BY_TOOL)
def test_every_text_example_is_valid_or_is_refused_by_a_missing_feature(tool: str, tmp_path: Path) -> None:
    examples = [example for example in read_examples(tool) if example["kind"] == "text"]
    if not examples:
        pytest.skip("the examples are not next to the checkout")
    outcomes = [import_example(example, tmp_path) for example in examples]
    unexplained_problems = {
        outcome.example: [*outcome.problems, *map(str, outcome.mistakes)]
        for outcome in outcomes
        if not outcome.is_valid and not outcome.features
    }
    assert unexplained_problems == {}
    assert {outcome.example: outcome.unmentioned_keys for outcome in outcomes if outcome.unmentioned_keys} == {}
    assert sum(outcome.is_valid for outcome in outcomes) >= len(outcomes) / 2


@pytest.mark.parametrize("tool", FILE_BY_TOOL)
def test_examples_with_images_are_refused_by_the_missing_feature(tool: str, tmp_path: Path) -> None:
    examples = [example for example in read_examples(tool) if example["kind"] == "multimodal"]
    if not examples:
        pytest.skip("the examples are not next to the checkout")
    for example in examples:
        assert "training on images, video or audio" in import_example(example, tmp_path).features, example["example"]
