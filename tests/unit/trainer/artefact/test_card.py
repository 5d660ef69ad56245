"""The model card has metadata that the hub accepts, and no text of a user changes its structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec.enums import OutputKind
from finetune_trainer.artefact.card import (
    TrainingFacts,
    build_merged_card,
    build_model_card,
    escape_markdown,
    split_card,
)

from tests.support.learning import make_run

FACTS = TrainingFacts(12, "messages", 40, 1000, 9000, {"testLoss": 0.123456789})


def build_card(tmp_path: Path, spec: dict[str, Any], kind: OutputKind = OutputKind.ADAPTER) -> str:
    base_folder = tmp_path / "base"
    base_folder.mkdir(exist_ok=True)
    (base_folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.2\nlicense_link: LICENSE\ntags: [x]\n---\n# Base\n")
    run, inputs = make_run(tmp_path / "run", base_folder, spec)
    return build_model_card(run, inputs, kind, FACTS)


def test_the_metadata_names_base_model_library_and_licence(tmp_path: Path) -> None:
    spec = {"model": {"source": "hf://org/base@main"}, "dataset": {"train": "org/data"}, "method": {"type": "lora"}}
    metadata, text = split_card(build_card(tmp_path, spec))
    assert metadata == {
        "base_model": "org/base", "base_model_relation": "adapter", "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", "sft", "lora", "peft"], "datasets": ["org/data"],
        "license": "other", "license_name": "llama3.2", "license_link": "LICENSE",
    }  # fmt: skip
    for row in ("| revision | tiny |", f"| digest (sha256) | {'d' * 64} |", "| rows | 12 |", "| method.lora.rank | 16 |",
                "| optimizer steps | 40 |", "| testLoss | 0.123457 |", "| FineTuneJob | default/job |", "| attempt | 1 |"):  # fmt: skip
        assert row in text, row
    assert "/store/metrics" in text


def test_a_complete_model_of_another_source_has_no_base_model_for_the_hub(tmp_path: Path) -> None:
    metadata, text = split_card(build_card(tmp_path, {"method": {"type": "full"}}, OutputKind.MODEL))
    assert metadata["library_name"] == "transformers" and not metadata.keys() & {"base_model", "base_model_relation", "datasets"}
    assert "transformers import AutoModelForCausalLM" in text


@pytest.mark.parametrize("kind", list(OutputKind))
def test_a_vision_language_model_is_loaded_for_images_and_text(kind: OutputKind, tmp_path: Path) -> None:
    card = build_card(tmp_path, {"model": {"source": "org/base", "modality": "visionLanguage"}}, kind)
    metadata, text = split_card(card)
    assert metadata["pipeline_tag"] == "image-text-to-text" and "from transformers import AutoModelForImageTextToText\n" in text
    assert "AutoModelForImageTextToText" in build_merged_card(card)


def test_secrets_of_sources_are_not_shown(tmp_path: Path) -> None:
    signed_url = "https://host/jobs/model?signature=hidden"
    text = build_card(tmp_path, {"model": {"source": signed_url}, "dataset": {"train": "https://host/train.jsonl?token=hidden"}})
    assert "https://host/jobs/model" in text and "hidden" not in text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("a|b", r"a\|b"), ("a\n# b", r"a \# b"), ("<script>", r"\<script\>"), ("[x](y)`c`", r"\[x\](y)\`c\`"), ("x" * 301, "x" * 300 + "...")],
)
def test_values_cannot_change_the_structure_of_the_card(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


def test_a_new_token_is_escaped(tmp_path: Path) -> None:
    assert r"| model.newTokens | \<img src=x\>\|y |" in build_card(tmp_path, {"model": {"newTokens": ["<img src=x>|y"]}})


def test_the_card_of_the_merged_model_describes_a_complete_model(tmp_path: Path) -> None:
    adapter_card = build_card(tmp_path, {"model": {"source": "org/base"}})
    metadata, text = split_card(build_merged_card(adapter_card))
    assert (metadata["library_name"], metadata["base_model_relation"], metadata["tags"]) == ("transformers", "finetune", ["finetune-operator", "sft", "lora"])
    assert metadata["license"] == "other" and "merged into the weights" in text and "peft" not in text and text.count("## Loading") == 1
    assert "| rows | 12 |" in text


@pytest.mark.parametrize("text", ["# no metadata", "---\n[broken\n---\n# text", "---\nlicense: mit\n"])
def test_a_card_without_readable_metadata_is_not_changed(text: str) -> None:
    assert build_merged_card(text) == text and split_card(text) == ({}, text)
