"""Continuing the training of a saved adapter: every weight of the file is loaded, and every trained weight comes from the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.errors import ConfigError, FineTuneError, NotFoundError
from finetune_api.names import FailureClass
from safetensors.torch import load_file, save_file

from tests.support.learning import create_method_for_run, make_run, merge_mappings

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING_WEIGHT = "base_model.model.model.embed_tokens.weight"


def make_base_model(**options: Any) -> Any:
    """Return a small model, which has the same weights at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model_options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=48, max_position_embeddings=32, **(model_options | options)))


def save_adapter(folder: Path, **options: Any) -> Path:
    """Save a LoRA adapter whose weights differ from all initialisations of PEFT. Return its folder."""
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(
        make_base_model(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **options)
    )
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data)
    peft_model.save_pretrained(folder)
    return folder


def continue_adapter(tmp_path: Path, adapter_folder: Path, spec: dict[str, Any] | None = None, model: Any = None) -> Any:
    """Load the adapter on its base model for further training."""
    run_spec = {"method": {"type": "adapter", "adapter": {"source": "s3://models/mine"}}}
    run, inputs = make_run(tmp_path, tmp_path / "model", merge_mappings(run_spec, spec or {}), adapter=adapter_folder)
    return create_method_for_run(run, inputs).apply(make_base_model() if model is None else model)


def rewrite_weights(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the weights in the adapter's file with `change(weights)`."""
    save_file(change(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def rewrite_config(folder: Path, **options: Any) -> None:
    """Change options in the adapter's configuration file."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | options))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}, {"trainable_token_indices": [3, 5]}],
)
def test_a_fitting_adapter_keeps_its_weights(options: dict[str, Any], tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", **options)
    trainable_model = continue_adapter(tmp_path, folder)
    trainable_model.model.save_pretrained(tmp_path / "again")
    weights_before, weights_after = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert weights_before.keys() == weights_after.keys() and all(torch.equal(weights_before[name], weights_after[name]) for name in weights_before)
    assert trainable_model.notes == ["continues the LORA adapter of s3://models/mine"]


def save_vb_lora(folder: Path) -> Path:
    """Save a VB-LoRA adapter and return its folder. All layers share one vector bank, which the file contains once."""
    from peft import VBLoRAConfig, get_peft_model

    bank_options = {"r": 2, "vector_length": 4, "num_vectors": 8, "topk": 2}
    peft_model = get_peft_model(
        make_base_model(),
        VBLoRAConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_vector_bank_bound=0.5, **bank_options),
    )
    peft_model.save_pretrained(folder)
    return folder


def test_a_weight_that_layers_share_needs_only_one_entry_in_the_file(tmp_path: Path) -> None:
    folder = save_vb_lora(tmp_path / "adapter")
    continue_adapter(tmp_path, folder).model.save_pretrained(tmp_path / "again")
    weights_before, weights_after = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / "again" / WEIGHTS_FILE)
    assert weights_before.keys() == weights_after.keys() and all(torch.equal(weights_before[name], weights_after[name]) for name in weights_before)


def test_a_shared_weight_without_an_entry_is_refused(tmp_path: Path) -> None:
    folder = save_vb_lora(tmp_path / "adapter")
    rewrite_weights(
        folder, lambda weights: {name: tensor for name, tensor in weights.items() if "vector_bank" not in name}
    )
    with pytest.raises(ConfigError) as caught:
        continue_adapter(tmp_path, folder)
    assert (caught.value.code, "1 weights are not in the adapter file" in caught.value.message) == (
        "AdapterOfAnotherBase",
        True,
    )


def test_base_weights_in_the_file_are_accepted_only_if_they_are_unchanged(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    embedding_weight = make_base_model().get_input_embeddings().weight.detach()
    rewrite_weights(folder, lambda weights: {**weights, EMBEDDING_WEIGHT: embedding_weight})
    continue_adapter(tmp_path, folder)
    rewrite_weights(folder, lambda weights: {**weights, EMBEDDING_WEIGHT: embedding_weight + 1})
    with pytest.raises(ConfigError) as caught:
        continue_adapter(tmp_path, folder)
    assert (caught.value.code, "model.embed_tokens.weight" in caught.value.message) == ("AdapterNotContinuable", True)


@pytest.mark.parametrize(
    ("change", "message_part"),
    [
        (lambda weights: {name: tensor for name, tensor in weights.items() if ".layers.0." in name}, "4 weights are not in the adapter file"),
        (
            lambda weights: {name.replace(".layers.", ".blocks."): tensor for name, tensor in weights.items()},
            "8 weights are not in the adapter file, first base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight; 8 weights of the",
        ),
        (lambda weights: {name: tensor[:1] if "lora_A" in name else tensor for name, tensor in weights.items()}, "size mismatch for"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_the_model_is_refused(change: Any, message_part: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    rewrite_weights(folder, change)
    with pytest.raises(ConfigError) as caught:
        continue_adapter(tmp_path, folder)
    assert caught.value.code == "AdapterOfAnotherBase"
    assert message_part in caught.value.message


def test_weights_of_a_layer_that_is_not_targeted_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    rewrite_config(folder, target_modules=["k_proj", "v_proj"])
    with pytest.raises(ConfigError) as caught:
        continue_adapter(tmp_path, folder)
    assert (caught.value.code, "are not in the model" in caught.value.message) == ("AdapterOfAnotherBase", True)


def test_a_base_model_with_more_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        continue_adapter(tmp_path, save_adapter(tmp_path / "adapter"), model=make_base_model(num_hidden_layers=3))
    assert (caught.value.code, "layers.2" in caught.value.message) == ("AdapterOfAnotherBase", True)


@pytest.mark.parametrize("damage", ["no weights", "cut weights", "no config", "odd config", "cut pickle"])
def test_unreadable_files_are_reported_as_a_model_failure(damage: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "adapter")
    if "weights" in damage or "pickle" in damage:
        (folder / WEIGHTS_FILE).unlink()
    if damage == "cut weights":
        (folder / WEIGHTS_FILE).write_bytes(b"xx")
    if damage == "cut pickle":
        (folder / "adapter_model.bin").write_bytes(b"xx")
    if "config" in damage:
        (folder / CONFIG_FILE).write_text("[]" if damage == "odd config" else "")
    with pytest.raises(NotFoundError) as caught:
        continue_adapter(tmp_path, folder)
    assert (caught.value.code, caught.value.failure_class) == ("AdapterUnreadable", FailureClass.MODEL)


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({"peft_type": "NEWKIND"}, {}),
        ({"peft_type": "PROMPT_TUNING"}, {}),
        ({"init_lora_weights": "pissa_niter_4"}, {"trainer": {"type": "dpo"}}),
        ({"bias": "all"}, {"trainer": {"type": "kto"}}),
    ],
)
def test_an_adapter_that_peft_cannot_continue_is_refused(
    options: dict[str, Any], spec: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter")
    rewrite_config(folder, **options)
    with pytest.raises(FineTuneError) as caught:
        continue_adapter(tmp_path, folder, spec)
    assert caught.value.code == "AdapterNotContinuable"
