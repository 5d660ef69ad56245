"""The shape of a model, read from its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError

DENSE_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2", "olmo3")
EXPERT_TYPES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
EAGER_TYPES = ("gemma2",)
"""Types that transformers computes with eager attention only."""
GEMMA_TYPES = ("gemma", "gemma2", "gemma3_text")
TYPES_WITH_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe")
TYPES_WITH_FOUR_NORMS = ("gemma2", "gemma3_text")
TYPES_WITH_ATTENTION_BIAS = ("qwen2", "qwen2_moe")
SIMILAR_TYPES = ("phi3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2", "olmo3", "ministral", "mistral", "qwen3_moe", "qwen2_moe", "olmoe")
"""Types whose layers are described, but were not compared with measured peaks."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    ties_embeddings: bool
    attention_bias: bool = False
    """Biases of queries, keys and values."""
    output_bias: bool = False
    feed_forward_bias: bool = False
    has_head_norms: bool = False
    """Norms of queries and keys."""
    norms: int = 2
    """Norms of a layer."""
    experts: int = 0
    experts_per_token: int = 0
    expert_layers: int = 0
    """Layers with experts. They come last."""
    expert_feed_forward: int = 0
    shared_feed_forward: int = 0
    """Units of the expert that all tokens use."""
    stored_bytes: float = 2
    """Bytes of each value in the weight files."""

    @property
    def is_checked(self) -> bool:
        """Whether plans of this type were compared with measured peaks."""
        return self.model_type not in SIMILAR_TYPES

    @property
    def is_gemma(self) -> bool:
        return self.model_type in GEMMA_TYPES

    @property
    def has_fused_projections(self) -> bool:
        """Whether queries, keys and values are one linear layer, and gate and up another."""
        return self.model_type == "phi3"


def read_model_shape(folder: Path) -> ModelShape:
    """Read `config.json`, and the precision from the safetensors index or header if the configuration does not name it.

    Errors: NotFoundError ModelConfigNotFound, ModelConfigUnreadable; ConfigError ModelTypeNotPlanned, ModelConfigIncomplete.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(
            "ModelConfigNotFound", f"{folder} has no config.json", hint="give the folder that holds the config.json of the base model"
        ) from error
    except (OSError, ValueError) as error:
        raise NotFoundError(
            "ModelConfigUnreadable", f"{path} is not a JSON file: {str(error).splitlines()[0]}", hint="give the unchanged config.json of the base model"
        ) from error
    if not isinstance(content, dict):
        raise NotFoundError("ModelConfigUnreadable", f"{path} holds no JSON object", hint="give the unchanged config.json of the base model")
    return model_shape(content)


def stored_bytes(folder: Path) -> int | None:
    """Bytes of all weights, from the index of the safetensors files. None without an index that says so."""
    try:
        size = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > 0 else None


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes in a model's configuration. Errors: ConfigError ModelTypeNotPlanned, ModelConfigIncomplete."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        raise ConfigError(
            "ModelTypeNotPlanned", f"the memory plan does not know models for images and text ({config.get('model_type')})",
            hint="plan a text model; a run of this model still records its measured peak",
        )  # fmt: skip
    model_type = str(config.get("model_type"))
    if model_type not in DENSE_TYPES + EXPERT_TYPES:
        raise ConfigError(
            "ModelTypeNotPlanned", f"the memory plan does not know models of type {model_type}",
            hint=f"it knows {', '.join(DENSE_TYPES + EXPERT_TYPES)}; a run of this model still records its measured peak",
        )  # fmt: skip
    try:
        return _shape_of(model_type, config)
    except KeyError as error:
        raise ConfigError(
            "ModelConfigIncomplete", f"config.json of type {model_type} has no number {error.args[0]}", hint="give the unchanged config.json of the base model"
        ) from error


def _shape_of(model_type: str, config: Mapping[str, Any]) -> ModelShape:
    def number(name: str, default: int | None = None) -> int:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            if default is None or value is not None:
                raise KeyError(name)
            return default
        return value

    hidden, heads, layers = number("hidden_size"), number("num_attention_heads"), number("num_hidden_layers")
    has_bias = bool(config.get("attention_bias"))
    shape: dict[str, Any] = {
        "model_type": model_type, "hidden": hidden, "layers": layers, "heads": heads,
        "key_heads": number("num_key_value_heads", heads), "head_size": number("head_dim", hidden // max(heads, 1)),
        "feed_forward": number("intermediate_size"), "vocabulary": number("vocab_size"),
        "ties_embeddings": bool(config.get("tie_word_embeddings", model_type in GEMMA_TYPES)),
        "attention_bias": has_bias or model_type in TYPES_WITH_ATTENTION_BIAS, "output_bias": has_bias, "feed_forward_bias": bool(config.get("mlp_bias")),
        "has_head_norms": model_type in TYPES_WITH_HEAD_NORMS, "norms": 4 if model_type in TYPES_WITH_FOUR_NORMS else 2,
        "stored_bytes": 4 if str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.") == "float32" else 2,
    }  # fmt: skip
    if model_type in EXPERT_TYPES:
        dense = config.get("mlp_only_layers") or []
        shape |= {
            "experts": number("num_local_experts" if "num_local_experts" in config else "num_experts"), "experts_per_token": number("num_experts_per_tok"),
            "expert_layers": max(0, layers - len(dense)) // max(1, number("decoder_sparse_step", 1)),
            "expert_feed_forward": number("moe_intermediate_size", shape["feed_forward"]),
            "shared_feed_forward": number("shared_expert_intermediate_size", 0),
        }  # fmt: skip
    return ModelShape(**shape)
