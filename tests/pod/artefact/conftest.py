"""The model of these tests is pre-trained on ChatML.

As in many base models, the end token of the test model is `<|endoftext|>`, not the end token of ChatML.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.models import libraries, raw_model, taught_model  # noqa: F401  fixtures

BASE_END = "<|endoftext|>"


@pytest.fixture(scope="session")
def model(taught_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811  the argument is the imported fixture
    folder = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(taught_model, folder)
    set_end_token(folder, BASE_END)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n")
    return folder


def set_end_token(folder: Path, token: str) -> None:
    """Set the end token in the tokenizer, the model configuration and the generation settings."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = token
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": tokenizer.eos_token_id}))
