"""Suggestions for misspelled names."""

from __future__ import annotations

import pytest
from finetune_api.aliases import FIELD_ALIASES, OPTIMIZER_ALIASES, normalise
from finetune_api.rules import OPTIMIZERS
from finetune_cli.fields import fields_by_path
from finetune_cli.suggestions import closest_name


@pytest.mark.parametrize(
    ("word", "known", "closest"),
    [
        ("LEARN_RATE", ["LEARNING_RATE", "LORA_R"], "LEARNING_RATE"),
        ("mcq", ["plain_text", "mcq_jsonl"], "mcq_jsonl"),
        ("lora.rank", ["lora.r", "lora.alpha", "training.rank"], "lora.r"),
        ("training.lr", ["training.model", "training.learning_rate"], "training.learning_rate"),
        ("training.seed", ["model.seed"], "model.seed"),
        ("zebra", ["apple", "pear"], ""),
    ],
)
def test_closest_name_is_found(word: str, known: list[str], closest: str) -> None:
    assert closest_name(word, known) == closest


def test_aliases_name_existing_fields_and_optimizers() -> None:
    assert [path for path in FIELD_ALIASES.values() if f"spec.{path}" not in fields_by_path()] == []
    assert [name for name in FIELD_ALIASES if normalise(name) != name] == []
    assert [name for name in OPTIMIZER_ALIASES.values() if name not in OPTIMIZERS] == []
