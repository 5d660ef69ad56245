"""Suggestions for misspelled names."""

from __future__ import annotations

import pytest
from finetune_api.aliases import FIELD_ALIASES, OPTIMIZER_ALIASES, VALUE_ALIASES, normalise
from finetune_api.rules import OPTIMIZERS
from finetune_cli.fields import fields_by_path
from finetune_cli.suggestions import find_closest_name, suggest_field


@pytest.mark.parametrize(
    ("word", "known_names", "closest"),
    [
        ("LEARN_RATE", ["LEARNING_RATE", "LORA_R"], "LEARNING_RATE"),
        ("mcq", ["plain_text", "mcq_jsonl"], "mcq_jsonl"),
        ("lora.rank", ["lora.r", "lora.alpha", "training.rank"], "lora.r"),
        ("training.lr", ["training.model", "training.learning_rate"], "training.learning_rate"),
        ("training.seed", ["model.seed"], "model.seed"),
        ("zebra", ["apple", "pear"], ""),
    ],
)
def test_closest_name_is_found(word: str, known_names: list[str], closest: str) -> None:
    assert find_closest_name(word, known_names) == closest


def test_aliases_name_existing_fields_and_optimizers() -> None:
    assert [path for path in FIELD_ALIASES.values() if f"spec.{path}" not in fields_by_path()] == []
    assert [name for name in FIELD_ALIASES if normalise(name) != name] == []
    assert [name for name in OPTIMIZER_ALIASES.values() if name not in OPTIMIZERS] == []


def test_aliases_of_values_are_normalised_and_name_allowed_values() -> None:
    values_by_path = {path: field.enum_values for path, field in fields_by_path().items() if path.startswith("spec.")}
    for path, aliases in VALUE_ALIASES.items():
        fields_with_path = [path_of_field for path_of_field in values_by_path if path_of_field.endswith(f".{path}")]
        assert fields_with_path, path
        for path_of_field in fields_with_path:
            assert set(aliases.values()) <= set(values_by_path[path_of_field]), path_of_field
        assert [alias for alias in aliases if alias != normalise(alias)] == []


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("spec.tolerations", "spec.placement.tolerations"),
        ("spec.storage.kmsKeyId", "spec.storage.encryption.kmsKeyId"),
        ("spec.training.loggingSteps", "spec.tracking.loggingSteps"),
        ("spec.storage.credentialsSecretRef.key", ""),
        ("spec.placement.volumes[].emptyDir", ""),
    ],
)
def test_same_name_in_another_group_is_suggested_only_if_it_is_clear(path: str, expected: str) -> None:
    assert suggest_field(path, fields_by_path()) == expected
