"""Shrinks the configuration of a model, for a small copy with the same classes and kinds of layers, but few layers and small sizes."""

from __future__ import annotations

import copy
from typing import Any

FEWEST_LAYERS, MOST_LAYERS = 2, 4
HEAD_SIZE = 16
MOST_KEY_HEADS, MOST_HEADS_PER_KEY_HEAD = 2, 4
MOST_EXPERTS = 4
FEED_FORWARD_SIZE = 64
FEED_FORWARD_FIELDS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_feed_forward")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


def shrink_config(config: Any) -> Any:
    """Return the configuration of a small copy of the text model with the configuration `config`.

    The copy has at least one layer of each kind that `layer_types` names, but at most four kinds. The vocabulary, the number of positions and
    all fields that this module does not know stay the same, so a model class with unusual fields may refuse the copy.
    """
    small_config = copy.deepcopy(config)
    text_config = small_config.get_text_config()
    for each_config in (small_config, text_config):
        if getattr(each_config, "quantization_config", None) is not None:
            del each_config.quantization_config
    _shrink_heads(text_config)
    _limit_fields(text_config, FEED_FORWARD_FIELDS, FEED_FORWARD_SIZE)
    _limit_fields(text_config, EXPERT_FIELDS, max(MOST_EXPERTS, getattr(text_config, "num_experts_per_tok", None) or 1))
    _limit_fields(text_config, ("first_k_dense_replace", "n_group", "topk_group"), 1)
    _shrink_layers(text_config)
    return small_config


def _shrink_heads(text_config: Any) -> None:
    """Shrink the attention heads and the hidden size, but keep the kind of attention: grouped-query attention stays grouped."""
    head_count = text_config.num_attention_heads
    key_head_count = getattr(text_config, "num_key_value_heads", None) or head_count
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // head_count
    if not _is_head_size_fixed(text_config):
        head_size = min(head_size, HEAD_SIZE)
    small_key_head_count = min(key_head_count, MOST_KEY_HEADS)
    small_head_count = small_key_head_count * min(max(head_count // key_head_count, 1), MOST_HEADS_PER_KEY_HEAD)
    text_config.num_attention_heads = small_head_count
    if getattr(text_config, "num_key_value_heads", None) is not None:
        text_config.num_key_value_heads = small_key_head_count
    if isinstance(vars(text_config).get("head_dim"), int):  # In some classes, `head_dim` is a property that cannot be set.
        text_config.head_dim = head_size
    text_config.hidden_size = small_head_count * head_size


def _is_head_size_fixed(text_config: Any) -> bool:
    """Whether the head size must not change, because other fields depend on it (latent attention, or lists with one number for each part of a head)."""
    if getattr(text_config, "qk_rope_head_dim", None) is not None:
        return True
    position_settings = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    return any(isinstance(value, list) for value in position_settings.values())


def _limit_fields(text_config: Any, field_names: tuple[str, ...], largest_value: int) -> None:
    for name in field_names:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > largest_value:
            setattr(text_config, name, largest_value)


def _shrink_layers(text_config: Any) -> None:
    """Keep the first layer of each kind, but at least two and at most four layers.

    Lists with one value for each layer keep only the values of these layers.
    """
    layer_count = text_config.num_hidden_layers
    layer_types = getattr(text_config, "layer_types", None) or []
    kept_layers = sorted({layer_types.index(layer_type) for layer_type in layer_types})[:MOST_LAYERS] if len(layer_types) == layer_count else []
    kept_layers = sorted({*kept_layers, *[number for number in range(layer_count) if number not in kept_layers][: max(0, FEWEST_LAYERS - len(kept_layers))]})
    lists_per_layer = {
        name: value for name, value in vars(text_config).items()
        if isinstance(value, list) and len(value) == layer_count and layer_count > MOST_LAYERS
    }
    if len(layer_types) == layer_count:
        lists_per_layer["layer_types"] = layer_types
    text_config.num_hidden_layers = len(kept_layers)
    for name, layer_values in lists_per_layer.items():
        setattr(text_config, name, [layer_values[number] for number in kept_layers])
