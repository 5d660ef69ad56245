"""`finetune rerun`."""

from __future__ import annotations

import pytest
from finetune_cli.commands.rerun import free_name


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("bot", set(), "bot-2"),
        ("bot", {"bot-2"}, "bot-3"),
        ("bot-2", {"bot-2"}, "bot-3"),
        ("a" * 40, set(), "a" * 38 + "-2"),
    ],
)
def test_free_name_adds_the_next_number(name: str, taken: set[str], expected: str) -> None:
    assert free_name(name, taken) == expected
