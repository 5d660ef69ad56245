"""The configuration of a small copy of a model: the same classes and kinds of layers, few layers, and small sizes that fit together."""

from __future__ import annotations

import copy
from typing import Any

FEWEST_LAYERS, MOST_LAYERS = 2, 4
HEAD_SIZE = 16
MOST_KEY_HEADS, MOST_GROUP = 2, 4
MOST_EXPERTS = 4
FEED_FORWARD = 64
FEED_FORWARD_FIELDS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "expert_feed_forward")
EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")


def shrink_config(config: Any) -> Any:
    """Return the configuration of a small copy. The vocabulary and the number of positions stay.

    `config`: the configuration of a text model. The layers of the copy have all kinds that `layer_types` names, at most four. The sizes of other
    fields stay, so a model class with unusual fields may refuse the copy.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for holder in {id(one): one for one in (small, text)}.values():
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
    _shrink_heads(text)
    _lower(text, FEED_FORWARD_FIELDS, FEED_FORWARD)
    _lower(text, EXPERT_FIELDS, max(MOST_EXPERTS, getattr(text, "num_experts_per_tok", None) or 1))
    _lower(text, ("first_k_dense_replace", "n_group", "topk_group"), 1)
    _shrink_layers(text)
    return small


def _shrink_heads(text: Any) -> None:
    """Shrink the attention heads, but keep the kind of attention: grouped-query attention stays grouped. The heads fill the hidden size."""
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    if not _is_head_size_fixed(text):
        size = min(size, HEAD_SIZE)
    small_key_heads = min(key_heads, MOST_KEY_HEADS)
    small_heads = small_key_heads * min(max(heads // key_heads, 1), MOST_GROUP)
    text.num_attention_heads = small_heads
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = small_key_heads
    if isinstance(vars(text).get("head_dim"), int):  # in some classes, it is a property
        text.head_dim = size
    text.hidden_size = small_heads * size


def _is_head_size_fixed(text: Any) -> bool:
    """Whether the head size must stay, because other fields depend on it: lists with one number for each part of a head, or latent attention."""
    if getattr(text, "qk_rope_head_dim", None) is not None:
        return True
    positions = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return any(isinstance(value, list) for value in positions.values())


def _lower(text: Any, fields: tuple[str, ...], most: int) -> None:
    for name in fields:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > most:
            setattr(text, name, most)


def _shrink_layers(text: Any) -> None:
    """Keep the first layer of each kind, at least two layers. Lists with one value for each layer keep the values of these layers."""
    layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or []
    kept = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS] if len(kinds) == layers else []
    kept = sorted({*kept, *[number for number in range(layers) if number not in kept][: max(0, FEWEST_LAYERS - len(kept))]})
    lists = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == layers and layers > MOST_LAYERS}
    if len(kinds) == layers:
        lists["layer_types"] = kinds
    text.num_hidden_layers = len(kept)
    for name, values in lists.items():
        setattr(text, name, [values[number] for number in kept])
