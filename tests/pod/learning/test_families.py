"""Types of models with their default settings: each trains with LoRA and in full, and its adapter can be loaded by plain PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError
from finetune_trainer.verification.artefact_checks import find_fault
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.learning import merge_mappings, run_training
from tests.support.tiny import make_tokenizer

pytestmark = pytest.mark.pod
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
    """A type of model: the sizes of a tiny configuration, and the trainer's notes about this type."""

    sizes: dict[str, Any] = field(default_factory=dict)
    has_sdpa: bool = True
    experts: str | None = None
    """Path of the experts' parameters in a layer."""
    left_out: tuple[str, ...] = ()
    """Linear layers without an adapter."""
    is_slow: bool = False
    """Whether the family is only trained by `make test-faults`."""


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
WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.experts]


def cases(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.faults] if FAMILIES[name].is_slow else []) for name in names]


def make_family(folder: Path, name: str) -> Path:
    """Write a tiny model of the family with random weights."""
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | FAMILIES[name].sizes, **tokens)).save_pretrained(folder)
    return folder


def train(folder: Path, name: str, method: dict[str, Any], spec: dict[str, Any] | None = None) -> Any:
    return run_training(folder, make_family(folder / "model", name), merge_mappings({"method": method}, spec or {}), ROWS)


def difference_after_loading(folder: Path, outcome: Any) -> tuple[float, float]:
    """Largest difference of the logits between the trained model and the adapter that plain PEFT loads, and of the base model."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation=outcome.resolved["attention"]).eval()
    ids = torch.randint(5, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, trained = base(ids).logits.clone(), outcome.model.eval()(ids).logits
        loaded = PeftModel.from_pretrained(base, outcome.folder).eval()(ids).logits
    return (loaded - trained).abs().max().item(), (before - trained).abs().max().item()


@pytest.mark.parametrize("name", cases(FAMILIES))
def test_an_adapter_learns_and_can_be_loaded(name: str, tmp_path: Path) -> None:
    family, outcome = FAMILIES[name], train(tmp_path, name, {"type": "lora"})
    assert find_fault(outcome.folder, tmp_path / "model", None, is_adapter=True) is None
    assert len(outcome.losses) == 4 and 5.5 < outcome.losses[0] < 7 and outcome.losses[-1] < outcome.losses[0]
    assert outcome.resolved["attention"] == ("sdpa" if family.has_sdpa else "eager")
    assert any(note.startswith("attention eager is used, because ") for note in outcome.notes) is not family.has_sdpa
    assert [f"{family.experts}.down_proj, {family.experts}.gate_up_proj" in note for note in outcome.notes if "routed experts (" in note] == (
        [True] if family.experts else []
    )
    assert [note.split(" have no adapter")[0] for note in outcome.notes if note.startswith("layers named ")] == (
        [f"layers named {', '.join(family.left_out)}"] if family.left_out else []
    )
    trained_names = {name.rsplit(".lora_", 1)[0] for name, value in outcome.model.named_parameters() if value.requires_grad}
    assert not any(path.rsplit(".", 1)[-1] in (*family.left_out, "experts", "gate", "router", "lm_head") for path in trained_names)
    after_loading, change = difference_after_loading(tmp_path, outcome)
    assert after_loading < 1e-5 < change


@pytest.mark.parametrize("name", cases(FAMILIES))
def test_all_weights_learn(name: str, tmp_path: Path) -> None:
    outcome = train(tmp_path, name, {"type": "full"})
    assert len(outcome.losses) == 4 and outcome.losses[-1] < outcome.losses[0]


@pytest.mark.parametrize("name", cases(WITH_EXPERTS))
def test_adapters_of_experts_can_be_loaded(name: str, tmp_path: Path) -> None:
    outcome = train(tmp_path, name, {"type": "lora", "lora": {"targetParameters": ["all-experts"]}})
    assert not [note for note in outcome.notes if "routed experts (" in note]
    experts = [key for key, value in outcome.model.named_parameters() if value.requires_grad and ".experts." in key]
    assert experts and not [key for key, value in outcome.model.named_parameters() if value.requires_grad and ".gate." in key]
    after_loading, change = difference_after_loading(tmp_path, outcome)
    assert after_loading < 1e-5 < change
    assert find_fault(outcome.folder, tmp_path / "model", None, is_adapter=True) is None


def test_one_parameter_of_the_experts_can_be_named(tmp_path: Path) -> None:
    outcome = train(tmp_path, "gpt_oss", {"type": "lora", "lora": {"targetParameters": ["experts.down_proj"], "rank": 4}})
    shapes = {tuple(value.shape) for key, value in outcome.model.named_parameters() if value.requires_grad and ".experts." in key}
    assert shapes == {(4 * 4, 128), (64, 4 * 4)}, "four experts with rank 4"
    assert find_fault(outcome.folder, tmp_path / "model", None, is_adapter=True) is None


@pytest.mark.parametrize(
    ("name", "lora", "code", "text"),
    [
        ("mixtral", {"targetParameters": ["experts.w1"]}, "TargetParametersMissing", "experts.w1"),
        ("gemma3_text", {"targetParameters": ["all-experts"]}, "TargetParametersMissing", "the model has no routed experts"),
        ("qwen3_next", {"targetModules": list(DENSE_LAYERS), "dropout": 0.1}, "DropoutOnExperts", "write `dropout: 0`"),
    ],
)
def test_modules_that_cannot_have_an_adapter_are_refused(name: str, lora: dict[str, Any], code: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, name, {"type": "lora", "lora": lora})
    assert caught.value.code == code and text in str(caught.value)


def test_sdpa_is_refused_for_a_type_of_model_without_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, "gemma2", {"type": "lora"}, {"model": {"attention": "sdpa"}})
    assert caught.value.code == "AttentionUnavailable" and "gemma2" in str(caught.value) and "eager" in str(caught.value)
