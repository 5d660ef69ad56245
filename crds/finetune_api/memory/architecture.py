"""Reads the sizes of a model from its `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.errors import ConfigError, NotFoundError

DENSE_MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3", "granite", "olmo2", "olmo3")
EXPERT_MODEL_TYPES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
EAGER_ONLY_MODEL_TYPES = ("gemma2",)
"""Model types for which transformers supports only eager attention."""
GEMMA_MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")
MODEL_TYPES_WITH_HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe")
MODEL_TYPES_WITH_FOUR_NORMS = ("gemma2", "gemma3_text")
MODEL_TYPES_WITH_ATTENTION_BIAS = ("qwen2", "qwen2_moe")
UNCHECKED_MODEL_TYPES = ("phi3", "smollm3", "granite", "gemma2", "gemma3_text", "olmo2", "olmo3", "ministral", "mistral", "qwen3_moe", "qwen2_moe", "olmoe")
"""Model types whose planned peaks were not compared with measured peaks."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder model that determine its memory and its floating-point operations."""

    model_type: str
    hidden_size: int
    layer_count: int
    head_count: int
    key_value_head_count: int
    head_size: int
    feed_forward_size: int
    vocabulary_size: int
    ties_embeddings: bool
    has_attention_bias: bool = False
    """Whether the linear layers of queries, keys and values have biases."""
    has_output_bias: bool = False
    """Whether the linear layer at the end of the attention (`o_proj`) has a bias."""
    has_feed_forward_bias: bool = False
    has_head_norms: bool = False
    """Whether a norm is applied to the queries and keys of each head."""
    norms_per_layer: int = 2
    expert_count: int = 0
    experts_per_token: int = 0
    expert_layer_count: int = 0
    """Number of layers with routed experts. The plan assumes that these layers are the last layers of the model."""
    expert_feed_forward_size: int = 0
    shared_feed_forward_size: int = 0
    """Width of the expert that all tokens use; 0 if the model has none."""
    stored_value_bytes: float = 2
    """Bytes of one value in the weight files."""

    @property
    def is_checked(self) -> bool:
        """Whether planned peaks of this model type were compared with measured peaks."""
        return self.model_type not in UNCHECKED_MODEL_TYPES

    @property
    def is_gemma(self) -> bool:
        return self.model_type in GEMMA_MODEL_TYPES

    @property
    def has_fused_projections(self) -> bool:
        """Whether one linear layer computes queries, keys and values, and another one computes the gate and up projections of the feed-forward layer."""
        return self.model_type == "phi3"


def read_model_shape(folder: Path) -> ModelShape:
    """Read the sizes of a model from its `config.json`. `folder`: the folder with this file, or the path of the file.

    Errors: NotFoundError ModelConfigNotFound, ModelConfigUnreadable; ConfigError ModelTypeNotPlanned, ModelConfigIncomplete.
    """
    config_path = folder / "config.json" if folder.is_dir() else folder
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(
            "ModelConfigNotFound", f"{folder} has no config.json", hint="give the folder that holds the config.json of the base model"
        ) from error
    except (OSError, ValueError) as error:
        raise NotFoundError(
            "ModelConfigUnreadable", f"{config_path} is not a JSON file: {str(error).splitlines()[0]}", hint="give the unchanged config.json of the base model"
        ) from error
    if not isinstance(config, dict):
        raise NotFoundError("ModelConfigUnreadable", f"{config_path} holds no JSON object", hint="give the unchanged config.json of the base model")
    return parse_model_shape(config)


def read_stored_bytes(folder: Path) -> int | None:
    """Return the total size of the weights in bytes, from the index of the safetensors files. None if there is no index, or if it lacks the size."""
    try:
        total_bytes = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return total_bytes if isinstance(total_bytes, int) and total_bytes > 0 else None


def parse_model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Return the sizes from the content of a `config.json`. Errors: ConfigError ModelTypeNotPlanned, ModelConfigIncomplete."""
    if isinstance(config.get("text_config"), Mapping):
        raise ConfigError(
            "ModelTypeNotPlanned", f"the memory plan does not support models for images and text ({config.get('model_type')})",
            hint="plan a text model; a run of this model still records its measured peak",
        )  # fmt: skip
    model_type = str(config.get("model_type"))
    if model_type not in DENSE_MODEL_TYPES + EXPERT_MODEL_TYPES:
        raise ConfigError(
            "ModelTypeNotPlanned", f"the memory plan does not support models of type {model_type}",
            hint=f"supported types: {', '.join(DENSE_MODEL_TYPES + EXPERT_MODEL_TYPES)}; a run of this model still records its measured peak",
        )  # fmt: skip
    try:
        return _read_sizes(model_type, config)
    except KeyError as error:
        raise ConfigError(
            "ModelConfigIncomplete", f"config.json of model type {model_type} has no number in {error.args[0]}",
            hint="give the unchanged config.json of the base model",
        ) from error  # fmt: skip


def _read_sizes(model_type: str, config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes of a supported model type. Raises KeyError with the name of a missing or invalid number."""

    def read_number(name: str, default: int | None = None) -> int:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            if default is None or value is not None:
                raise KeyError(name)
            return default
        return value

    hidden_size, head_count, layer_count = read_number("hidden_size"), read_number("num_attention_heads"), read_number("num_hidden_layers")
    has_bias = bool(config.get("attention_bias"))
    shape_fields: dict[str, Any] = {
        "model_type": model_type, "hidden_size": hidden_size, "layer_count": layer_count, "head_count": head_count,
        "key_value_head_count": read_number("num_key_value_heads", head_count), "head_size": read_number("head_dim", hidden_size // max(head_count, 1)),
        "feed_forward_size": read_number("intermediate_size"), "vocabulary_size": read_number("vocab_size"),
        "ties_embeddings": bool(config.get("tie_word_embeddings", model_type in GEMMA_MODEL_TYPES)),
        "has_attention_bias": has_bias or model_type in MODEL_TYPES_WITH_ATTENTION_BIAS,
        "has_output_bias": has_bias, "has_feed_forward_bias": bool(config.get("mlp_bias")),
        "has_head_norms": model_type in MODEL_TYPES_WITH_HEAD_NORMS, "norms_per_layer": 4 if model_type in MODEL_TYPES_WITH_FOUR_NORMS else 2,
        "stored_value_bytes": 4 if str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.") == "float32" else 2,
    }  # fmt: skip
    if model_type in EXPERT_MODEL_TYPES:
        dense_layer_indices = config.get("mlp_only_layers") or []
        shape_fields |= {
            "expert_count": read_number("num_local_experts" if "num_local_experts" in config else "num_experts"),
            "experts_per_token": read_number("num_experts_per_tok"),
            "expert_layer_count": max(0, layer_count - len(dense_layer_indices)) // max(1, read_number("decoder_sparse_step", 1)),
            "expert_feed_forward_size": read_number("moe_intermediate_size", shape_fields["feed_forward_size"]),
            "shared_feed_forward_size": read_number("shared_expert_intermediate_size", 0),
        }  # fmt: skip
    return ModelShape(**shape_fields)
