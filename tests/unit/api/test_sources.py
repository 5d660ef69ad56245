"""Source notations and the short model name."""

from __future__ import annotations

import pytest
from finetune_api.sources import MAX_MODEL_NAME_LENGTH, model_name

UID = "6f1c1f6e-58a7-4b52-8c49-1d2a3b4c5d6e"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        ("gpt2", "gpt2"),
        ("hf://org/name@v1.0", "name"),
        ("org/name@feature/x", "name"),
        ("s3://bucket/models/llama-3", "llama-3"),
        ("s3://bucket/models/llama-3/", "llama-3"),
        ("s3://bucket", "bucket"),
        (f"s3://bucket/ft/team-a/support-bot/{UID}/model", "support-bot"),
        (f"s3://bucket/ft/team-a/support-bot/{UID}/model/a1-1f3c9a2b", "support-bot"),
        (f"s3://bucket/ft/team-a/support-bot/{UID}/checkpoints/step-00000100/a2-1f3c9a2b", "support-bot"),
        ("pvc://claim", "claim"),
        ("file:///models/tiny", "tiny"),
        ("https://host/jobs/bot/model", "bot"),
        ("https://host/llama.gguf?signature=secret", "llama.gguf"),
        ("", ""),
    ],
)
def test_model_name_is_short(source: str, expected: str) -> None:
    assert model_name(source) == expected


def test_a_long_model_name_is_cut() -> None:
    name = model_name("org/" + "x" * 90)
    assert len(name) == MAX_MODEL_NAME_LENGTH
    assert name.endswith("xx...")
