"""A tiny model whose folder contains the Python code of its model class (`model.trustRemoteCode`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.tiny import make_tiny_model

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaModel):
    config_class = OwnConfig
    {body}


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()
"""


def write_model_with_code(folder: Path, body: str, **config: Any) -> Path:
    """Write a tiny model with its own modelling code. `body` is the code in its model class. Returns its folder."""
    path = make_tiny_model(folder / "model")
    (path / "modeling_own.py").write_text(REMOTE_CODE.format(body=body))
    content = json.loads((path / "config.json").read_text()) | config
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (path / "config.json").write_text(json.dumps(content | {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}))
    return path
