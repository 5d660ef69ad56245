"""Text model families (transformers model types), each with the sizes of a tiny model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.tiny import make_tokenizer

ROWS = [{"text": "The quick brown fox jumps over the lazy dog. " * (1 + number % 4)} for number in range(10)]
SIZES: dict[str, Any] = {
    "vocab_size": 448, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}  # fmt: skip
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}


@dataclass(frozen=True)
class Family:
    """One transformers model type: the sizes of a tiny model of this type, and properties of the type that the trainer reports in its notes."""

    sizes: dict[str, Any] = field(default_factory=dict)
    has_sdpa: bool = True
    experts: str | None = None
    """Path of the experts' parameters inside a layer; None for a model without experts."""
    left_out: tuple[str, ...] = ()
    """Names of the linear layers to which the trainer adds no adapter."""
    is_slow: bool = False
    """Whether this family is trained by `make test-faults` but not by `make test`."""


DENSE_LAYERS = ("down_proj", "gate_proj", "up_proj")
FAMILIES = {
    "mistral": Family(is_slow=True),
    "qwen2": Family(is_slow=True),
    "qwen3": Family(HEADS, is_slow=True),
    "gemma": Family(HEADS, is_slow=True),
    "gemma2": Family(HEADS | {"query_pre_attn_scalar": 16}, has_sdpa=False),
    "gemma3_text": Family(HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 32}),
    "phi3": Family(is_slow=True),
    "granite": Family(is_slow=True),
    "olmo2": Family(is_slow=True),
    "smollm3": Family(is_slow=True),
    "glm4": Family(HEADS, is_slow=True),
    "cohere2": Family(HEADS | {"sliding_window": 32}, is_slow=True),
    "gpt_neox": Family(is_slow=True),
    "nemotron": Family(HEADS, is_slow=True),
    "mixtral": Family(LOCAL_EXPERTS, experts="mlp.experts"),
    "qwen2_moe": Family(EXPERTS | {"shared_expert_intermediate_size": 64}, experts="mlp.experts", is_slow=True),
    "qwen3_moe": Family(HEADS | EXPERTS, experts="mlp.experts"),
    "gpt_oss": Family(HEADS | LOCAL_EXPERTS | {"sliding_window": 32}, has_sdpa=False, experts="mlp.experts"),
    "deepseek_v3": Family(
        ROUTED_EXPERTS
        | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4},
        experts="mlp.experts", left_out=DENSE_LAYERS,
    ),
    "glm4_moe": Family(HEADS | ROUTED_EXPERTS, experts="mlp.experts", left_out=DENSE_LAYERS, is_slow=True),
    "qwen3_next": Family(
        HEADS | EXPERTS | {
            "num_hidden_layers": 4, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        }, experts="mlp.experts", left_out=DENSE_LAYERS, is_slow=True,
    ),
    "llama4_text": Family(
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 128}, experts="feed_forward.experts", left_out=("router",)
    ),
    "granitemoehybrid": Family(
        LOCAL_EXPERTS | MAMBA | {"shared_intermediate_size": 64, "layer_types": ["mamba", "attention"]}, experts="block_sparse_moe.experts"
    ),
    "mamba2": Family({"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}, has_sdpa=False, left_out=("out_proj",)),
    "falcon_h1": Family(HEADS | MAMBA | {"mamba_d_ssm": 128}, left_out=("out_proj",), is_slow=True),
    "bamba": Family(MAMBA | {"attn_layer_indices": [1]}, is_slow=True),
    "lfm2": Family({"full_attn_idxs": [1], "block_ff_dim": 128}, is_slow=True),
}  # fmt: skip


def make_family(folder: Path, name: str) -> Path:
    """Write a tiny model of the family `name`, with random weights, into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | FAMILIES[name].sizes, **tokens)).save_pretrained(folder)
    return folder
